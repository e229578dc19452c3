"""Turns text into token files: `python -m gpt2_jax.prepare SOURCE --out DIR`."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gpt2_jax.cli import run_command
from gpt2_jax.config.flags import parse_flags
from gpt2_jax.data.encode import uses_gigatoken
from gpt2_jax.data.hub import DATASETS, TOKENIZED, Hub, download_shakespeare, download_tokenized
from gpt2_jax.data.prepared import MANIFEST, Manifest, ShardWriter, Side, written_settings
from gpt2_jax.data.sources import Files, Source
from gpt2_jax.data.tokenizer import end_of_text_token
from gpt2_jax.data.workers import Settings, tokenize_all
from gpt2_jax.display import Display, count, duration, si
from gpt2_jax.errors import UserError
from gpt2_jax.files import exclusive, replace_text

PROG = "python -m gpt2_jax.prepare"
SECONDS_BETWEEN_MARKS = 2.0
MOST_SHARD_TOKENS = 2**31 - 1  # the count in a header is an int32

NAMES = {name: f"{dataset.about} ({dataset.repository})" for name, dataset in DATASETS.items()} | {
    "fineweb-10b-tokenized": f"the same as tokens already, 20 GB, whole files up to --limit ({TOKENIZED})",
    "shakespeare": "1.1 MB, as in nanoGPT",
    "stdlib": "the standard library of this Python: nothing to download",
}
SOURCES = "\n".join(f"  {name:23}{about}" for name, about in NAMES.items())
DESCRIPTION = f"""Turn text into token files.

SOURCE is one of these names:
{SOURCES}

or files and globs: text (a file is a document), JSON lines (.jsonl), both also as .gz and .zst, and .parquet.
The same command goes on where it was stopped."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command."""

    source: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE [SOURCE ...]")]
    """A name from the list above, or files and globs."""
    out: str
    """Directory of the token files."""
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    """How text becomes tokens."""
    val_fraction: float | None = None
    """Share of the documents (of a single text: its end) that is held out; of files 0.1, of names what is usual."""
    shard_tokens: int = 100_000_000
    """Tokens in a file."""
    workers: int = 0
    """Processes that tokenize; 0 for one per core."""
    limit: int = 0
    """Stop after this many tokens; 0 for all."""
    field: str = "text"
    """Field of JSON lines, column of Parquet."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a document that is damaged."""


def main(args: Sequence[str]) -> int:
    """The command; returns its exit code."""
    flags = parse_flags(Flags, args, prog=PROG, description=DESCRIPTION)
    if not flags.source:
        raise UserError(f"no SOURCE; give files, or one of {', '.join(NAMES)}")
    named = [name for name in flags.source if _is_named(name)]
    if named and len(flags.source) > 1:
        raise UserError(f"{named[0]} is a source by itself; prepare the others into directories of their own")
    if flags.val_fraction is not None and not 0 <= flags.val_fraction < 1:
        raise UserError(f"--val-fraction {flags.val_fraction}; expected 0 or more and below 1")
    if not 1 <= flags.shard_tokens <= MOST_SHARD_TOKENS:
        raise UserError(f"--shard-tokens {flags.shard_tokens}; expected 1 to {MOST_SHARD_TOKENS}")
    for name, value in (("workers", flags.workers), ("limit", flags.limit)):
        if value < 0:
            raise UserError(f"--{name} {value}; expected 0 or more")
    out = Path(flags.out).expanduser()
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out, "preparing"):
            manifest = prepare(flags, out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror}; make room, or give another --out (the same command goes on)"
        ) from error
    finally:
        if new:
            with contextlib.suppress(OSError):
                out.rmdir()  # if nothing is in it
    _report(flags, out, manifest)
    return 0


def prepare(flags: Flags, out: Path) -> Manifest:
    """Writes the token files of a source into a directory, from where it was stopped before.

    Raises:
        UserError: the source cannot be read, or the directory is not its own.
        OSError: the directory cannot be written; what is in it stays usable.
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
    end = end_of_text_token(flags.tokenizer)
    assert end is not None
    with ShardWriter(out, settings, flags.shard_tokens, end) as writer:
        if not writer.finished:
            _write(flags, source, writer)
        if not writer.tokens():
            writer.discard()
            raise UserError(f"{' '.join(flags.source)}: no document has any text; {writer.skipped} were skipped")
        return writer.finish()


def _open_source(flags: Flags, out: Path) -> Source:
    skip = flags.on_error == "skip"
    name = flags.source[0]
    if name in DATASETS and _is_named(name):
        before = written_settings(out).get("source", {})
        same = before.get("dataset") == DATASETS[name].repository
        return Hub(name, flags.field, flags.val_fraction, before.get("revision") if same else None)
    if name == "shakespeare" and _is_named(name):
        path = str(download_shakespeare(out))
        source = Files([path], flags.field, flags.val_fraction, flags.tokenizer, skip)
        source.identity["files"] = [name]
        return source
    return Files(flags.source, flags.field, flags.val_fraction, flags.tokenizer, skip, out)


def _is_named(source: str) -> bool:
    """Whether a source is one of the names, and no file of the user's."""
    return source in {*NAMES, *DATASETS} and not Path(source).is_file()


