"""Writes text: `python -m gpt2_jax.generate --model MODEL --prompt TEXT`. The work is done by `decode.py`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import tyro

from gpt2_jax import runtime
from gpt2_jax.attention import current_hardware
from gpt2_jax.cli import parse_flags, run_command
from gpt2_jax.config import Dtype, UserError
from gpt2_jax.data.tokenizer import TextStream, end_of_text
from gpt2_jax.decode import stream
from gpt2_jax.interop import KINDS, open_model
from gpt2_jax.sampling import Sampling

PROG = "python -m gpt2_jax.generate"
DEFAULT_TOKENS = 200


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

    model: Annotated[str, tyro.conf.arg(help=f"MODEL: {KINDS}.")]
    prompt: Annotated[str | None, TEXT, tyro.conf.arg(help_behavior_hint="")] = None
    """Text to continue; empty starts a new one."""
    prompt_file: Annotated[str | None, TEXT, tyro.conf.arg(help_behavior_hint="")] = None
    """File with the text to continue. Without this and --prompt it is read from standard input."""
    max_new_tokens: int = 0
    """Tokens to write, at most: the model may end its text before. 0 for 200, or as many as block_size has room for."""
    samples: int = 1
    """Continuations to write, all at the same time. The first is shown as it comes."""
    temperature: float = 1.0
    """Below 1 for more probable text, above for more daring, 0 for always the most probable token."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the most probable tokens that reach this probability together."""
    seed: int = 0
    """The same seed gives the same text."""
    slide: bool = False
    """Go on past the model's block_size, seeing the last block_size tokens; each then takes a full pass."""
    dtype: Dtype = "auto"
    """Of the matrix products: auto is bfloat16 on accelerators and float32 on CPU."""


def main(args: Sequence[str]) -> int:
    """The command; returns its exit code."""
    flags = parse_flags(Flags, args, prog=PROG, description="Continue a text.")
    if flags.samples < 1:
        raise UserError(f"--samples {flags.samples}; expected at least 1")
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p)
    text = _prompt(flags)
    stored = open_model(flags.model)
    tokenizer = stored.tokenizer()
    if tokenizer is None:
        raise UserError(
            f"the tokenizer of {flags.model} is not known; put its vocab.json and merges.txt, or nanoGPT's meta.pkl, "
            "beside the model"
        )
    stop = end_of_text(tokenizer) if stored.end_of_text is None else stored.end_of_text
    prompt = tokenizer.encode_ordinary(text)
    if not prompt:
        if stop is None:
            raise UserError("the prompt is empty, and this model has no end-of-text token to start from; type --prompt")
        prompt = [stop]
    room = stored.config.block_size - len(prompt)
    n_tokens = flags.max_new_tokens or (DEFAULT_TOKENS if flags.slide or room < 1 else min(DEFAULT_TOKENS, room))
    runtime.keep_programs("auto")
    dtype = flags.dtype
    if dtype == "auto":
        dtype = "float32" if current_hardware().platform == "cpu" else "bfloat16"
    model, params = stored.load(None, jnp.dtype(dtype))
    chunks = stream(
        model,
        params,
        [prompt],
        n_tokens,
        samples=flags.samples,
        sampling=sampling,
        seed=flags.seed,
        stop=stop,
        vocab_size=tokenizer.n_vocab,
        slide=flags.slide,
    )
    writers = [TextStream(tokenizer, stop) for _ in range(flags.samples)]
    texts = [text] * flags.samples
    sys.stdout.write(text)
    sys.stdout.flush()
    for chunk in chunks:
        new = [writer.add(row) for writer, row in zip(writers, chunk, strict=True)]
        texts = [text + more for text, more in zip(texts, new, strict=True)]
        sys.stdout.write(new[0])
        sys.stdout.flush()
    ends = [writer.end() for writer in writers]
    print(ends[0])
    for number in range(1, flags.samples):
        print(f"\n--- sample {number + 1} ---\n{texts[number]}{ends[number]}")
    return 0


def _prompt(flags: Flags) -> str:
    if flags.prompt is not None and flags.prompt_file is not None:
        raise UserError("--prompt and --prompt-file are both given; take one")
    if flags.prompt is not None:
        return flags.prompt
    try:
        if flags.prompt_file is not None:
            return Path(flags.prompt_file).expanduser().read_bytes().decode("utf-8")
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("no prompt; type --prompt TEXT or --prompt-file FILE, or pipe a text in")
        return sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file {flags.prompt_file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 text (byte {error.start}); convert it") from error


if __name__ == "__main__":
    run_command(main)
