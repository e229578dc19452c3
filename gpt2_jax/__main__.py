"""Lists the commands: `python -m gpt2_jax`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from gpt2_jax.cli import run_command
from gpt2_jax.errors import UserError

COMMANDS = {
    "train": "train a GPT-2, resume a run, or fine-tune a model",
    "generate": "continue a text",
    "evaluate": "HellaSwag, LAMBADA, WikiText and other tasks; compare models",
    "convert": "export a model to another format, or import one",
    "prepare": "write token files from text, or download them",
    "data": "show and check token files, or show the sequences of an update",
    "plan": "memory, time and collectives of a config on chips that need not be here",
    "report": "pages and plots about runs, and where two of them part",
}


def main(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if args and args[0] in COMMANDS:
        raise UserError(f"a command follows a dot; type python -m gpt2_jax.{shlex.join(args)}")
    if args and args[0] not in ("--help", "-h"):
        raise UserError(f"{args[0]!r} is not a command; they are {', '.join(COMMANDS)}; type python -m gpt2_jax")
    print("GPT-2 in JAX and Flax. The commands:\n")
    for name, text in COMMANDS.items():
        print(f"  python -m gpt2_jax.{name:10}{text}")
    print("\nEach explains its flags with --help. To begin, type python -m gpt2_jax.train --config quickstart")
    return 0


if __name__ == "__main__":
    run_command(main)