def _write(flags: Flags, source: Source, writer: ShardWriter) -> None:
    """Tokenizes what the directory does not have yet; the last mark stands, whatever happens."""
    settings = Settings(flags.tokenizer, flags.field, source.val_fraction, flags.on_error == "skip")
    workers = flags.workers or _cores()
    cursor = writer.cursor
    writer.mark(cursor)
    meter = _Meter(writer, source.total, flags.limit)
    engine = " (gigatoken)" if uses_gigatoken(flags.tokenizer) else ""
    with meter.display as display:
        display.say(f"{'tokenizer':10}{flags.tokenizer}{engine}, {count(workers, 'worker')}")
        if cursor is not None:
            display.say(f"continues after {writer.tokens():,} tokens")
        marked = time.perf_counter()
        try:
            for block, tokenized in tokenize_all(source.blocks(cursor), settings, workers):
                sides: list[tuple[Side, Any]] = [("train", tokenized.train), ("val", tokenized.val)]
                for side, tokens in sides:
                    writer.append(side, tokens[: flags.limit - writer.tokens()] if flags.limit else tokens)
                writer.text_bytes += tokenized.text_bytes
                writer.skipped += tokenized.skipped
                cursor = block.cursor
                meter.show(block.read)
                if flags.limit and writer.tokens() == flags.limit:
                    break
                if time.perf_counter() - marked > SECONDS_BETWEEN_MARKS:
                    writer.mark(cursor)
                    marked = time.perf_counter()
        except UserError:  # of the source or a worker: between two blocks; after all else the last mark stands
            if writer.tokens():
                writer.mark(cursor)
            else:
                writer.discard()
            raise


def _cores() -> int:
    """Cores that this process may use; macOS does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Meter:
    """Documents, tokens, speed and time left, since this process started.

    Args:
        total: of the source, in its units.
        limit: tokens to stop after, 0 for none.
    """

    def __init__(self, writer: ShardWriter, total: int, limit: int) -> None:
        self.display = Display(0, 1 if total or limit else 0, "starting", counts=False)
        self._writer, self._total, self._limit = writer, total, limit
        self._start, self._bytes = time.perf_counter(), writer.text_bytes
        self._first: float | None = None

    def show(self, read: int) -> None:
        """After a block that is the source up to `read`."""
        seconds = time.perf_counter() - self._start
        tokens, text_bytes = self._writer.tokens(), self._writer.text_bytes
        shares = [read / self._total] if self._total else []
        shares += [tokens / self._limit] if self._limit else []
        share = max(shares, default=0.0)
        parts = [
            count(self._writer.documents(), "document"),
            f"{si(tokens)} tokens",
            f"{(text_bytes - self._bytes) / seconds / 1e6:.1f} MB/s",
        ]
        if self._first is None:
            self._first = share
        elif share > self._first:
            parts.append(f"{duration(seconds * (1 - share) / (share - self._first))} left")
        self.display.show(share, f"{share:.0%}" if shares else "so far", parts)


def _download(flags: Flags, out: Path) -> Manifest:
    others = {"tokenizer": flags.tokenizer != "gpt2", "val-fraction": flags.val_fraction is not None}
    others |= {"shard-tokens": flags.shard_tokens != Flags.shard_tokens, "field": flags.field != Flags.field}
    for name, given in others.items():
        if given:
            raise UserError(f"--{name} is for text; fineweb-10b-tokenized comes with GPT-2's tokens and its own split")
    with Display(0, 0, "downloading") as display:
        manifest = download_tokenized(out, flags.limit, display.say)
    replace_text(out / MANIFEST, manifest.to_json())
    return manifest


def _report(flags: Flags, out: Path, manifest: Manifest) -> None:
    (train, train_documents), (val, val_documents) = manifest.count("train"), manifest.count("val")
    tokens, size = train + val, manifest.text_bytes
    print(
        f"{'wrote':10}{out}: {train:,} training tokens ({count(train_documents, 'document')}), {val:,} validation "
        f"tokens ({count(val_documents, 'document')}), in {count(len(manifest.shards), 'file')}"
    )
    if size and not flags.limit:
        print(f"{'':10}{size:,} bytes of text, {size / tokens:.2f} per token")
    if manifest.skipped:
        print(f"{'skipped':10}{count(manifest.skipped, 'document')}")
    if not val:
        print(f"{'':10}no validation tokens: no document fell to --val-fraction; training needs some from elsewhere")
    first = {side: next((s.file for s in manifest.shards if f"{side}_" in s.file), "") for side in ("train", "val")}
    globs = {
        side: shlex.quote(f"{glob.escape(str(out))}/{file.rsplit('_', 1)[0]}_*.bin") if file else "FILES"
        for side, file in first.items()
    }
    config = "gpt2-124m" if flags.tokenizer == "gpt2" else "quickstart --data.text ''"
    print(
        f"{'next':10}python -m gpt2_jax.train --config {config} --data.train {globs['train']} --data.val {globs['val']}"
    )


if __name__ == "__main__":
    run_command(main)
