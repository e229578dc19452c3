"""Turns text into token files: `python -m gpt2_jax.prepare SOURCE --out DIR`."""

from __future__ import annotations

import dataclasses
import glob
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt2_jax.cli import run_command
from gpt2_jax.config.flags import parse_flags
from gpt2_jax.data.hub import DATASETS, TOKENIZED, HubSource, download_shakespeare, download_tokenized
from gpt2_jax.data.manifest import MANIFEST, SPLITS, Manifest, saved_settings
from gpt2_jax.data.preparation import write_tokens
from gpt2_jax.data.sources import FileSource, Source
from gpt2_jax.data.tokenizer import end_of_text_token
from gpt2_jax.data.workers import MAX_WORKERS, TokenizeOptions
from gpt2_jax.data.writer import ShardWriter
from gpt2_jax.display import Display, count
from gpt2_jax.errors import UserError, strip_controls
from gpt2_jax.files import exclusive, make_directory, remove_empty, replace_text, user_path

PROG = "python -m gpt2_jax.prepare"
MAX_SHARD_TOKENS = 2**31 - 1  # the count in a header is an int32

NAMES = {name: f"{dataset.description} ({dataset.repository})" for name, dataset in DATASETS.items()} | {
    "fineweb-10b-tokenized": f"fineweb-10b, already tokenized, 20 GB; --limit counts whole files ({TOKENIZED})",
    "shakespeare": "1.1 MB, as in nanoGPT",
    "stdlib": "the standard library of this Python; needs no download",
}
SOURCES = "\n".join(f"  {name:23}{description}" for name, description in NAMES.items())
DESCRIPTION = f"""Turn text into token files.

SOURCE is one of these names:
{SOURCES}

or files and globs: text (each file is a document), JSON lines (.jsonl), both also as .gz and .zst, and .parquet.
Run the same command again to resume after a stop."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command."""

    source: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE [SOURCE ...]")]
    """A name from the list above, or files and globs."""
    out: str
    """Directory for the token files."""
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    """Tokenizer."""
    val_fraction: float | None = None
    """Share to hold out: documents, or the end of a single text. Default: 0.1 for files, else the source's own."""
    shard_tokens: int = 100_000_000
    """Tokens per file."""
    workers: int = 0
    """Processes that tokenize; 0 for one per core."""
    limit: int = 0
    """Stop after this many tokens; 0 for all."""
    field: str = "text"
    """Field of JSON lines, or column of Parquet, with the text."""
    on_error: Literal["stop", "skip"] = "stop"
    """Stop at a damaged document, or skip it."""


def main(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    flags = parse_flags(Flags, args, prog=PROG, description=DESCRIPTION)
    _validate(flags)
    out = user_path(flags.out, "--out")
    new: list[Path] = []
    try:
        new = make_directory(out)
        with exclusive(out, "preparing"):
            manifest = prepare(flags, out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror}; make room and type the same command to resume, or give "
            "another --out"
        ) from error
    finally:
        remove_empty(new)
    _print_summary(flags, out, manifest)
    return 0


def _validate(flags: Flags) -> None:
    if not flags.source:
        raise UserError(f"no SOURCE; give files, or one of {', '.join(NAMES)}")
    for source in flags.source:
        user_path(source, "SOURCE")
    named = [name for name in flags.source if _is_named(name)]
    if named and len(flags.source) > 1:
        raise UserError(f"{named[0]} must be the only SOURCE; prepare the others into directories of their own")
    if flags.val_fraction is not None and not 0 <= flags.val_fraction < 1:
        raise UserError(f"--val-fraction {flags.val_fraction}; expected 0 or more and below 1")
    if not 1 <= flags.shard_tokens <= MAX_SHARD_TOKENS:
        raise UserError(f"--shard-tokens {flags.shard_tokens}; expected 1 to {MAX_SHARD_TOKENS}")
    if not 0 <= flags.workers <= MAX_WORKERS:
        raise UserError(f"--workers {flags.workers}; expected 0 or more, at most {MAX_WORKERS}")
    if flags.limit < 0:
        raise UserError(f"--limit {flags.limit}; expected 0 or more")


