"""Text in, text out: a model with its parameters and its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict, Unpack

import numpy as np

from gpt2_jax.data.encode import encode_prompt
from gpt2_jax.data.tokenizer import UNKNOWN, Boundaries, TextStream, Tokenizer, boundaries
from gpt2_jax.errors import UserError
from gpt2_jax.generation.decode import DEFAULT, stream
from gpt2_jax.generation.sampling import Sampling
from gpt2_jax.model import GPT2, Params

DEFAULT_TOKENS = 200


class Options(TypedDict, total=False):
    """Keyword arguments of `generate`: the fields of `Sampling` with the same names."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    slide: bool


class LanguageModel:
    """A model, its parameters and its tokenizer. `gpt2_jax.load` returns one.

    Args:
        model: the Flax module.
        params: its parameters, so that `model.apply({"params": params}, tokens)` computes logits.
        open_tokenizer: returns the tokenizer; called once, when it is first needed. Raises UserError if there is none.
        named: the tokens around a text, as far as the model names them; the others are the tokenizer's.
    """

    def __init__(
        self, model: GPT2, params: Params, open_tokenizer: Callable[[], Tokenizer], named: Boundaries = UNKNOWN
    ) -> None:
        self.model, self.params = model, params
        self._open_tokenizer, self._named = open_tokenizer, named

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, opened at the first access: `encode_ordinary(text)` and `decode_bytes(tokens)`.

        Raises:
            UserError: the model comes without one, or its vocabulary cannot be downloaded.
        """
        return self._open_tokenizer()

    @property
    def boundaries(self) -> Boundaries:
        """The tokens around a text.

        Raises:
            UserError: as `tokenizer`.
        """
        return self._named.or_else(boundaries(self.tokenizer))

    def generate(self, prompt: str, max_new_tokens: int | None = None, **options: Unpack[Options]) -> str:
        """Continues a text.

        Args:
            prompt: the text to continue; "" starts a new text from the token that precedes texts, or that ends them.
            max_new_tokens: the most tokens to write; the model may end the text earlier. By default 200, or as many
                as fit into `block_size`.
            **options: temperature, top_k, top_p, seed and slide, as in `Sampling`.

        Returns:
            The prompt and its continuation.

        Raises:
            UserError: no tokenizer, a character or token that the model does not have, an option out of range, or more
                tokens than `block_size` without `slide`.
        """
        return self.generate_batch([prompt], max_new_tokens, **options)[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        max_new_tokens: int | None = None,
        samples: int = 1,
        **options: Unpack[Options],
    ) -> list[str]:
        """`generate` for several prompts at once, each with `samples` continuations.

        Returns:
            The samples of the first prompt, then those of the second, ….
        """
        texts = [prompt for prompt in prompts for _ in range(samples)]
        for pieces in self.stream(prompts, max_new_tokens, Sampling(samples=samples, **options)):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def stream(
        self, prompts: Sequence[str], max_new_tokens: int | None = None, sampling: Sampling = DEFAULT
    ) -> Iterator[list[str]]:
        """`generate_batch` as an iterator: yields the new text of every sequence while it is generated.

        Args:
            sampling: its `stop` and `vocab_size` are replaced by those of the model and the tokenizer.

        Yields:
            One string per sequence, without the prompts. Concatenated, the strings of a sequence are its continuation.
        """
        tokenizer, around, tokens = self.tokenizer, self.boundaries, self.encode(prompts)
        stop = around.ends[0] if around.ends else None
        if max_new_tokens is None:
            room = self.model.config.block_size - max(map(len, tokens), default=0)
            max_new_tokens = DEFAULT_TOKENS if sampling.slide or room < 1 else min(DEFAULT_TOKENS, room)
        sampling = dataclasses.replace(sampling, stop=stop, vocab_size=tokenizer.n_vocab)
        chunks = stream(self.model, self.params, tokens, max_new_tokens, sampling)
        return self._decode(chunks, [TextStream(tokenizer, around.ends) for _ in range(len(tokens) * sampling.samples)])

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of prompts, with those that the model wants before a text.

        Raises:
            UserError: no tokenizer, or a character that the model does not have.
        """
        around = self.boundaries
        stop = around.ends[0] if around.ends else None
        start = stop if around.start is None else around.start
        return [self._encode(prompt, around.prefix, start) for prompt in prompts]

    def _encode(self, prompt: str, prefix: tuple[int, ...], start: int | None) -> list[int]:
        tokens = [*prefix, *encode_prompt(self.tokenizer, prompt)]
        if tokens:
            return tokens
        if start is None:
            raise UserError("the prompt is empty, and this model has no end-of-text token to start from; give a prompt")
        return [start]

    @staticmethod
    def _decode(chunks: Iterator[np.ndarray], decoders: list[TextStream]) -> Iterator[list[str]]:
        for chunk in chunks:
            yield [decoder.add(row) for decoder, row in zip(decoders, chunk, strict=True)]
            if all(decoder.ended for decoder in decoders):  # `stop` is only the first of the tokens that end a text
                break
        yield [decoder.end() for decoder in decoders]
