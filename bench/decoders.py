"""Programs that write text with a GPT-2, to compare. Each runs in a process of its own and writes when it is asked to.

    ours           `gpt2_jax.generation.stream`
    transformers   `generate` with its KV cache
    ctranslate2    CTranslate2's `generate_batch`, from its converter for transformers
    llama.cpp      llama-cpp-python, from our GGUF; one prompt at a time

The name is followed by a dtype: float32, bfloat16, int8 (CTranslate2) or q8_0 (llama.cpp). All read one directory
of transformers, use all cores and take the most probable token each time. JAX, torch and the others are imported only
in the processes that use them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Prompts = list[list[int]]
Timed = tuple[float, float, np.ndarray]  # seconds to the first token and to the last, and the tokens [prompts, new]
IDLE = 0.5  # seconds before a turn: OpenMP's threads of the decoder before spin for 0.2 s when they have nothing to do
PEERS = {  # the module that each needs, and the dtypes that it has on a CPU
    "transformers": ("transformers", ("float32",)),
    "ctranslate2": ("ctranslate2", ("float32", "int8")),
    "llama.cpp": ("llama_cpp", ("float32", "q8_0")),
}


def installed() -> list[str]:
    """The peers that are installed, with their dtypes."""
    return [
        f"{peer} {dtype}"
        for peer, (module, dtypes) in PEERS.items()
        if importlib.util.find_spec(module)
        for dtype in dtypes
    ]


class DecoderError(Exception):
    """A decoder failed. The text is its name and the reason."""


@contextlib.contextmanager
def start_all(names: Sequence[str], directory: str) -> Iterator[dict[str, Callable[[Prompts, int], Timed]]]:
    """Starts decoders. Yields functions that time one call: (prompts, new tokens) -> Timed.

    Args:
        names: decoders with their dtypes, such as "ours float32".
        directory: a model of transformers; with its tokenizer for CTranslate2 and llama.cpp.

    Raises:
        DecoderError: one cannot start, or its process ends, as with instructions that the CPU does not have.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several decoders share the device
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in names}

        def call(name: str, function: Callable[..., Any], *args: Any) -> Any:
            try:
                return processes[name].submit(function, *args).result()
            except Exception as error:
                raise DecoderError(f"{name}: {type(error).__name__}: {error}".splitlines()[0]) from error

        for name in names:
            call(name, start, name, directory)
        yield {name: functools.partial(call, name, run) for name in names}


# --- in the process ------------------------------------------------------------------------------------

write: Callable[[Prompts, int], Iterator[np.ndarray]]


def start(name: str, directory: str) -> None:
    """Loads the model."""
    global write
    decoder, dtype = name.split(" ")
    makers = {"ours": ours, "transformers": transformers, "ctranslate2": ctranslate2, "llama.cpp": llama_cpp}
    write = makers[decoder](directory, dtype)


def run(prompts: Prompts, new: int) -> Timed:
    """Writes `new` tokens after each prompt. For a decoder that returns only at the end, a call times the first."""
    time.sleep(IDLE)
    begin = time.perf_counter()
    chunks = write(prompts, new)
    parts = [next(chunks)]
    first = time.perf_counter() - begin
    parts += chunks
    total = time.perf_counter() - begin
    if parts[0].shape[1] == new > 1:
        first = run(prompts, 1)[1]
    return first, total, np.concatenate(parts, axis=1)


def cores() -> int:
    """The number of cores, as all decoders use them."""
    return len(os.sched_getaffinity(0))


def ours(directory: str, dtype: str) -> Callable[[Prompts, int], Iterator[np.ndarray]]:
    """Our generation on JAX's first device."""
    import jax.numpy as jnp

    from gpt2_jax import load
    from gpt2_jax.generation import Sampling, stream

    gpt2 = load(directory, dtype=jnp.dtype(dtype))
    return lambda prompts, new: stream(gpt2.model, gpt2.params, prompts, new, Sampling(temperature=0.0))


def transformers(directory: str, dtype: str) -> Callable[[Prompts, int], Iterator[np.ndarray]]:
    """`generate` of transformers, on the GPU if there is one."""
    import torch
    from transformers import GPT2LMHeadModel

    model: Any = GPT2LMHeadModel.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    model = model.cuda() if torch.cuda.is_available() else model

    def write(prompts: Prompts, new: int) -> Iterator[np.ndarray]:
        ids = torch.tensor(prompts, device=model.device)
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True, "pad_token_id": 0}
        tokens = model.generate(ids, max_new_tokens=new, min_new_tokens=new, **settings)
        yield tokens[:, ids.shape[1] :].cpu().numpy()

    return write


def ctranslate2(directory: str, dtype: str) -> Callable[[Prompts, int], Iterator[np.ndarray]]:
    """CTranslate2 on the CPU. Its prompts are tokens as strings."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    out = f"{directory}/ctranslate2-{dtype}"
    TransformersConverter(directory).convert(out, quantization=dtype)
    vocab = json.loads(Path(directory, "vocab.json").read_text(encoding="utf-8"))
    pieces = sorted(vocab, key=vocab.__getitem__)
    generator = ctranslate2.Generator(out, device="cpu", compute_type=dtype, intra_threads=cores())

    def write(prompts: Prompts, new: int) -> Iterator[np.ndarray]:
        texts = [[pieces[token] for token in prompt] for prompt in prompts]
        settings = {"max_length": new, "min_length": new, "sampling_topk": 1, "include_prompt_in_result": False}
        yield np.array([result.sequences_ids[0] for result in generator.generate_batch(texts, **settings)])

    return write


def llama_cpp(directory: str, dtype: str) -> Callable[[Prompts, int], Iterator[np.ndarray]]:
    """llama.cpp on the CPU, with its KV cache in float32 where the weights are."""
    import llama_cpp

    from gpt2_jax.convert import convert

    file = str(convert(directory, "gguf", f"{directory}/gguf-{dtype}") / "model.gguf")
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32} if dtype == "float32" else {}
    if dtype == "q8_0":
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
        source, file = file, file.replace("model.gguf", "q8_0.gguf")
        if llama_cpp.llama_model_quantize(source.encode(), file.encode(), params):
            raise RuntimeError(f"llama.cpp cannot quantize {source}")
    model = llama_cpp.Llama(file, n_ctx=0, n_threads=cores(), n_threads_batch=cores(), verbose=False, **cache)

    def write(prompts: Prompts, new: int) -> Iterator[np.ndarray]:
        (prompt,) = prompts
        model.reset()  # or it would keep what it has read of the same prompt
        for _, token in zip(range(new), model.generate(prompt, temp=0.0), strict=False):
            yield np.array([[token]])

    return write
