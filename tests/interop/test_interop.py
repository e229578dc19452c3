"""Weights in and out: files written by transformers, torch and safetensors, and byte by byte from the formats."""

import copy
import dataclasses
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from torch_gpt2 import as_params, torch_gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2_jax import GPT2, GPT2Config, load
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import DataConfig, MeshConfig, ModelConfig
from gpt2_jax.config.toml import to_toml
from gpt2_jax.convert import convert
from gpt2_jax.convert import main as convert_main
from gpt2_jax.data.tokenizer import CharTokenizer, byte_encoding, gpt2_encoding
from gpt2_jax.errors import UserError
from gpt2_jax.interop import open_model
from gpt2_jax.interop.stored import in_directory, parameter_shapes
from gpt2_jax.interop.tokenizer_files import BYTE, read_tokenizer, write_tokenizer
from gpt2_jax.model import init_params, padded_vocab_size
from gpt2_jax.sharding import make_mesh, state_sharding

CONFIG = GPT2Config(vocab_size=300, block_size=32, n_layer=3, n_head=4, n_embd=32)
EXACT = dataclasses.replace(CONFIG, gelu="exact")
BYTES = DataConfig(tokenizer="bytes")
GPT2_VOCABULARY = dataclasses.replace(CONFIG, vocab_size=50257, n_layer=1)


@pytest.fixture(scope="module")
def theirs():
    """A model of transformers with random weights."""
    return torch_gpt2(CONFIG)


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    """The directory that transformers makes of it."""
    directory = tmp_path_factory.mktemp("hf") / "model"
    theirs.save_pretrained(directory)
    return directory


def same_params(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def expect(path, theirs, config=CONFIG):
    """What `load` gives is, bit for bit, the torch model's weights."""
    gpt2 = load(str(path))
    model, params = gpt2.model, gpt2.params
    assert dataclasses.replace(model.config, attention="auto") == config
    same_params(params, as_params(theirs.state_dict(), config))
    return model, params


# --- in: Hugging Face ----------------------------------------------------------------------------------


def test_what_save_pretrained_writes(theirs, saved):
    model, params = expect(saved, theirs)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 32))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    logits = model.apply({"params": params}, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4)  # float32 products in another order


