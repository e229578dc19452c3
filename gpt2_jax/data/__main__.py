"""What a directory of token files holds: `python -m gpt2_jax.data DIR`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from gpt2_jax.cli import run_command
from gpt2_jax.config import TokenizerName
from gpt2_jax.config.flags import parse_flags
from gpt2_jax.data.prepared import Manifest, read_manifest, verify
from gpt2_jax.data.shards import TokenFile, open_token_files
from gpt2_jax.data.tokenizer import end_of_text_token, get_tokenizer, read_characters, vocab_size
from gpt2_jax.display import Display, count
from gpt2_jax.errors import UserError

PROG = "python -m gpt2_jax.data"


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command."""

    directory: tyro.conf.Positional[str]
    """Directory of token files, in any of the formats that training reads."""
    tokenizer: TokenizerName | None = None
    """Of the tokens; by default what manifest.json or meta.pkl says, or gpt2."""
    windows: int = 3
    """Pieces of text to show."""
    window_tokens: int = 48
    """Tokens in each."""
    seed: int = 0
    """Chooses the pieces."""


def main(args: Sequence[str]) -> int:
    """The command; returns its exit code."""
    flags = parse_flags(Flags, args, prog=PROG, description="Show and check what a directory of token files holds.")
    directory = Path(flags.directory).expanduser()
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix in (".bin", ".npy"))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from error
    manifest = read_manifest(directory)
    if not paths:
        raise UserError(f"{directory} has no token files (.bin, .npy); python -m gpt2_jax.prepare makes some")
    if flags.windows < 0 or flags.window_tokens < 1 or flags.seed < 0:
        raise UserError("--windows and --seed have to be 0 or more, and --window-tokens at least 1")
    files = open_token_files(paths)
    meta = directory / "meta.pkl"
    guess: TokenizerName = "chars" if meta.exists() else "gpt2"
    name: TokenizerName = flags.tokenizer or (manifest.settings["tokenizer"] if manifest else guess)
    if name == "chars" and not meta.exists():
        raise UserError(f"{directory} has no meta.pkl with its characters; take --tokenizer gpt2 or bytes")
    characters = read_characters(meta).characters if name == "chars" else ""
    with Display(0, len(files), "reading") as display:
        _show(display, directory, manifest, files, name, vocab_size(name, characters))
    if flags.windows and any(map(len, files)):
        tokenizer = get_tokenizer(name, characters)
        rng = np.random.default_rng(flags.seed)
        weights = np.array([len(file) for file in files], dtype=float)
        for number in rng.choice(len(files), size=flags.windows, p=weights / weights.sum()):
            file = files[number]
            length = min(flags.window_tokens, len(file))
            start = int(rng.integers(0, len(file) - length + 1))
            text = tokenizer.decode_bytes(file[start : start + length].tolist()).decode("utf-8", "replace")
            print(f"\n{file.path.name}, tokens {start:,} to {start + length:,}:\n    {text!r}")
    return 0


def _show(
    display: Display, directory: Path, manifest: Manifest | None, files: list[TokenFile], name: TokenizerName, size: int
) -> None:
    """One line per file, then the sums, then whether they are what the manifest says."""
    end = end_of_text_token(name)
    for done, file in enumerate(files, 1):
        documents, largest = 0, 0
        for tokens in file.pieces():
            documents += int(np.count_nonzero(tokens == end)) if end is not None else 0
            largest = max(largest, int(tokens.max()))
        if largest >= size:
            raise UserError(
                f"{file.path} has the token {largest}, beyond the {size:,} of the tokenizer {name!r}; give "
                "another --tokenizer, or prepare it again"
            )
        counted = "" if end is None else f", {count(documents, 'document')}"
        display.say(f"{file.path.name:24}{len(file):>15,} tokens{counted}, largest {largest}")
        display.show(done, f"{done}/{len(files)} files", ["read"])
    total = sum(map(len, files))
    display.say(f"{'in all':24}{total:>15,} tokens in {count(len(files), 'file')}, tokenizer {name}")
    if manifest is None:
        display.say("no manifest.json: nothing to compare with")
        return
    listed, found = {shard.file for shard in manifest.shards}, {file.path.name for file in files}
    if listed != found:
        odd = sorted(listed ^ found)[0]
        raise UserError(
            f"{directory / odd} is {'missing' if odd in listed else 'not in manifest.json'}; prepare it again"
        )
    verify(directory, manifest)
    display.say(
        f"manifest.json: {count(len(manifest.shards), 'checksum')} agree; made of {manifest.settings['source']}"
    )


if __name__ == "__main__":
    run_command(main)
