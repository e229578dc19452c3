"""The harness's own command with our models.

python -m gpt2_jax.evaluation.lm_eval --model gpt2_jax --model_args pretrained=MODEL --tasks TASK,...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gpt2_jax.cli import run_command
from gpt2_jax.errors import import_optional
from gpt2_jax.evaluation.tasks import HARNESS


def main(args: Sequence[str]) -> int:
    """Runs lm-eval's command with the model `gpt2_jax` added, and returns its exit code."""
    import_optional("lm_eval", f"a task {HARNESS}TASK", "lm-eval")
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *args]
    cli_evaluate()
    return 0


if __name__ == "__main__":
    run_command(main)
