"""Shows runs in one file, or says where two part: `python -m gpt2_jax.report RUN [RUN ...] --out report.html`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from gpt2_jax.cli import run_command, warn
from gpt2_jax.config import TrackerName
from gpt2_jax.config.flags import parse_flags
from gpt2_jax.errors import UserError, strip_controls
from gpt2_jax.files import replace_text, user_path
from gpt2_jax.reports.compare import compare
from gpt2_jax.reports.following import send_all
from gpt2_jax.reports.markdown import write_markdown
from gpt2_jax.reports.page import write_page
from gpt2_jax.reports.picture import write_picture
from gpt2_jax.reports.records import read_runs
from gpt2_jax.reports.trackers import import_trackers

PROG = "python -m gpt2_jax.report"
DESCRIPTION = """Show runs in one file that needs no network: losses, evaluations, samples, where the time went,
configs and their differences. It reads run directories, also of runs that still train."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[RUN ...]")] = ()
    """Run directories."""
    out: str = ""
    """HTML file to write. Default: report.html, if no other file is asked for."""
    md: str = ""
    """Markdown file to write."""
    png: str = ""
    """Picture of the losses to write."""
    to: tuple[TrackerName, ...] = ()
    """Trackers that get all rows of the runs: tensorboard, wandb, trackio."""
    compare: tuple[str, str] | None = None
    """Two run directories. The command says from which update on they differ, and writes nothing."""


def main(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    flags = parse_flags(Flags, args, prog=PROG, description=DESCRIPTION)
    if flags.compare:
        if flags.runs or flags.out or flags.md or flags.png or flags.to:
            raise UserError("--compare takes two runs, and writes no file; leave out what else was given")
        for line in compare(*(user_path(name, "--compare") for name in flags.compare)):
            print(strip_controls(line))
        return 0
    if not flags.runs:
        raise UserError(f"no run was given; type {PROG} RUN [RUN ...] --out report.html, or --compare A B")
    runs = read_runs([user_path(name, "RUN") for name in flags.runs])
    import_trackers(flags.to)
    default = "" if flags.md or flags.png or flags.to else "report.html"
    for name, flag, write in (
        (flags.out or default, "--out", lambda path: replace_text(path, write_page(runs))),
        (flags.md, "--md", lambda path: replace_text(path, write_markdown(runs))),
        (flags.png, "--png", lambda path: write_picture(runs, path)),
    ):
        if name:
            _write(user_path(name, flag), flag, write)
    failures = [line for run in runs for name in flags.to if (line := send_all(run.path, name, run.config))]
    for line in failures:
        warn(f"error: {line}")
    return 1 if failures else 0


def _write(path: Path, flag: str, write: Callable[[Path], None]) -> None:
    """Writes a file, and says so.

    Raises:
        UserError: it cannot be written.
    """
    if not path.name:
        raise UserError(f"{flag} {path} is a directory; give a file")
    try:
        write(path)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror}); give another {flag}") from error
    print(strip_controls(f"wrote     {path}"))


def command() -> None:
    """Entry point of `gpt2-report`."""
    run_command(main)


if __name__ == "__main__":
    command()
