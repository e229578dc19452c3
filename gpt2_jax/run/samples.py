"""Text that the model of a run writes: at each evaluation to OUT/samples.jsonl, and at the end of the run."""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils

from gpt2_jax.config import TrainConfig
from gpt2_jax.data import Data
from gpt2_jax.data.tokenizer import Tokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.files import check_regular, user_path
from gpt2_jax.generation import Sampling, generate
from gpt2_jax.generation.text import LanguageModel
from gpt2_jax.model import GPT2, Params
from gpt2_jax.parsing import read_text

MAX_BYTES = 1 << 16  # of all prompts together, so that their rows can be read again


class Samples:
    """Continues the texts of `config.eval.prompts`, each time from the same seed.

    Calling it leaves the training state alone: a run with prompts is bit for bit the run without them.

    Args:
        tokenizer: that of the run.

    Raises:
        UserError: there is no tokenizer, a file cannot be read, or the model cannot continue a prompt.
    """

    def __init__(self, config: TrainConfig, model: GPT2, tokenizer: Tokenizer | None) -> None:
        self._config, self._model = config, model
        self._prompts = _read_prompts(config.eval.prompts)
        if tokenizer is None:
            raise UserError("eval.prompts needs the tokenizer of the token files; type --data.tokenizer NAME")
        self._tokenizer = tokenizer
        self._with({}).encode(self._prompts)

    def __call__(self, params: Params) -> list[tuple[str, str]]:
        """The prompts, each with its continuation; empty in all processes except process 0.

        All processes call it together.
        """
        gathered = _gathered(params)
        if gathered is None:
            return []
        n_tokens, seed = self._config.eval.prompt_tokens, self._config.seed
        texts = self._with(gathered).generate_batch(self._prompts, n_tokens, seed=seed, slide=True)
        return [(prompt, text[len(prompt) :]) for prompt, text in zip(self._prompts, texts, strict=True)]

    def _with(self, params: Params) -> LanguageModel:
        return LanguageModel(self._model, params, lambda: self._tokenizer)


def _read_prompts(given: tuple[str, ...]) -> list[str]:
    """The texts themselves, and for `@FILE` the lines of the file that are not empty."""
    prompts: list[str] = []
    for text in given:
        if not text.startswith("@"):
            prompts.append(text)
            continue
        path, name = user_path(text[1:], "--eval.prompts"), f"--eval.prompts {text}"
        try:
            check_regular(path)
            lines = list(filter(None, read_text(path, MAX_BYTES).splitlines()))
        except (OSError, ValueError) as error:
            found = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{name}: {found}; expected a text file with a prompt in each line") from error
        if not lines:
            raise UserError(f"{name}: the file is empty; write a prompt in each line")
        prompts += lines
    if sum(len(prompt.encode()) for prompt in prompts) > MAX_BYTES:
        raise UserError(f"eval.prompts has more than {MAX_BYTES:,} bytes; shorten the prompts")
    return prompts


def sample_text(model: GPT2, params: Params, data: Data, config: TrainConfig) -> str | None:
    """Text of `config.eval.sample_tokens` tokens; None if that is 0, and in all processes except process 0.

    All processes call it together. Characters that cannot be printed become replacement characters.
    """
    if not config.eval.sample_tokens or data.tokenizer is None:
        return None
    gathered = _gathered(params)
    if gathered is None:
        return None
    prompt = [int(data.val.streams[0][:1][0])]  # end-of-text, or the first token of a text without one
    sampling = Sampling(seed=config.seed, vocab_size=data.tokenizer.n_vocab, slide=True)
    (tokens,) = generate(model, gathered, [prompt], config.eval.sample_tokens, sampling)
    text = data.tokenizer.decode_bytes(tokens.tolist()).decode("utf-8", "replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _gathered(params: Params) -> Params | None:
    """The parameters, in process 0 only. With several processes they are copied to its first device."""
    if jax.process_count() > 1:
        params = jax.device_put(multihost_utils.process_allgather(params, tiled=True), jax.local_devices()[0])
    return None if jax.process_index() else params
