"""WikiText (Merity et al., 2016): perplexity and bits per byte, page by page as lm-eval or as one stream."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.data.encode import utf8
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.examples import HubDataset, RowTask, is_json_lines, text_field, whole_text
from gpt2_jax.evaluation.metrics import Metric
from gpt2_jax.evaluation.requests import Request, Score, disjoint_windows
from gpt2_jax.evaluation.streams import sliding
from gpt2_jax.evaluation.task import Prepared, Setting, nats

# As lm-eval's `wikitext_detokenizer` in tasks/wikitext/preprocess_wikitext.py, in the same order. The second one, which
# replaces by the text of a pattern, and " N ", which is PTB's, are a part of the protocol too.
_REPLACEMENTS: tuple[tuple[str | re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (re.compile(r"\(\s*([^)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize(page: str) -> str:
    """Undoes the tokenization of WikiText, as lm-eval does."""
    for pattern, replacement in _REPLACEMENTS:
        page = page.replace(pattern, replacement) if isinstance(pattern, str) else pattern.sub(replacement, page)
    return page


def split_pages(text: str) -> Iterator[str]:
    """Splits a wiki.*.raw or wiki.*.tokens into pages, as the dataset EleutherAI/wikitext_document_level.

    A page begins at a line ` = Title = ` with a single `=` on each side. Joined by line feeds, the pages are the text,
    except for blank lines before the first title.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if any(map(str.strip, lines)):
                yield "\n".join(lines)
            lines = []
        lines.append(line)
    yield "\n".join(lines)


class Pages(RowTask[str]):
    """WikiText page by page. The examples are the raw pages."""

    protocol = (
        "lm-eval wikitext: detokenized pages, each in disjoint windows of {block_size} tokens after end-of-text; per "
        "word and byte of the raw pages"
    )
    metric_names: tuple[str, ...] = ("word_perplexity", "byte_perplexity", "bits_per_byte")

    def __init__(self, name: str, folder: str) -> None:
        self.name = name
        self.files = (f"{folder}-raw/wiki.test.raw", f"{folder}-raw-v1/wiki.test.raw", "wiki.test.raw")
        self.other_files = (f"{folder}/wiki.test.tokens", "wiki.test.tokens")
        self.hub = HubDataset("EleutherAI/wikitext_document_level", f"{folder}-raw-v1", "test")

    def read(self, path: Path) -> Iterator[str]:
        """See `Task.read`. The file is one of the dataset's, or has a JSON object with a `page` in each line."""
        yield from super().read(path) if is_json_lines(path) else split_pages(whole_text(path))

    def from_row(self, row: dict[str, Any], where: str) -> str:
        """See `RowTask.from_row`."""
        return text_field(row, "page", where)

    def prepare(self, examples: Sequence[str], setting: Setting) -> Prepared:
        """See `Task.prepare`."""
        start = setting.need_end_of_text(self.name)
        requests: list[Request] = []
        page_of: list[int] = []
        for number, page in enumerate(examples):
            tokens = setting.encode(self.name, detokenize(page), f"{self.name}, page {number + 1}")
            windows = list(disjoint_windows(tokens, start, setting.block_size))
            requests += windows
            page_of += [number] * len(windows)
        if not requests:
            raise UserError(f"{self.name}: the pages have no text; copy their file again")
        n_words = np.array([len(re.split(r"\s+", page)) for page in examples])
        n_bytes = np.array([len(utf8(page)) for page in examples])

        def metrics(scores: Sequence[Sequence[Score]]) -> list[Metric]:
            sums = np.bincount(np.array(page_of, int), [nats(row) for row in scores], len(examples))
            return [
                Metric("word_perplexity", sums, n_words, "perplexity"),
                Metric("byte_perplexity", sums, n_bytes, "perplexity"),
                Metric("bits_per_byte", sums, n_bytes, "bits"),
            ]

        return Prepared(requests, [f"page {number + 1}" for number in page_of], metrics)


class SlidingPages(Pages):
    """WikiText as one stream."""

    protocol = (
        "detokenized pages as one text, sliding windows of {block_size} tokens that predict {stride}; per token and "
        "per word between white space of the raw text; standard errors over windows"
    )
    metric_names = ("word_perplexity", "token_perplexity")
    limits_windows = True

    def prepare(self, examples: Sequence[str], setting: Setting) -> Prepared:
        """See `Task.prepare`."""
        text = "\n".join(map(detokenize, examples))
        return sliding(self.name, text, setting, n_words=sum(len(page.split()) for page in examples))
