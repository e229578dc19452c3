"""Writes text: `python -m gpt2_jax.generate --model MODEL --prompt TEXT`."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import tyro

from gpt2_jax import runtime
from gpt2_jax.activity import activity_line
from gpt2_jax.cli import run_command, warn
from gpt2_jax.config import Dtype
from gpt2_jax.config.flags import parse_flags
from gpt2_jax.data.encode import encode_prompt
from gpt2_jax.errors import UserError, strip_controls
from gpt2_jax.files import check_regular, check_utf8, is_open_pipe, user_path
from gpt2_jax.generation import LanguageModel, Sampling
from gpt2_jax.generation.decode import lower_programs
from gpt2_jax.generation.text import DEFAULT_TOKENS
from gpt2_jax.hardware import current_hardware
from gpt2_jax.interop import MODEL_KINDS, is_on_disk, use_model
from gpt2_jax.interop.stored import StoredModel
from gpt2_jax.planning.estimate import required_memory
from gpt2_jax.planning.shortage import Setting, naming_a_smaller_setting
from gpt2_jax.resolve import matmul_dtype, same_or_narrower, slow_generation

PROG = "python -m gpt2_jax.generate"

# tyro would take the text "None" for none.
TEXT = tyro.constructors.PrimitiveConstructorSpec[str | None](
    nargs=1,
    metavar="STR",
    instance_from_str=lambda args: args[0],
    is_instance=lambda value: value is None or isinstance(value, str),
    str_from_instance=lambda value: [value or ""],
)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command."""

    model: Annotated[str, tyro.conf.arg(help=f"MODEL: {MODEL_KINDS}.")]
    prompt: Annotated[str | None, TEXT, tyro.conf.arg(help_behavior_hint="")] = None
    """Text to continue. An empty one starts a new text."""
    prompt_file: Annotated[str | None, TEXT, tyro.conf.arg(help_behavior_hint="")] = None
    """File with the text to continue. Without this and --prompt, the text comes from standard input."""
    max_new_tokens: int = 0
    """Tokens to write at most. The model may end its text earlier. 0 for 200, or as many as block_size has room for."""
    samples: int = 1
    """Continuations to write at the same time. The first is shown as it is written."""
    temperature: float = 1.0
    """Below 1 for more probable text, above 1 for more varied text, 0 for the most probable token each time."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the most probable tokens whose probabilities reach this sum."""
    seed: int = 0
    """The same seed gives the same text."""
    slide: bool = False
    """Continue past block_size from the last block_size tokens. Each token then costs a forward pass over all."""
    dtype: Dtype = "auto"
    """Dtype of activations and matmuls.
    auto is bfloat16 on accelerators, float16 on NVIDIA GPUs of the generations Volta and Turing, float32 on CPU."""


def main(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    flags = parse_flags(Flags, args, prog=PROG, description="Continue a text.")
    if flags.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens {flags.max_new_tokens}; expected 1 or more, or 0 for the default")
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.samples, flags.seed, slide=flags.slide)
    prompt = _prompt(flags).removeprefix("\ufeff")  # the byte order mark of a file
    runtime.enable_compilation_cache("auto")
    hardware = current_hardware()
    dtype = matmul_dtype(flags.dtype, hardware)
    if warning := slow_generation(dtype, hardware.platform):
        warn(warning)

    def load(stored: StoredModel) -> tuple[LanguageModel, _Work]:
        tokens = encode_prompt(stored.open_tokenizer(), prompt)  # a missing one is found before parameters are read
        work = _Work(stored, dtype, len(tokens), flags.max_new_tokens or DEFAULT_TOKENS, sampling)
        with work.explaining_memory():
            return stored.load(None, jnp.dtype(dtype), compact=True), work

    with activity_line(quiet=not is_on_disk(flags.model)):  # downloads show bars of their own
        gpt2, work = use_model(flags.model, load)
    with work.explaining_memory():
        _write(prompt, gpt2.stream([prompt], flags.max_new_tokens or None, sampling), flags.samples)
    return 0


class _Work(NamedTuple):
    """What is asked of a model: a continuation of `length` tokens by `new` ones."""

    stored: StoredModel
    dtype: Dtype
    length: int
    new: int
    sampling: Sampling

    def explaining_memory(self) -> AbstractContextManager[None]:
        """Replaces the error of a device without memory by one line with the smallest change that fits."""
        return naming_a_smaller_setting("writing text", list(self._settings()))

    def _settings(self) -> Iterator[Setting]:
        """This one, and smaller ones: half of the samples again and again, and the same in a narrower dtype."""
        for dtype in same_or_narrower(self.dtype, current_hardware()):
            samples = self.sampling.samples
            while samples:
                work = self._replace(dtype=dtype, sampling=dataclasses.replace(self.sampling, samples=samples))
                yield Setting({"--samples": samples, "--dtype": dtype}, work._required)
                samples //= 2

    def _required(self) -> int:
        """Compiles the programs, and returns the bytes that they require on the device."""
        model, params = self.stored.abstract(None, jnp.dtype(self.dtype), compact=True)
        programs = lower_programs(model, params, self.length, self.new, self.sampling)
        return max(required_memory(program, params) for program in programs)


def _write(prompt: str, pieces: Iterator[list[str]], samples: int) -> None:
    """Shows the first continuation while it is written, and then the others."""
    texts = [prompt] * samples
    with activity_line():
        first = next(pieces, [""] * samples)
    _show(prompt)
    for new in itertools.chain([first], pieces):
        texts = [text + more for text, more in zip(texts, new, strict=True)]
        _show(new[0])
    _show("\n")
    for number, text in enumerate(texts[1:], start=2):
        _show(f"\n--- sample {number} ---\n{text}\n")


def _show(text: str) -> None:
    """Writes a text to standard output at once: as it is, except that it may not command a terminal."""
    sys.stdout.write(strip_controls(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _prompt(flags: Flags) -> str:
    if flags.prompt is not None and flags.prompt_file is not None:
        raise UserError("--prompt and --prompt-file are both given; give one of them")
    if flags.prompt is not None:
        check_utf8(flags.prompt, "--prompt")
        return flags.prompt
    try:
        if flags.prompt_file is not None:
            path = user_path(flags.prompt_file, "--prompt-file")
            if not is_open_pipe(flags.prompt_file):
                check_regular(path)
            return path.read_bytes().decode("utf-8")
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("no prompt; type --prompt TEXT or --prompt-file FILE, or pipe a text to standard input")
        return sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file {flags.prompt_file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 text (byte {error.start}); convert it") from error


def command() -> None:
    """Entry point of `gpt2-generate`."""
    run_command(main)


if __name__ == "__main__":
    command()
