"""Shows and checks token files, or shows the sequences of an update of a run: `python -m gpt2_jax.data DIR`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from gpt2_jax.cli import run_command
from gpt2_jax.config import TokenizerName
from gpt2_jax.config.flags import parse_flags
from gpt2_jax.data.batches import CONFIG, describe_update
from gpt2_jax.data.manifest import Manifest, read_manifest, verify
from gpt2_jax.data.shards import TokenFile, open_token_files
from gpt2_jax.data.tokenizer import end_of_text_token, get_tokenizer, read_characters, vocab_size
from gpt2_jax.display import Display, count
from gpt2_jax.errors import UserError, strip_controls
from gpt2_jax.files import check_regular, user_path

PROG = "python -m gpt2_jax.data"
DESCRIPTION = """Show and check what a directory of token files holds. With --update N and a run directory, show the
sequences that update N of the run trains on, with the file and the offset of each."""
WINDOWS = 3  # samples of a directory of token files
RUN_WINDOWS = 16  # sequences of an update


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command."""

    directory: tyro.conf.Positional[str]
    """Directory of token files, in any format that training reads; with --update, a run directory."""
    update: int | None = None
    """Update of a run whose sequences to show: the one that has this number as its step in metrics.jsonl."""
    tokenizer: TokenizerName | None = None
    """Tokenizer of the files; by default from manifest.json or meta.pkl, else gpt2. A run has its own."""
    windows: int | None = None
    """Text samples to show; by default 3 of token files, 16 of an update."""
    window_tokens: int = 48
    """Tokens to show of each sample."""
    seed: int = 0
    """Seed that chooses the samples of token files."""


def main(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    flags = parse_flags(Flags, args, prog=PROG, description=DESCRIPTION)
    directory = user_path(flags.directory, "DIR")
    if (flags.windows or 0) < 0 or flags.window_tokens < 1 or flags.seed < 0:
        raise UserError("--windows and --seed must be 0 or more, and --window-tokens at least 1")
    if flags.update is not None:
        if flags.tokenizer:
            raise UserError("--tokenizer does not go with --update: the config of the run names the tokenizer")
        windows = RUN_WINDOWS if flags.windows is None else flags.windows
        for line in describe_update(directory, flags.update, windows, flags.window_tokens):
            print(line)
        return 0
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix in (".bin", ".npy"))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from error
    manifest = read_manifest(directory)
    if not paths and (directory / CONFIG).is_file():
        raise UserError(f"{directory} is a run directory; type --update N to show the sequences of update N")
    if not paths:
        raise UserError(f"{directory} has no token files (.bin, .npy); make some with python -m gpt2_jax.prepare")
    for path in paths:
        check_regular(path)
    files = open_token_files(paths)
    meta = directory / "meta.pkl"
    guess: TokenizerName = "chars" if meta.exists() else "gpt2"
    name: TokenizerName = flags.tokenizer or (manifest.settings["tokenizer"] if manifest else guess)
    if name == "chars" and not meta.exists():
        raise UserError(f"{directory} has no meta.pkl with the characters; type --tokenizer gpt2 or --tokenizer bytes")
    characters = read_characters(meta).characters if name == "chars" else ""
    with Display(0, len(files), "reading") as display:
        _print_files(display, files, name, vocab_size(name, characters))
        _check_manifest(display, directory, manifest, files)
    n_windows = WINDOWS if flags.windows is None else flags.windows
    if n_windows and any(map(len, files)):
        tokenizer = get_tokenizer(name, characters)
        rng = np.random.default_rng(flags.seed)
        weights = np.array([len(file) for file in files], dtype=float)
        for _ in range(n_windows):
            file = files[rng.choice(len(files), p=weights / weights.sum())]
            length = min(flags.window_tokens, len(file))
            start = int(rng.integers(0, len(file) - length + 1))
            text = tokenizer.decode_bytes(file[start : start + length].tolist()).decode("utf-8", "replace")
            print(f"\n{strip_controls(file.path.name)}, tokens {start:,} to {start + length:,}:\n    {text!r}")
    return 0


def _print_files(display: Display, files: list[TokenFile], name: TokenizerName, n_vocab: int) -> None:
    """Prints a line per file and the total. Reads all tokens, and raises an error for one beyond the vocabulary."""
    end = end_of_text_token(name)
    for done, file in enumerate(files, 1):
        documents, largest = 0, 0
        for tokens in file.chunks():
            documents += int(np.count_nonzero(tokens == end)) if end is not None else 0
            largest = max(largest, int(tokens.max()))
        if largest >= n_vocab:
            raise UserError(
                f"{file.path} has the token {largest}, beyond the {n_vocab:,} of the tokenizer {name!r}; give "
                "another --tokenizer, or prepare it again"
            )
        n_documents = "" if end is None else f", {count(documents, 'document')}"
        display.print(f"{file.path.name:24}{len(file):>15,} tokens{n_documents}, largest {largest}")
        display.show(done, f"{done}/{len(files)} files", ["read"])
    total = sum(map(len, files))
    display.print(f"{'in all':24}{total:>15,} tokens in {count(len(files), 'file')}, tokenizer {name}")


def _check_manifest(display: Display, directory: Path, manifest: Manifest | None, files: list[TokenFile]) -> None:
    """Compares the files and their checksums with the manifest, and prints the result."""
    if manifest is None:
        display.print("no manifest.json: nothing to compare with")
        return
    listed, found = {shard.file for shard in manifest.shards}, {file.path.name for file in files}
    if listed != found:
        odd = sorted(listed ^ found)[0]
        raise UserError(
            f"{directory / odd} is {'missing' if odd in listed else 'not in manifest.json'}; prepare it again"
        )
    verify(directory, manifest)
    display.print(
        f"manifest.json: {count(len(manifest.shards), 'checksum')} agree; made of {manifest.settings['source']}"
    )


if __name__ == "__main__":
    run_command(main)
