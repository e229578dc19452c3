"""The tasks by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.cbt import ChildrensBooks
from gpt2_jax.evaluation.hellaswag import HellaSwag, HellaSwagCompletion
from gpt2_jax.evaluation.lambada import Lambada
from gpt2_jax.evaluation.streams import Compression, PennTreebank
from gpt2_jax.evaluation.task import Task
from gpt2_jax.evaluation.token_loss import TokenLoss
from gpt2_jax.evaluation.wikitext import Pages, SlidingPages

_ALL: tuple[Task[Any], ...] = (
    HellaSwag(),
    HellaSwagCompletion(),
    Lambada(),
    Pages("wikitext2", "wikitext-2"),
    Pages("wikitext103", "wikitext-103"),
    SlidingPages("wikitext2-sliding", "wikitext-2"),
    SlidingPages("wikitext103-sliding", "wikitext-103"),
    PennTreebank(),
    Compression("enwik8", "byte"),
    Compression("text8", "character"),
    ChildrensBooks("cbt-cn", "CN"),
    ChildrensBooks("cbt-ne", "NE"),
    TokenLoss(),
)

HARNESS = "lm-eval:"  # precedes the name of a task of EleutherAI's harness

TASKS = {task.name: task for task in _ALL}


def find_tasks(names: str | Sequence[str]) -> list[Task[Any]]:
    """The tasks of a list of names, or of names with commas between them; each once.

    Raises:
        UserError: there is no such task, or none is named.
    """
    parts = names.split(",") if isinstance(names, str) else names
    wanted = list(dict.fromkeys(name.strip() for name in parts if name.strip()))
    known = ", ".join(TASKS)
    if not wanted:
        raise UserError(f"no task is named; type some of {known}")
    for name in wanted:
        if name not in TASKS:
            raise UserError(f"there is no task {name!r}; the tasks are {known}")
    return [TASKS[name] for name in wanted]
