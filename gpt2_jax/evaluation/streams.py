"""Texts scored as one stream in overlapping windows: Penn Treebank, enwik8 and text8."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt2_jax.data.tokenizer import Tokenizer, boundaries
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.examples import whole_text
from gpt2_jax.evaluation.metrics import Metric
from gpt2_jax.evaluation.requests import Request, Score, sliding_windows
from gpt2_jax.evaluation.task import Prepared, Setting, Task, nats

LARGEST_TAIL = 5_000_000  # bytes: the usual test split of enwik8 and text8
WHOLE = 100_000_000


def sliding(
    name: str, text: str, setting: Setting, *, n_words: int | None = None, bits_name: str = "bits_per_byte"
) -> Prepared:
    """Prepares a text as one stream in sliding windows, which are the examples of its metrics.

    Without an end-of-text token the first token is not predicted.

    Args:
        name: of the task.
        text: what is scored.
        setting: has the stride and the limit of windows.
        n_words: how many words the original text has. Each token counts as the same share of them. None gives a metric
            in bits instead.
        bits_name: the name of this metric. It counts the bytes of the scored tokens.

    Raises:
        UserError: the text cannot be encoded, or the stride is out of range.
    """
    all_tokens = setting.encode(name, text, name)
    tokens, start = all_tokens, setting.end_of_text
    if start is None:
        tokens, start = all_tokens[1:], int(all_tokens[0])
    requests = list(itertools.islice(sliding_windows(tokens, start, setting.block_size, setting.step), setting.limit))
    if not requests:
        raise UserError(f"{name} has a text of {len(all_tokens)} tokens, of which none is predicted; give a longer one")
    sizes = np.array([len(request.continuations[0]) for request in requests], np.float64)
    if n_words is None:
        n_bytes = window_bytes(setting.need_tokenizer(name), requests)

    def metrics(scores: Sequence[Sequence[Score]]) -> list[Metric]:
        sums = np.array([nats(row) for row in scores])
        token_perplexity = Metric("token_perplexity", sums, sizes, "perplexity")
        if n_words is None:
            return [Metric(bits_name, sums, n_bytes, "bits"), token_perplexity]
        return [Metric("word_perplexity", sums, sizes * n_words / len(tokens), "perplexity"), token_perplexity]

    return Prepared(requests, [f"window {number + 1}" for number in range(len(requests))], metrics)


def window_bytes(tokenizer: Tokenizer, windows: Sequence[Request]) -> np.ndarray:
    """The bytes of text that the predicted tokens of each window stand for, int64 [windows].

    The tokens around a text, such as end-of-text, stand for none.
    """
    parts = [np.asarray(window.continuations[0]) for window in windows]
    tokens = np.concatenate(parts)
    around = boundaries(tokenizer)
    special = {around.start, around.pad, *around.ends}
    sizes = np.zeros(int(tokens.max()) + 1, np.int64)
    for token in np.flatnonzero(np.bincount(tokens)).tolist():
        sizes[token] = 0 if token in special else len(tokenizer.decode_bytes([token]))
    starts = np.cumsum([0, *map(len, parts[:-1])])
    return np.add.reduceat(sizes[tokens], starts)


class PennTreebank(Task[str]):
    """Mikolov's preparation of the Penn Treebank (Mikolov et al., 2010): lower case, `<unk>` and N for numbers."""

    name = "ptb"
    protocol = (
        "Mikolov's ptb.test.txt with contractions, possessives, $ and % joined again, as one text, sliding windows of "
        "{block_size} tokens that predict {stride}; per raw word, an end of line counted as a word; standard errors "
        "over windows"
    )
    metric_names = ("word_perplexity", "token_perplexity")
    files = ("ptb.test.txt", "simple-examples/data/ptb.test.txt")
    limits_windows = True

    def read(self, path: Path) -> Iterator[str]:
        """See `Task.read`."""
        yield whole_text(path)

    def prepare(self, examples: Sequence[str], setting: Setting) -> Prepared:
        """See `Task.prepare`."""
        (text,) = examples
        lines = text.removesuffix("\n").split("\n")
        n_words = sum(len(line.split()) + 1 for line in lines)
        return sliding(self.name, "".join(detokenize_ptb(line) + "\n" for line in lines), setting, n_words=n_words)


# What a rule can undo without a guess. `<unk>`, N, lower case and missing punctuation stay.
_PTB = (
    (re.compile(r" (n't|'(?:s|re|ve|ll|d|m))(?![^ ])"), r"\1"),
    (re.compile(r"s '(?![^ ])"), "s'"),
    (re.compile(r"(?<![^ ])\$ (?=[N\d])"), "$"),
    (re.compile(r"(?<=[N\d]) %(?![^ ])"), "%"),
)


def detokenize_ptb(line: str) -> str:
    """Joins what the Penn Treebank separates: "did n't", "company 's", "workers '", "$ N" and "N %"."""
    line = line.strip()
    for pattern, replacement in _PTB:
        line = pattern.sub(replacement, line)
    return line


class Compression(Task[str]):
    """The last 5 MB of a file of 100 MB in bits (Mahoney, Large Text Compression Benchmark): enwik8 and text8."""

    limits_windows = True

    def __init__(self, name: str, unit: str, whole: int = WHOLE, tail: int = LARGEST_TAIL) -> None:
        self.name = name
        self.files = (name,)
        self.protocol = (
            f"the last {tail:,} bytes of {name} as one text, sliding windows of {{block_size}} tokens that predict "
            f"{{stride}}; bits per {unit}; standard errors over windows"
        )
        self.metric_names = (f"bits_per_{unit}", "token_perplexity")
        self._unit, self._whole, self._tail = unit, whole, tail

    def read(self, path: Path) -> Iterator[str]:
        """See `Task.read`. A character that the cut goes through is left out."""
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size not in (self._whole, self._tail):
                raise UserError(
                    f"{path} has {size:,} bytes; expected the {self._whole:,} of {self.name}, or its last "
                    f"{self._tail:,}"
                )
            file.seek(size - self._tail)
            data = file.read()
        inside = next((at for at, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 4)
        try:
            yield data[inside:].decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                place = size - self._tail + inside + error.start
                raise UserError(f"{path} is not UTF-8 text (byte {place}); copy it again") from error
            yield data[inside : inside + error.start].decode("utf-8")

    def prepare(self, examples: Sequence[str], setting: Setting) -> Prepared:
        """See `Task.prepare`."""
        (text,) = examples
        return sliding(self.name, text, setting, bits_name=f"bits_per_{self._unit}")