def prepare(flags: Flags, out: Path) -> Manifest:
    """Writes the token files of a source into a directory, or resumes a run that was stopped.

    Raises:
        UserError: the source cannot be read, or the directory has other files.
        OSError: the directory cannot be written. A later call can resume.
    """
    name = flags.source[0]
    if name == "fineweb-10b-tokenized" and _is_named(name):
        return _download(flags, out)
    source = _open_source(flags, out)
    settings = {
        "source": source.identity,
        "tokenizer": flags.tokenizer,
        "val_fraction": source.val_fraction,
        "shard_tokens": flags.shard_tokens,
        "limit": flags.limit,
    }
    end_of_text = end_of_text_token(flags.tokenizer)
    assert end_of_text is not None
    with ShardWriter(out, settings, flags.shard_tokens, end_of_text) as writer:
        if not writer.finished:
            options = TokenizeOptions(flags.tokenizer, flags.field, source.val_fraction, flags.on_error == "skip")
            write_tokens(source, writer, options, flags.limit, flags.workers)
        if not writer.tokens():
            writer.discard()
            raise UserError(f"{' '.join(flags.source)}: no document has any text; {writer.skipped} were skipped")
        return writer.finish()


def _open_source(flags: Flags, out: Path) -> Source:
    skip_errors = flags.on_error == "skip"
    name = flags.source[0]
    if name in DATASETS and _is_named(name):
        saved = saved_settings(out).get("source", {})
        revision = saved.get("revision") if saved.get("dataset") == DATASETS[name].repository else None
        return HubSource(name, flags.field, flags.val_fraction, revision)
    if name == "shakespeare" and _is_named(name):
        path = str(download_shakespeare(out))
        source = FileSource([path], flags.field, flags.val_fraction, flags.tokenizer, skip_errors)
        source.identity["files"] = [name]
        return source
    return FileSource(flags.source, flags.field, flags.val_fraction, flags.tokenizer, skip_errors, out)


def _is_named(source: str) -> bool:
    """True if a source is one of the names and not an existing file."""
    return source in {*NAMES, *DATASETS} and not Path(source).is_file()


def _download(flags: Flags, out: Path) -> Manifest:
    changed = {
        "tokenizer": flags.tokenizer != "gpt2",
        "val-fraction": flags.val_fraction is not None,
        "shard-tokens": flags.shard_tokens != Flags.shard_tokens,
        "field": flags.field != Flags.field,
    }
    for name, is_changed in changed.items():
        if is_changed:
            raise UserError(f"--{name} is for text, but {flags.source[0]} is already tokenized and split; remove it")
    with Display(0, 0, "downloading") as display:
        manifest = download_tokenized(out, flags.limit, display.print)
    replace_text(out / MANIFEST, manifest.to_json())
    return manifest


def _print_summary(flags: Flags, out: Path, manifest: Manifest) -> None:
    """Prints the numbers of tokens and documents, and the command that trains on them."""
    (train, train_documents), (val, val_documents) = manifest.count("train"), manifest.count("val")
    tokens, size, name = train + val, manifest.text_bytes, strip_controls(str(out))
    print(
        f"{'wrote':10}{name}: {train:,} training tokens ({count(train_documents, 'document')}), {val:,} validation "
        f"tokens ({count(val_documents, 'document')}), in {count(len(manifest.shards), 'file')}"
    )
    if size and not flags.limit:
        print(f"{'':10}{size:,} bytes of text, {size / tokens:.2f} per token")
    if manifest.skipped:
        print(f"{'skipped':10}{count(manifest.skipped, 'document')}")
    if not val:
        print(f"{'':10}no validation tokens: --val-fraction held out no document; training needs some from elsewhere")
    first = {split: next((s.file for s in manifest.shards if f"{split}_" in s.file), "") for split in SPLITS}
    globs = {
        split: shlex.quote(f"{glob.escape(name)}/{file.rsplit('_', 1)[0]}_*.bin") if file else "FILES"
        for split, file in first.items()
    }
    config = "gpt2-124m" if flags.tokenizer == "gpt2" else "quickstart --data.text ''"
    print(
        f"{'next':10}python -m gpt2_jax.train --config {config} --data.train {globs['train']} --data.val {globs['val']}"
    )


def command() -> None:
    """Entry point of `gpt2-prepare`."""
    run_command(main)


if __name__ == "__main__":
    command()
