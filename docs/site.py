"""The page of every key, which `python docs/site.py` writes, and what mkdocs changes in the pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any, get_type_hints

from gpt2_jax.config import TrainConfig
from gpt2_jax.config.help import keys_of, kind_of

CONFIGURATION = Path(__file__).with_name("configuration.md")
PAGES = {
    "model": "training.md#memory",
    "data": "data.md",
    "optimizer": "training.md#outliers",
    "mesh": "training.md#devices",
    "checkpoint": "training.md#checkpoints",
    "eval": "training.md#evaluation",
    "log": "training.md#look-at-a-run",
}
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)]+)\)")


def on_page_markdown(markdown: str, config: Any, **kwargs: Any) -> str:
    """What GitHub reads in another way.

    Links to files outside of docs/ lead to the repository, or are text as long as `repo_url` is not set. A fence names
    its language only: a second word there keeps a test from running the block.
    """

    def replace(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        return f"[{text}]({config.repo_url}/blob/main/{target[3:]})" if config.repo_url and not image else text

    return OUTSIDE.sub(replace, re.sub(r"^(```\w+) .*$", r"\1", markdown, flags=re.MULTILINE))


def configuration() -> str:
    """The page of every key, from the dataclasses in gpt2_jax/config/__init__.py."""
    return "\n".join(_configuration()) + "\n"


def _configuration() -> Iterator[str]:
    yield "# Every key"
    yield ""
    yield "<!-- python docs/site.py writes this page -->"
    yield ""
    yield "A config is a TOML file with these keys. Each is a flag of `gpt2_jax.train` too: `--section.key VALUE`."
    yield "In the terminal, `--config NAME --help SECTION` shows them. The `config.toml` of a run has all of them."
    sections = {"": TrainConfig.__doc__, **{name: kind.__doc__ for name, kind in get_type_hints(TrainConfig).items()}}
    section = None
    for name, key in keys_of(TrainConfig):
        if (of := name.rpartition(".")[0]) != section:
            section = of
            more = f" [More]({PAGES[of]})." if of else ""
            yield from ("", f"## {of or 'The run'}", "", f"{' '.join((sections[of] or '').split())}{more}", "")
            yield from ("| key | value | default | meaning |", "| --- | --- | --- | --- |")
        default = "" if key.default is MISSING else f"`{json.dumps(key.default).replace('()', '[]')}`"
        meaning = " ".join(key.text.split()).replace("|", "\\|")
        yield f"| `{name}` | {kind_of(key.hint)} | {default} | {meaning} |"


if __name__ == "__main__":
    CONFIGURATION.write_text(configuration(), encoding="utf-8", newline="\n")
