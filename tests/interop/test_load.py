"""`load`: placement on devices, memory, and the loggers of other libraries."""

import dataclasses
import logging
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from model_files import CONFIG, assert_same_params, random_params, save_run
from torch_gpt2 import as_params

from gpt2_jax import GPT2Config, load
from gpt2_jax.config import MeshConfig
from gpt2_jax.convert import convert
from gpt2_jax.interop.stored import parameter_shapes
from gpt2_jax.sharding import make_mesh, state_sharding


def test_parameters_load_into_the_sharding_of_a_mesh(theirs, saved):
    mesh = make_mesh(MeshConfig(2, 4))
    params = load(str(saved), mesh=mesh).params
    shardings = state_sharding(mesh, params)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, params, shardings))
    kernel = params["h_0"]["attn"]["c_attn"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 24)}
    assert_same_params(params, as_params(theirs.state_dict(), CONFIG))


def test_the_log_levels_of_other_libraries_stay_as_the_user_set_them(theirs, saved, tmp_path, add_to_hub_cache):
    run = save_run(tmp_path / "run", CONFIG, as_params(theirs.state_dict(), CONFIG))
    add_to_hub_cache("someone/small", saved)
    levels = {"absl": logging.WARNING + 1, "huggingface_hub": logging.WARNING + 2}
    before = {name: logging.getLogger(name).level for name in levels}
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        load(str(run))
        load("someone/small")
        assert {name: logging.getLogger(name).level for name in levels} == levels
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


# Loads models one after the other. Prints for each the peak and the final growth of the process, in MB.
MEMORY = """
import gc, sys, threading, time, jax, torch
from gpt2_jax import load
jax.block_until_ready(jax.numpy.zeros(8))

def anonymous():  # megabytes of this process that are not pages of files
    fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 1024

peak = [0.0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
for path in sys.argv[1:]:
    gc.collect()
    start = peak[0] = anonymous()
    params = jax.block_until_ready(load(path).params)
    print(peak[0] - start, anonymous() - start)
    del params
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_takes_memory_for_the_model_and_one_tensor(tmp_path):
    # Like GPT-2, with token embeddings that are the largest tensor by far.
    exact = GPT2Config(vocab_size=20000, block_size=64, n_layer=4, n_head=4, n_embd=512, gelu="exact")
    tanh = dataclasses.replace(exact, gelu="tanh")
    params = random_params(exact)
    run = save_run(tmp_path / "run", exact, params)
    nanogpt, huggingface = (convert(str(run), to, tmp_path / to) for to in ("nanogpt", "huggingface"))
    (llmc,) = convert(str(save_run(tmp_path / "tanh", tanh, params)), "llmc", tmp_path / "llmc").glob("*.bin")
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, (huggingface, llmc, nanogpt, run))],
        # One heap, and arrays outside of it: memory that is freed goes back to the system, so that each load has to
        # ask for its own.
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    model = sum(np.prod(shape) for shape in parameter_shapes(exact).values()) * 4 / 2**20  # 87 MB
    largest = 20000 * 512 * 4 / 2**20  # 39 MB
    for format, line in zip(("huggingface", "llmc", "nanogpt", "orbax"), output.splitlines(), strict=True):
        peak, after = map(float, line.split())
        overhead = 60 if format == "orbax" else 25  # allocations of JAX and Orbax themselves
        assert after > 0.9 * model, (format, output)
        assert peak < model + largest + overhead, (format, output)
