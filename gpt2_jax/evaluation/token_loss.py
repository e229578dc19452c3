"""The loss on files of tokens or text, in nats per token, as perplexity and in bits per byte."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt2_jax.data.shards import open_tokens
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.examples import MAX_TEXT_BYTES
from gpt2_jax.evaluation.metrics import Metric
from gpt2_jax.evaluation.requests import Request, Score, disjoint_windows
from gpt2_jax.evaluation.streams import window_bytes
from gpt2_jax.evaluation.task import Prepared, Setting, Task, nats
from gpt2_jax.parsing import read_text

TOKEN_FILES = (".bin", ".npy")


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """The content of a file: text, or a view of its tokens, integers [tokens]."""

    name: str
    content: str | np.ndarray


class TokenLoss(Task[Document]):
    """The loss on any files. They are scored one after the other; the examples of the metrics are the windows."""

    name = "loss"
    protocol = (
        "each file in disjoint windows of {block_size} tokens; a text after end-of-text, token files after their first "
        "token, which is not predicted; standard errors over windows"
    )
    metric_names = ("loss", "perplexity", "bits_per_byte")
    files = ()
    limits_windows = True

    def read(self, path: Path) -> Iterator[Document]:
        """See `Task.read`. A name that ends with .bin or .npy is that of a token file."""
        if path.suffix in TOKEN_FILES:
            yield Document(str(path), open_tokens(path)[:])
            return
        try:
            yield Document(str(path), read_text(path, MAX_TEXT_BYTES))
        except ValueError as error:
            raise UserError(f"{path} cannot be read: {error}; give UTF-8 text, or a .bin or .npy of tokens") from error

    def prepare(self, examples: Sequence[Document], setting: Setting) -> Prepared:
        """See `Task.prepare`."""
        requests: list[Request] = []
        origins: list[str] = []
        for document in examples:
            content, start = document.content, None
            if isinstance(content, str):
                tokens, start = setting.encode(self.name, content, document.name), setting.end_of_text
            else:
                tokens = content
            if start is None and len(tokens):
                tokens, start = tokens[1:], int(tokens[0])
            left = None if setting.limit is None else setting.limit - len(requests)
            windows = list(itertools.islice(disjoint_windows(tokens, start or 0, setting.block_size), left))
            requests += windows
            origins += [f"{document.name}, window {number + 1}" for number in range(len(windows))]
        if not requests:
            names = ", ".join(document.name for document in examples[:3])
            raise UserError(f"{names}: no token to predict; give files with at least two tokens")
        sizes = np.array([len(request.continuations[0]) for request in requests])
        n_bytes = self._bytes(requests, setting)

        def metrics(scores: Sequence[Sequence[Score]]) -> list[Metric]:
            sums = np.array([nats(row) for row in scores])
            found = [Metric("loss", sums, sizes), Metric("perplexity", sums, sizes, "perplexity")]
            return found if n_bytes is None else [*found, Metric("bits_per_byte", sums, n_bytes, "bits")]

        return Prepared(requests, origins, metrics)

    @staticmethod
    def _bytes(requests: Sequence[Request], setting: Setting) -> np.ndarray | None:
        """The bytes of text in each window; None if they are not known, as the tokenizer is not that of the tokens."""
        tokenizer = setting.tokenizer
        if tokenizer is None or max(int(np.max(request.continuations[0])) for request in requests) >= tokenizer.n_vocab:
            return None
        n_bytes = window_bytes(tokenizer, requests)
        return n_bytes if n_bytes.sum() else None