def hub_state(theirs):
    """A state dict as the hub's `gpt2` has it: no prefix, and the causal masks as buffers."""
    state = {name.removeprefix("transformer."): tensor.clone() for name, tensor in theirs.state_dict().items()}
    del state["lm_head.weight"]
    for layer in range(CONFIG.n_layer):
        state[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 32, 32))
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def test_what_the_hub_has_of_gpt2(theirs, saved, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    safetensors.torch.save_file(hub_state(theirs), tmp_path / "model.safetensors")
    expect(tmp_path, theirs)


def test_a_config_from_before_2020(theirs, saved, tmp_path):
    table = json.loads((saved / "config.json").read_text())
    old = {key: table[key] for key in ("model_type", "vocab_size", "n_embd", "n_layer", "n_head")} | {"n_ctx": 32}
    (tmp_path / "config.json").write_text(json.dumps(old))
    shutil.copy(saved / "model.safetensors", tmp_path)
    expect(tmp_path, theirs)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-zip"])
def test_an_old_pytorch_model_bin(theirs, saved, tmp_path, zipped):
    shutil.copy(saved / "config.json", tmp_path)
    torch.save(hub_state(theirs), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    expect(tmp_path, theirs)


def test_sharded_safetensors_with_an_index(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    expect(tmp_path, theirs)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"has no model-00002-.*, which model.safetensors.index.json names"):
        load(str(tmp_path))


def test_sharded_pytorch_model_bin(theirs, saved, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    state = theirs.transformer.state_dict()
    halves = {"a.bin": list(state)[:20], "b.bin": list(state)[20:]}
    for file, names in halves.items():
        torch.save({name: state[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in halves.items() for name in names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    expect(tmp_path, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32_exactly(saved, tmp_path, dtype):
    half = torch_gpt2(CONFIG).to(dtype)
    half.save_pretrained(tmp_path)
    expect(tmp_path, half.float())


def test_exact_gelu(tmp_path):
    theirs = torch_gpt2(EXACT)
    theirs.save_pretrained(tmp_path)
    expect(tmp_path, theirs, EXACT)


def test_a_name_on_the_hub_is_read_from_its_cache(theirs, saved, tmp_path, monkeypatch):
    """The cache's layout is huggingface_hub's: refs/main names a snapshot."""
    cache = tmp_path / "models--someone--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(saved, cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expect("someone/small", theirs)
    with pytest.raises(UserError, match=r"gpt2-medium is no file or directory here, it is not in the cache .* HF_HOME"):
        load("gpt2-medium")


# --- in: nanoGPT and llm.c, written from the descriptions of their formats -----------------------------

LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def nanogpt_checkpoint(theirs, config, prefix=""):
    """The dict that nanoGPT's train.py saves: Linear weights are [out, in]."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        if not config.bias and name.endswith(".bias"):
            continue
        state[prefix + name] = tensor.T.contiguous() if name.endswith(LINEAR) else tensor
    sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
    return {
        "model": state,
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": sizes | {"dropout": 0.0},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "letters"},
    }


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt(tmp_path, prefix):
    theirs = torch_gpt2(EXACT)
    torch.save(nanogpt_checkpoint(theirs, EXACT, prefix), tmp_path / "ckpt.pt")
    expect(tmp_path / "ckpt.pt", theirs, EXACT)
    expect(tmp_path, theirs, EXACT)  # nanoGPT's out_dir
    assert open_model(str(tmp_path)).step == 7


def test_nanogpt_without_biases(tmp_path):
    config = dataclasses.replace(EXACT, bias=False)
    theirs = torch_gpt2(config)
    torch.save(nanogpt_checkpoint(theirs, config), tmp_path / "ckpt.pt")
    params = load(str(tmp_path)).params
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if not name.endswith("bias")}
    same_params(params, as_params(weights, config))


def test_the_characters_of_nanogpt_are_read_without_running_anything(tmp_path, monkeypatch):
    config = dataclasses.replace(EXACT, vocab_size=3)
    (tmp_path / "out").mkdir()
    torch.save(nanogpt_checkpoint(torch_gpt2(config), config), tmp_path / "out" / "ckpt.pt")
    model = open_model(str(tmp_path / "out"))
    assert model.tokenizer() is None
    monkeypatch.chdir(tmp_path / "out")  # where the name says nothing of the directories above
    model = open_model("ckpt.pt")
    meta = tmp_path / "data" / "letters" / "meta.pkl"
    meta.parent.mkdir(parents=True)
    table = {"vocab_size": 3, "itos": {0: "\n", 1: "b", 2: "é"}, "stoi": {"\n": 0, "b": 1, "é": 2}}
    meta.write_bytes(pickle.dumps(table))
    assert model.tokenizer().encode_ordinary("bé\n") == [1, 2, 0]
    (tmp_path / "runs" / "deep").mkdir(parents=True)
    shutil.copy("ckpt.pt", tmp_path / "runs" / "deep")
    monkeypatch.chdir(tmp_path)  # nanoGPT's own directory: there it looks itself
    assert open_model("runs/deep").tokenizer().encode_ordinary("bé\n") == [1, 2, 0]
    model = open_model("out")
    meta.write_bytes(pickle.dumps({"itos": Trap(tmp_path / "sprung")}))
    with pytest.raises(UserError, match="is not nanoGPT's table of characters"):
        model.tokenizer()
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Makes a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


# llm.c's order of tensors: references, "Checkpoints of others".
LLMC = (
    "wte.weight", "wpe.weight", "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
    "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
    "mlp.c_proj.weight", "mlp.c_proj.bias", "ln_f.weight", "ln_f.bias",
)  # fmt: skip


def llmc_bytes(theirs, config, version):
    """A file of llm.c: 256 int32, then the tensors, each stacked over the layers, matrices [out, in]."""
    padded = padded_vocab_size(config)
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, padded)
    header = struct.pack("<256i", 20240326, version, *sizes, *([0] * 248))
    state = theirs.transformer.state_dict()
    tensors = []
    for name in LLMC:
        names = [name] if name in state else [f"h.{layer}.{name}" for layer in range(config.n_layer)]
        for one in names:
            tensor = state[one].T if name in LINEAR else state[one]
            if name == "wte.weight":
                tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padded - config.vocab_size))
            tensor = tensor.contiguous()
            tensors.append(
                tensor.numpy().tobytes() if version == 3 else tensor.bfloat16().view(torch.int16).numpy().tobytes()
            )
    return header + b"".join(tensors)


def rounded(model):
    """A copy whose weights have been through bfloat16."""
    return copy.deepcopy(model).bfloat16().float()


@pytest.mark.parametrize("version", [3, 5])
def test_llmc(theirs, tmp_path, version):
    path = tmp_path / "model_00000012.bin"
    path.write_bytes(llmc_bytes(theirs, CONFIG, version))
    expect(path, theirs if version == 3 else rounded(theirs))


# --- out, and round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 5])
def test_llmc_in_and_out_is_the_same_file(theirs, tmp_path, version):
    path = tmp_path / "model_00000000.bin"
    path.write_bytes(llmc_bytes(theirs, CONFIG, version))
    convert(str(path), "llmc", tmp_path / "out", {3: "float32", 5: "bfloat16"}[version])
    assert (tmp_path / "out" / "model_00000000.bin").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("config", [EXACT, dataclasses.replace(EXACT, bias=False)], ids=["bias", "no-bias"])
def test_nanogpt_in_and_out_is_the_same_dict(tmp_path, config):
    original = nanogpt_checkpoint(torch_gpt2(config), config)
    torch.save(original, tmp_path / "ckpt.pt")
    convert(str(tmp_path / "ckpt.pt"), "nanogpt", tmp_path / "out")
    written = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert written["model_args"] == original["model_args"]
    assert written["iter_num"] == 7
    assert written["model"].keys() == original["model"].keys()
    for name, tensor in original["model"].items():
        assert torch.equal(written["model"][name], tensor)


FORMATS = ("huggingface", "orbax", "nanogpt", "llmc")


# All pairs but nanoGPT with llm.c: one has the exact GELU, the other the tanh one, which is refused (tested below).
WAYS = [(source, to) for source in FORMATS for to in FORMATS if {source, to} != {"nanogpt", "llmc"}]


@pytest.mark.parametrize(("source", "to"), WAYS)
def test_every_way_there_and_back_is_bit_for_bit(tmp_path, source, to):
    config = dataclasses.replace(EXACT if "nanogpt" in (source, to) else CONFIG, vocab_size=257)
    params = as_params(torch_gpt2(config).state_dict(), config)
    first = convert(str(byte_model(tmp_path / "run", config, params)), source, tmp_path / "first")
    second = convert(str(first), to, tmp_path / "second")
    third = convert(str(second), source, tmp_path / "third")
    for path in (first, second, third):
        gpt2 = load(str(path))
        model, loaded = gpt2.model, gpt2.params
        assert dataclasses.replace(model.config, attention="auto") == config
        same_params(loaded, params)
        assert open_model(str(path)).tokenizer().name == "bytes"
    if "huggingface" not in (source, to):  # which has no place for the number of updates
        assert open_model(str(third)).step == 3


def byte_model(run, config, params, data=BYTES, step=3):
    """A run directory as training leaves it, of a model on bytes."""
    run.mkdir()
    (run / "config.toml").write_text(to_toml(ModelConfig(config, data)))
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(step, {"params": params, "step": jnp.int32(step)}, {})
    return run


def test_a_run_directory_is_its_newest_checkpoint(theirs, tmp_path):
    params = as_params(theirs.state_dict(), CONFIG)
    run = byte_model(tmp_path / "run", CONFIG, params)
    with Checkpoints(run / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(12, {"params": jax.tree.map(lambda leaf: 2 * leaf, params)}, {})
    expect(run / "checkpoints" / "3", theirs)
    same_params(load(str(run)).params, jax.tree.map(lambda leaf: 2 * leaf, params))
    assert open_model(str(run)).step == 12


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, vocab_size=257),
        dataclasses.replace(EXACT, vocab_size=257),
        dataclasses.replace(CONFIG, vocab_size=257, bias=False),
    ],
    ids=["gpt2", "exact-gelu", "no-bias"],
)
def test_transformers_loads_the_export(tmp_path, config):
    os.umask(0o022)
    model = GPT2(config)
    params = jax.tree.map(lambda leaf: leaf + 0.01, init_params(model, jax.random.key(0)))
    params["wte"]["embedding"] = params["wte"]["embedding"].at[257:].set(0)
    run = byte_model(tmp_path / "run", config, params)
    out = convert(str(run), "huggingface", tmp_path / "out")
    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokens = np.random.default_rng(0).integers(0, 257, (2, 32))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert expected.shape == (2, 32, 257)  # the padding of the vocabulary has stayed here
    np.testing.assert_allclose(model.apply({"params": params}, tokens), expected, atol=1e-4)
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert modes == {0o644}  # others may read it, as anything written with this mask
    table = json.loads((out / "config.json").read_text())
    assert table["n_ctx"] == 32  # for llama.cpp
    assert (table["bos_token_id"], table["eos_token_id"]) == (256, 256)
    with safetensors.safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    gpt2 = load(str(out))
    loaded, again = gpt2.model, gpt2.params
    assert loaded.config.bias == config.bias
    same_params(again, params)


def test_bfloat16_exports_round_once(theirs, saved, tmp_path):
    out = convert(str(saved), "huggingface", tmp_path / "out", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    expect(out, rounded(theirs))


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [
        ("llmc", {"gelu": "exact"}, "uses the exact GELU, llm.c only the tanh one"),
        ("llmc", {"bias": False}, "has no biases"),
        ("nanogpt", {}, "uses the tanh GELU, nanoGPT only the exact one"),
    ],
)
def test_what_a_format_cannot_say_is_refused_and_nothing_is_left(tmp_path, to, changes, message):
    config = dataclasses.replace(CONFIG, **changes)
    run = byte_model(tmp_path / "run", config, init_params(GPT2(config), jax.random.key(0)))
    with pytest.raises(UserError, match=message):
        convert(str(run), to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_existing_directory_is_left_alone(saved, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists; give another --out"):
        convert(str(saved), "llmc", tmp_path / "out")


def test_an_export_appears_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    full = "No space left on device"
    for error in (OSError(28, full), safetensors.SafetensorError(full)):

        def broken(*_, error=error, **__):
            assert not (tmp_path / "a" / "out").exists()
            raise error

        monkeypatch.setattr("gpt2_jax.interop.huggingface.save_file", broken)
        with pytest.raises(UserError, match=f"out cannot be written: {full}; give another --out"):
            convert(str(saved), "huggingface", tmp_path / "a" / "out")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_leaves_one_line_and_nothing_else(tmp_path, to):
    config = dataclasses.replace(EXACT if to == "nanogpt" else CONFIG, vocab_size=257, n_embd=128)
    run = byte_model(tmp_path / "run", config, init_params(GPT2(config), jax.random.key(0)))
    command = (
        f"trap '' XFSZ; ulimit -f 100; {sys.executable} -m gpt2_jax.convert --from {run} --to {to} --out {tmp_path}/out"
    )
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert process.returncode == 2, process.stderr
    line = f"error: {tmp_path}/out cannot be written: "
    if to == "orbax":  # its threads report what they met too, in the middle of our line at times
        assert line in process.stderr
    else:
        assert process.stderr.startswith(line)
        assert process.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command_says_what_it_did(saved, tmp_path, capsys):
    assert convert_main(["--from", str(saved), "--to", "llmc", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "3 layers, 4 heads, 32 wide" in printed
    assert "model_00000000.bin" in printed
    assert "make train_gpt2cu PRECISION=FP32" in printed
    with pytest.raises(UserError, match="invalid choice"):
        convert_main(["--from", "x", "--to", "gguf", "--out", "y"])
    with pytest.raises(UserError, match="--dtype bfloat16 is for huggingface and llmc"):
        convert_main(["--from", str(saved), "--to", "orbax", "--out", str(tmp_path / "o"), "--dtype", "bfloat16"])


# --- placement -----------------------------------------------------------------------------------------


def test_loads_into_the_sharding_of_a_mesh(theirs, saved):
    mesh = make_mesh(MeshConfig(2, 4))
    params = load(str(saved), mesh=mesh).params
    shardings = state_sharding(mesh, params)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, params, shardings))
    kernel = params["h_0"]["attn"]["c_attn"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 24)}
    same_params(params, as_params(theirs.state_dict(), CONFIG))


MEMORY = """
import sys, threading, time, jax, torch
from gpt2_jax import load
jax.block_until_ready(jax.numpy.zeros(8))

def anonymous():  # megabytes of this process that are not pages of files
    fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 1024

peak, start = [0.0], anonymous()
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
params = jax.block_until_ready(load(sys.argv[1]).params)
print(peak[0] - start, anonymous() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("kind", ["huggingface", "llmc", "nanogpt", "orbax"])
def test_loading_takes_the_model_and_one_tensor(tmp_path, kind):
    # Like GPT-2, with token embeddings that are the largest tensor by far.
    config = GPT2Config(vocab_size=20000, block_size=64, n_layer=4, n_head=4, n_embd=512, gelu="exact")
    if kind == "llmc":
        config = dataclasses.replace(config, gelu="tanh")
    run = byte_model(tmp_path / "run", config, init_params(GPT2(config), jax.random.key(0)))
    path = convert(str(run), kind, tmp_path / "out")
    (path,) = path.glob("*.bin") if kind == "llmc" else (path,)
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)],
        # With a heap per thread, what glibc keeps of freed memory varies by 30 MB.
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    peak, after = map(float, output.split())
    model = sum(np.prod(shape) for shape in parameter_shapes(config).values()) * 4 / 2**20  # 87 MB
    largest = 20000 * 512 * 4 / 2**20  # 39 MB
    overhead = 60 if kind == "orbax" else 25  # what JAX and Orbax allocate for themselves at first
    assert after > 0.9 * model
    assert peak < model + largest + overhead, output


# --- tokenizers ----------------------------------------------------------------------------------------

ADVERSARIAL = [
    "",
    " ",
    "\n\n\n \t\r\n",
    "Hello, I'm a language model, don't you think? They'll've 1234567 ½ ².",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇪🇺 é é \u200b\ufeff\x00\x7f",
    "lone \ud83d and \udc4d surrogates \ud800",
    "<|endoftext|> is text, <|endoftext|><|endoftext|>, and so is <|fim_prefix|>",
    "日本語とעברית和Русский",
    "a" * 5000,
]


def test_gpt2_tokens_are_tiktokens(gpt2_vocabulary, saved_gpt2):
    import tiktoken

    reference = tiktoken.get_encoding("gpt2")
    for tokenizer in (gpt2_encoding(), open_model(str(saved_gpt2)).tokenizer()):
        assert tokenizer.name == "gpt2"
        assert tokenizer.n_vocab == 50257
        for text in (*ADVERSARIAL, " " * 2**20):
            expected = reference.encode(text, disallowed_special=())
            assert tokenizer.encode_ordinary(text) == expected
            assert (
                tokenizer.decode_bytes(expected)
                == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
            )


@pytest.fixture
def saved_gpt2(gpt2_vocabulary, tmp_path):
    """An export of a model with GPT-2's vocabulary."""
    torch_gpt2(GPT2_VOCABULARY).save_pretrained(tmp_path / "hf")
    return convert(str(tmp_path / "hf"), "huggingface", tmp_path / "gpt2")


def test_auto_tokenizer_gives_the_same_tokens(saved_gpt2, tmp_path, shared_data):
    theirs = AutoTokenizer.from_pretrained(saved_gpt2)
    ours = gpt2_encoding()
    text = (shared_data / "tinyshakespeare.txt").read_text()[:100_000]
    texts = [text, *(text for text in ADVERSARIAL if "endoftext" not in text and "surrogate" not in text)]
    for text in texts:
        assert theirs(text)["input_ids"] == ours.encode_ordinary(text)
    assert theirs.eos_token_id == theirs.bos_token_id == 50256
    assert theirs("<|endoftext|>")["input_ids"] == [50256]  # as with OpenAI's own files
    # What transformers then saves, which is tokenizer.json alone, is read back.
    theirs.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(saved_gpt2 / file, tmp_path / "again")
    assert not (tmp_path / "again" / "vocab.json").exists()
    again = open_model(str(tmp_path / "again")).tokenizer()
    assert again.name == "gpt2"
    assert again.encode_ordinary(text) == ours.encode_ordinary(text)


def test_the_files_of_the_vocabulary_are_openais(saved_gpt2, shared_data):
    openai = shared_data.parent / "gpt2_vocab"
    assert json.loads((saved_gpt2 / "vocab.json").read_text()) == json.loads((openai / "encoder.json").read_text())
    assert (saved_gpt2 / "merges.txt").read_text() == (openai / "vocab.bpe").read_text()


def test_bytes_and_characters_are_exported_too(tmp_path):
    letters = "\n !,.abcdeé😀"
    cases = {
        "bytes": (DataConfig(tokenizer="bytes"), 257, byte_encoding(), "a\x00é😀 \n"),
        "chars": (DataConfig(tokenizer="chars", characters=letters), len(letters), CharTokenizer(letters), "abé😀 \n!"),
    }
    for name, (data, vocab_size, ours, text) in cases.items():
        config = dataclasses.replace(CONFIG, vocab_size=vocab_size)
        run = byte_model(tmp_path / name, config, init_params(GPT2(config), jax.random.key(0)), data)
        out = convert(str(run), "huggingface", tmp_path / f"{name}-out")
        theirs = AutoTokenizer.from_pretrained(out)
        tokens = ours.encode_ordinary(text)
        assert theirs(text)["input_ids"] == tokens
        assert theirs.decode(tokens) == text
        for to in ("huggingface", "llmc", "orbax"):
            back = open_model(str(convert(str(out), to, tmp_path / f"{name}-{to}"))).tokenizer()
            assert back.encode_ordinary(text) == tokens
            assert back.n_vocab == vocab_size


def test_the_end_of_text_is_what_the_config_says(theirs, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    table = json.loads((saved / "config.json").read_text()) | {"eos_token_id": 257}
    (tmp_path / "model" / "config.json").write_text(json.dumps(table))
    source = byte_model(tmp_path / "run", CONFIG, as_params(theirs.state_dict(), CONFIG))
    tokens = convert(str(source), "huggingface", tmp_path / "bytes")
    vocab = json.loads((tokens / "vocab.json").read_text()) | {"</s>": 257}
    del vocab["<|endoftext|>"]
    (tmp_path / "model" / "vocab.json").write_text(json.dumps(vocab | {"<unk>": 256}))
    shutil.copy(tokens / "merges.txt", tmp_path / "model")
    assert open_model(str(tmp_path / "model")).end_of_text == 257
    out = convert(str(tmp_path / "model"), "huggingface", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 257
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 257


def test_byte_pairs_behind_special_tokens_keep_their_merges(tmp_path):
    """Trainers number special tokens first, so that the last merges have numbers beyond the count of byte pairs."""
    merges = ["a b", "c d", "b c", "ab cd", "d bc"]
    pieces = ["<s>", "</s>", "<pad>", *sorted(BYTE), *(merge.replace(" ", "") for merge in merges)]
    files = {"vocab.json": json.dumps({piece: token for token, piece in enumerate(pieces)})}
    files["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""])
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    tokenizer = read_tokenizer(in_directory(tmp_path), 0)
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out", 32, 1)
    assert (tmp_path / "out" / "merges.txt").read_text() == files["merges.txt"]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("abcd", "dbc", "dcba dbcabcd"):
        assert theirs(text)["input_ids"] == tokenizer.encode_ordinary(text)


@pytest.mark.parametrize(
    ("vocab", "merges", "damaged"),
    [
        ({"a": 0}, "", False),
        ({"a": "x"}, "", False),
        ({"a": 1, "b": "x"}, "", True),
        ({"a": 1, "b": 1}, "", False),
        ({"\u3042": 0, "a": 1}, "\u3042 a\n", False),
    ],
)
def test_strange_tokenizer_files_are_unknown_or_damaged(saved, tmp_path, vocab, merges, damaged):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "model" / "merges.txt").write_text("#version: 0.2\n" + merges)
    model = open_model(str(tmp_path / "model"))
    if damaged:
        with pytest.raises(UserError, match="is not a tokenizer of transformers"):
            model.tokenizer()
    else:
        assert model.tokenizer() is None


def test_the_tokenizer_of_a_model_on_the_hub_is_not_guessed(gpt2_vocabulary, tmp_path, monkeypatch):
    """Its cache may hold weights alone; only of OpenAI's own models is it known what they read."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, known in (("someone--portuguese", False), ("gpt2", True)):
        cache = tmp_path / f"models--{name}"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("0" * 40)
        torch_gpt2(GPT2_VOCABULARY).save_pretrained(cache / "snapshots" / ("0" * 40))
        tokenizer = open_model(name.replace("--", "/")).tokenizer()
        assert (tokenizer is not None) == known


def test_a_tokenizer_of_another_kind_is_not_guessed(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    table = {"model": {"type": "WordPiece", "vocab": {}}, "pre_tokenizer": None, "normalizer": None, "added_tokens": []}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(table))
    assert open_model(str(tmp_path / "model")).tokenizer() is None
    with pytest.raises(UserError, match=r"the tokenizer of .* is not known"):
        convert(str(tmp_path / "model"), "orbax", tmp_path / "out")
    out = convert(str(tmp_path / "model"), "huggingface", tmp_path / "out")  # the weights can go
    assert not list(out.glob("*token*"))


# --- bad input -----------------------------------------------------------------------------------------


def break_json(**changes):
    def apply(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def rewrite_tensors(change):
    def apply(directory):
        path = directory / "model.safetensors"
        state = safetensors.torch.load_file(path)
        change(state)
        safetensors.torch.save_file(state, path)

    return apply


def cut(name, keep):
    def apply(directory):
        path = directory / name
        path.write_bytes(path.read_bytes()[:keep])

    return apply


def write(name, content):
    return lambda directory: (directory / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            cut("model.safetensors", -1),
            r"model.safetensors is cut off, damaged or not safetensors \(.*\); copy it again",
        ),
        (cut("model.safetensors", 4), "is cut off, damaged or not safetensors"),
        (write("model.safetensors", b"\xff" * 100), "is cut off, damaged or not safetensors"),
        (cut("config.json", 30), "config.json is not JSON"),
        (lambda directory: (directory / "config.json").unlink(), "without config.json, checkpoints, ckpt.pt or"),
        (lambda directory: (directory / "model.safetensors").unlink(), "has no weights among the files at hand"),
        (break_json(model_type="llama"), r"is of the architecture 'llama' .*expected 'gpt2'"),
        (break_json(n_embd=64), r"h_0/attn/c_attn/bias has the shape \[96\], its config .* says \[192\]; correct"),
        (break_json(n_layer=4), "has no transformer.h.3.ln_1.weight|has no h.3"),
        (break_json(n_layer=2), "has the tensor h.2.attn.c_attn.bias, which a GPT-2 of its config does not have"),
        (break_json(vocab_size=None), "has vocab_size = None in its config; expected a whole number, 1 or more"),
        (break_json(n_layer=2.7), "has n_layer = 2.7 in its config"),
        (break_json(n_embd=-32), "has n_embd = -32"),
        (break_json(n_head=0), "has n_head = 0"),
        (break_json(n_head=5), "has n_embd = 32, which is not a multiple of n_head = 5"),
        (break_json(n_inner=100), "has n_inner = 100"),
        (break_json(activation_function="relu"), "has activation_function = 'relu'"),
        (break_json(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True"),
        (break_json(layer_norm_epsilon=1e-6), "layer_norm_epsilon = 1e-06"),
        (break_json(bias=False), "says that there are no biases, and h.0.attn.c_attn.bias is not zero"),
        (rewrite_tensors(lambda state: state.pop("transformer.ln_f.bias")), r"has no ln_f.bias, which a GPT-2"),
        (
            rewrite_tensors(lambda state: state.update({"lm_head.weight": torch.zeros(300, 32)})),
            "has a head of its own, lm_head.weight",
        ),
        (
            rewrite_tensors(lambda state: state.update({"transformer.wpe.weight": torch.zeros(32, 32).int()})),
            "wpe/embedding holds int32; expected float32",
        ),
        (write("model.safetensors.index.json", b"{}"), None),
    ],
)
def test_a_damaged_directory_has_its_line(saved, tmp_path, damage, message):
    directory = tmp_path / "model"
    shutil.copytree(saved, directory)
    damage(directory)
    if message is None:  # what is not needed does not matter
        load(str(directory))
        return
    with pytest.raises(UserError, match=message) as error:
        load(str(directory))
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"\x00" * 4 + data[4:], "is not a model of llm.c: it starts with 0; expected .* 20240326"),
        (lambda data: data[:100], "it has only 100 bytes"),
        (lambda data: data[:4] + struct.pack("<i", 1) + data[8:], r"has version 1 of llm.c's format; expected 3"),
        (lambda data: data[:-2], "is cut off or damaged: its header means"),
        (lambda data: data + b"\x00", "is cut off or damaged"),
        (lambda data: data[:28] + struct.pack("<i", 3) + data[32:], "impossible header: 300 tokens padded to 3"),
        (
            lambda data: data[:20] + struct.pack("<i", 5) + data[24:],
            "has n_embd = 32, which is not a multiple of n_head = 5",
        ),
    ],
)
def test_a_damaged_file_of_llmc_has_its_line(theirs, tmp_path, change, message):
    path = tmp_path / "model_00000000.bin"
    path.write_bytes(change(llmc_bytes(theirs, CONFIG, 3)))
    with pytest.raises(UserError, match=message):
        load(str(path))


def test_a_damaged_file_of_nanogpt_has_its_line(tmp_path):
    path = tmp_path / "ckpt.pt"

    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            load(str(path))
        assert "\n" not in str(error.value)

    checkpoint = nanogpt_checkpoint(torch_gpt2(EXACT), EXACT)
    torch.save(checkpoint | {"config": Trap(tmp_path / "sprung")}, path)
    refused("holds Python objects beside tensors, and reading those could run any code")
    assert not (tmp_path / "sprung").exists()
    torch.save(checkpoint, path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused("is cut off, damaged or not torch's")
    path.write_bytes(b"no checkpoint at all")
    refused("is not a checkpoint that torch can read|cannot be read")
    torch.save(checkpoint["model"], path)
    refused("is not nanoGPT's: it holds .*expected model and model_args among them")
    torch.save(checkpoint | {"model_args": None}, path)
    refused("its model and model_args are not both dicts")
    torch.save(checkpoint | {"model_args": checkpoint["model_args"] | {"n_head": 5}}, path)
    refused("is not a multiple of n_head = 5")
    torch.save(checkpoint | {"model": {"a": 1}}, path)
    refused("its model holds something else than tensors")
    integers = {name: tensor.int() for name, tensor in checkpoint["model"].items()}
    torch.save(checkpoint | {"model": integers}, path)
    refused("holds int32; expected float32")
    torch.save(checkpoint | {"model_args": {"n_layer": 3}}, path)
    refused("model_args has no block_size")
    del checkpoint["model"]["transformer.h.1.ln_2.weight"]
    torch.save(checkpoint, path)
    refused("has no transformer.h.1.ln_2.weight, which a GPT-2")
    checkpoint["model"]["transformer.h.1.ln_2.weight"] = torch.zeros(33)
    torch.save(checkpoint, path)
    refused(r"h_1/ln_2/scale has the shape \[33\]")
    checkpoint["model"]["transformer.h.9.ln_2.weight"] = torch.zeros(32)
    torch.save(checkpoint, path)
    refused("has transformer.h.9.ln_2.weight, which a GPT-2 of its model_args does not have")


def test_torch_is_needed_for_its_own_files_only(saved, tmp_path, monkeypatch):
    torch.save({}, tmp_path / "ckpt.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    load(str(saved))
    with pytest.raises(UserError, match=r"ckpt.pt needs torch, which is not installed; type pip install torch"):
        load(str(tmp_path / "ckpt.pt"))


def test_a_checkpoint_that_is_not_whole_has_its_line(theirs, tmp_path):
    run = byte_model(tmp_path / "run", CONFIG, as_params(theirs.state_dict(), CONFIG))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load(str(tmp_path / "empty"))
    (run / "config.toml").write_text(to_toml(ModelConfig(dataclasses.replace(CONFIG, n_layer=4))))
    with pytest.raises(UserError, match="has no h_3"):
        load(str(run))
    (run / "checkpoints" / "3" / "state" / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"the checkpoint .* is not whole"):
        load(str(run))
    shutil.rmtree(run / "checkpoints" / "3" / "state")
    with pytest.raises(UserError, match=r"the checkpoint .* (cannot be read|is not whole)"):
        load(str(run))
    with pytest.raises(UserError, match="does not exist; expected a run directory or a checkpoint in it"):
        load(str(tmp_path / "nothing"))
