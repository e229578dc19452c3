"""What a task asks of a model: the log-probabilities of continuations. Texts and documents become requests here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gpt2_jax.data.encode import encode_prompt
from gpt2_jax.data.tokenizer import Tokenizer

Tokens = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A context and its continuations, each of which follows the context directly.

    Attributes:
        context: at least one token. If it leaves no room for a continuation within `block_size`, its first tokens are
            cut, for that continuation only. A continuation is never cut.
        continuations: their tokens. An empty one has the log-probability 0.
    """

    context: Tokens
    continuations: tuple[Tokens, ...]


class Score(NamedTuple):
    """The score of one continuation."""

    log_probs: np.ndarray  # float32 [tokens], nats
    greedy: np.ndarray  # bool [tokens]: no token is more probable

    @property
    def total(self) -> float:
        """The log-probability of the continuation in nats, summed in float64."""
        return float(self.log_probs.sum(dtype=np.float64))


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, name: str = "the text"
) -> tuple[list[int], list[int]]:
    """Encodes a context and what follows it as one text, and splits the tokens as lm-eval does.

    The spaces at the end of the context count as part of the continuation, since GPT-2's tokens begin with a space.
    The context has the tokens that it has alone, and the continuation those of the whole text after as many. Where a
    token reaches across the border, the two together are not the tokens of the whole text.

    Raises:
        UserError: the tokenizer cannot encode them. `name` names the text.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    alone = encode_prompt(tokenizer, context, name)
    return alone, encode_prompt(tokenizer, context + continuation, name)[len(alone) :]


def disjoint_windows(tokens: Tokens, prefix: int, block_size: int) -> Iterator[Request]:
    """Cuts a document into windows that predict each token once, as lm-eval's `loglikelihood_rolling`.

    The first window begins with `prefix`. Each next one begins with the last token of the window before. The last
    window reaches back as far as the model sees.
    """
    for start in range(0, len(tokens), block_size):
        end = min(start + block_size, len(tokens))
        yield _window(tokens, prefix, max(end - block_size, 0) if start else 0, start, end)


def sliding_windows(tokens: Tokens, prefix: int, block_size: int, stride: int) -> Iterator[Request]:
    """Cuts a document into windows that overlap: after the first, each predicts `stride` tokens.

    All but the first `block_size` tokens are predicted from at least `block_size - stride + 1` tokens before them.
    """
    start = 0
    while start < len(tokens):
        end = min(start + (stride if start else block_size), len(tokens))
        yield _window(tokens, prefix, max(end - block_size, 0), start, end)
        start = end


def _window(tokens: Tokens, prefix: int, first: int, start: int, end: int) -> Request:
    """Predicts the tokens from `start` to `end` after those from `first` on, counted from a prefix at 0.

    Only the window is copied: the tokens may be a file of billions.
    """
    context = np.asarray(tokens[max(first - 1, 0) : start], np.int32)
    if not first:
        context = np.concatenate([np.array([prefix], np.int32), context])
    return Request(context, (np.asarray(tokens[start:end], np.int32),))
