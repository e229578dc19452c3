"""Converts a model to another format: `python -m gpt2_jax.convert --from MODEL --to FORMAT --out DIR`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from safetensors import SafetensorError

from gpt2_jax.activity import activity_line
from gpt2_jax.cli import run_command
from gpt2_jax.config.flags import parse_flags
from gpt2_jax.data.tokenizer import tokenizer_name
from gpt2_jax.errors import UserError, one_line, strip_controls
from gpt2_jax.files import replace_text, user_path
from gpt2_jax.interop import MODEL_KINDS, is_on_disk, use_model
from gpt2_jax.interop.gguf import write_gguf
from gpt2_jax.interop.huggingface import write_huggingface
from gpt2_jax.interop.llmc import write_llmc
from gpt2_jax.interop.model_files import directory_files
from gpt2_jax.interop.nanogpt import DATASET, write_nanogpt
from gpt2_jax.interop.runs import write_orbax
from gpt2_jax.interop.stored import StoredModel, architecture_summary
from gpt2_jax.interop.tokenizer_files import VOCABULARIES, read_tokenizer
from gpt2_jax.reports.card import CARD, model_card, run_of

PROG = "python -m gpt2_jax.convert"

Format = Literal["huggingface", "llmc", "nanogpt", "gguf", "orbax"]
ExportDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command."""

    source: Annotated[str, tyro.conf.arg(name="from", help=f"MODEL to convert: {MODEL_KINDS}.")]
    to: Format
    """Format to write. orbax is a run directory of this project, without the optimizer's state."""
    out: str
    """Directory to create; it must not exist."""
    dtype: ExportDtype = "float32"
    """Dtype of the parameters, for huggingface, llmc and gguf. bfloat16 rounds; it is the default of train_gpt2cu."""


def main(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    flags = parse_flags(Flags, args, prog=PROG, description="Convert a model to another format.")
    with activity_line(quiet=not is_on_disk(flags.source)):  # downloads show bars of their own
        out = convert(flags.source, flags.to, flags.out, flags.dtype)
    files = sorted(path.name for path in out.iterdir())
    print(strip_controls(f"wrote     {out}: {', '.join(files)}"))
    print(strip_controls(f"next      {_next_command(flags, out, files)}"))
    return 0


def _next_command(flags: Flags, out: Path, files: list[str]) -> str:
    """The command or the Python expression that reads the converted model."""
    vocabulary = next((name for name in VOCABULARIES if name in files), None)
    if flags.to == "huggingface":
        if not vocabulary:
            return f'AutoModelForCausalLM.from_pretrained("{out}") (no tokenizer was written: it is unknown)'
        return f'AutoModelForCausalLM.from_pretrained("{out}"), AutoTokenizer.from_pretrained("{out}")'
    if flags.to == "orbax":
        return f"python -m gpt2_jax.generate --model {out}"
    if flags.to == "gguf":
        return f"llama.cpp: llama-server -m {out / 'model.gguf'}"
    tokenizer = read_tokenizer(directory_files(out), lambda: None)
    others = vocabulary and (tokenizer is None or tokenizer_name(tokenizer) != "gpt2")
    if flags.to == "llmc":
        file = next(file for file in files if file.endswith(".bin"))
        if others:
            return (
                f"llm.c reads {out / file}, but prints text with GPT-2's tokens; this model's: {out / str(vocabulary)}"
            )
        precision = {"float32": "FP32", "bfloat16": "BF16"}[flags.dtype]
        return f"llm.c: make train_gpt2cu PRECISION={precision}, and ./train_gpt2cu -e {out / file}"
    if "meta.pkl" in files:
        return f"nanoGPT: copy {out / 'meta.pkl'} to data/{DATASET}/, and python sample.py --out_dir={out}"
    if others:
        return f"nanoGPT reads {out}, but prints text with GPT-2's tokens; this model's: {out / str(vocabulary)}"
    return f"nanoGPT: python sample.py --out_dir={out}"


def convert(source: str, to: Format, out: str | Path, dtype: ExportDtype = "float32") -> Path:
    """Writes a model of any format in the format `to`.

    The files are written into a temporary directory beside `out`, which is renamed at the end.

    Args:
        source: any MODEL.
        to: the format to write.
        out: the directory to create.
        dtype: the dtype of the parameters, for huggingface, llmc and gguf.

    Returns:
        `out`, as a path.

    Raises:
        UserError: the model cannot be read, the format cannot represent it, or `out` cannot be written.
    """
    out = user_path(str(out), "--out")
    try:
        exists = out.exists()
    except OSError as error:
        raise UserError(f"--out {out} cannot be a directory ({error.strerror}); give another --out") from error
    if dtype != "float32" and to in ("nanogpt", "orbax"):
        raise UserError(f"--dtype {dtype} is for huggingface, llmc and gguf; {to} is always float32: leave --dtype out")
    if exists:
        raise UserError(f"{out} exists; give another --out, or move it away")
    return use_model(source, lambda model: _convert(model.with_fingerprint(), source, to, out, dtype))


def _convert(model: StoredModel, source: str, to: Format, out: Path, dtype: ExportDtype) -> Path:
    print(strip_controls(f"from      {model.where}: {architecture_summary(model.config)}"))
    new_parents = [parent for parent in out.parents if not parent.exists()]
    partial = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".convert.", dir=out.parent))
        if to == "huggingface":
            write_huggingface(model, partial, dtype)
            replace_text(partial / CARD, model_card(model, out.name, run_of(source)))
        elif to == "llmc":
            write_llmc(model, partial, dtype)
        elif to == "gguf":
            write_gguf(model, partial, dtype)
        elif to == "nanogpt":
            write_nanogpt(model, partial)
        else:
            write_orbax(model, partial)
        rounded = ", before they were rounded to bfloat16" if dtype == "bfloat16" else ""
        print(f"state     fingerprint {model.fingerprint}, of the parameters{rounded}")
        mask = _umask()  # mkdtemp and safetensors create files that only their owner can read
        for path in (partial, *partial.iterdir()):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        partial.rename(out)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:  # the writers' errors for a full disk
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)  # NumPy's OSError has only a text
        raise UserError(f"{out} cannot be written: {reason}; give another --out") from error
    finally:
        for _ in range(50):  # after a failure, Orbax's threads may still write for a moment
            if not partial or not partial.exists():
                break
            shutil.rmtree(partial, ignore_errors=True)
            time.sleep(0.1)
        if not out.exists():
            for parent in new_parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()
    return out


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def command() -> None:
    """Entry point of `gpt2-convert`."""
    run_command(main)


if __name__ == "__main__":
    command()
