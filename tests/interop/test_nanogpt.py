"""nanoGPT's `ckpt.pt`: checkpoints as its train.py saves them, read and written."""

import dataclasses
import itertools
import pickle
import shutil
import sys
import time
import tracemalloc

import pytest
import torch
from model_files import EXACT, Trap, assert_loads, assert_same_params, nanogpt_checkpoint, random_params, save_run
from torch_gpt2 import as_params, torch_gpt2

from gpt2_jax import load
from gpt2_jax.convert import convert
from gpt2_jax.data.tokenizer import read_characters
from gpt2_jax.errors import UserError
from gpt2_jax.interop import open_model


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_nanogpt_loads(theirs_exact, tmp_path, prefix):
    torch.save(nanogpt_checkpoint(theirs_exact, EXACT, prefix), tmp_path / "ckpt.pt")
    assert_loads(tmp_path / "ckpt.pt", theirs_exact, EXACT)
    assert_loads(tmp_path, theirs_exact, EXACT)  # nanoGPT's out_dir
    assert open_model(str(tmp_path)).step == 7


def test_a_checkpoint_without_biases_loads(tmp_path):
    config = dataclasses.replace(EXACT, bias=False)
    theirs = torch_gpt2(config)
    torch.save(nanogpt_checkpoint(theirs, config), tmp_path / "ckpt.pt")
    params = load(str(tmp_path)).params
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if not name.endswith("bias")}
    assert_same_params(params, as_params(weights, config))


def test_meta_pkl_gives_the_characters_and_runs_no_code(tmp_path, monkeypatch):
    config = dataclasses.replace(EXACT, vocab_size=3)
    (tmp_path / "out").mkdir()
    torch.save(nanogpt_checkpoint(torch_gpt2(config), config), tmp_path / "out" / "ckpt.pt")
    model = open_model(str(tmp_path / "out"))
    assert model.tokenizer is None
    monkeypatch.chdir(tmp_path / "out")  # where the path does not name the directories above
    model = open_model("ckpt.pt")
    meta = tmp_path / "data" / "letters" / "meta.pkl"
    meta.parent.mkdir(parents=True)
    table = {"vocab_size": 3, "itos": {0: "\n", 1: "b", 2: "é"}, "stoi": {"\n": 0, "b": 1, "é": 2}}
    meta.write_bytes(pickle.dumps(table))
    assert model.tokenizer.encode_ordinary("bé\n") == [1, 2, 0]
    (tmp_path / "runs" / "deep").mkdir(parents=True)
    shutil.copy("ckpt.pt", tmp_path / "runs" / "deep")
    monkeypatch.chdir(tmp_path)  # nanoGPT's directory, where it looks for data/
    assert open_model("runs/deep").tokenizer.encode_ordinary("bé\n") == [1, 2, 0]
    model = open_model("out")
    meta.write_bytes(pickle.dumps({"itos": Trap(tmp_path / "sprung")}))
    with pytest.raises(UserError, match="is not nanoGPT's table of characters"):
        model.open_tokenizer()
    assert not (tmp_path / "sprung").exists()


TABLE = {"vocab_size": 3, "itos": {0: "\n", 1: "b", 2: "é"}, "stoi": {"\n": 0, "b": 1, "é": 2}}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_meta_pkl_of_every_protocol_is_read(tmp_path, protocol):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(TABLE, protocol))
    assert read_characters(path).characters == "\nbé"
    letters = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    table = {"itos": dict(enumerate(letters)), "stoi": {letter: token for token, letter in enumerate(letters)}}
    if protocol >= 2:  # nanoGPT's are 3 or newer
        path.write_bytes(pickle.dumps(table, protocol))
        assert read_characters(path).n_vocab == len(letters)


HEAD = b"\x80\x04\x95\x3d\x00\x00\x00\x00\x00\x00\x00"  # protocol 4 and a frame


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEAD + b"}\x94(\x8c\x04itosr\x75\x75\x28\x4bK\x00u.", "no dict itos"),  # memory for 1.3 billion entries
        (HEAD + b"}r\xff\xff\xff\x7f.", "it has no dict itos"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.", "it has no dict itos"),
        (HEAD + b"r\x75\x6f\x04\x69", "list index out of range|pickle exhausted"),
        (pickle.dumps({"itos": ["a", "b"]}), "it holds EMPTY_LIST"),
        (pickle.dumps({"itos": {0: "a", 1: b"b"}}), "it holds SHORT_BINBYTES"),
        (pickle.dumps({"itos": {0: "a", 1: 2}}), "a token is not one character"),
        (pickle.dumps({"itos": {0: "ab"}}), "a token is not one character"),
        (pickle.dumps({"itos": {0: "a", 2: "b"}}), "no token 1"),
        (pickle.dumps({"itos": {0: "a", 1: "a"}}), "a character is there twice"),
        (pickle.dumps({"itos": {0: "\ud800"}}), "a character is there twice, or half of one"),
        (pickle.dumps({"itos": {}}), "it has no characters"),
        (pickle.dumps({0: {}, 1: {}, 2: {}}), "it has too many dicts"),
        (pickle.dumps("itos"), "it has no dict itos"),
        (b"\x80\x04" + b"}" * 2**20, "it has too many dicts"),
        (b"\x80\x04" + b"(" * 2**22, "it is larger than 2,097,152 bytes"),
        (pickle.dumps(TABLE)[:-9], "is not nanoGPT's table of characters"),
        (b"", "is not nanoGPT's table of characters"),
    ],
    ids=itertools.count(),
)
def test_a_hostile_meta_pkl_is_refused_at_once_in_little_memory(tmp_path, content, message):
    (tmp_path / "meta.pkl").write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(UserError, match=message) as error:
        read_characters(tmp_path / "meta.pkl")
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("config", [EXACT, dataclasses.replace(EXACT, bias=False)], ids=["bias", "no-bias"])
def test_converting_to_the_same_format_writes_the_same_dict(tmp_path, config):
    original = nanogpt_checkpoint(torch_gpt2(config), config)
    torch.save(original, tmp_path / "ckpt.pt")
    convert(str(tmp_path / "ckpt.pt"), "nanogpt", tmp_path / "out")
    written = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert written["model_args"] == original["model_args"]
    assert written["iter_num"] == 7
    assert written["model"].keys() == original["model"].keys()
    for name, tensor in original["model"].items():
        assert torch.equal(written["model"][name], tensor)


class NanoGPT(torch.nn.Module):
    """The parameters of nanoGPT's model under its names, in its order, with its optimizer (`configure_optimizers`)."""

    def __init__(self, n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout):
        super().__init__()

        def norm():
            return torch.nn.LayerNorm(n_embd, bias=bias)

        def linear(inputs, outputs):
            return torch.nn.Linear(inputs * n_embd, outputs * n_embd, bias=bias)

        def modules(**parts):
            return torch.nn.ModuleDict(parts)

        def block():
            attn, mlp = (
                modules(c_attn=linear(1, 3), c_proj=linear(1, 1)),
                modules(c_fc=linear(1, 4), c_proj=linear(4, 1)),
            )
            return modules(ln_1=norm(), attn=attn, ln_2=norm(), mlp=mlp)

        self.transformer = modules(
            wte=torch.nn.Embedding(vocab_size, n_embd),
            wpe=torch.nn.Embedding(block_size, n_embd),
            h=torch.nn.ModuleList([block() for _ in range(n_layer)]),
            ln_f=norm(),
        )
        self.lm_head = torch.nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def configure_optimizers(self):
        parameters = dict(self.named_parameters()).values()
        groups = [
            {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": 1e-1},
            {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))


@pytest.mark.parametrize("config", [EXACT, dataclasses.replace(EXACT, bias=False)], ids=["bias", "no-bias"])
def test_nanogpt_resumes_from_a_converted_checkpoint(tmp_path, config):
    """The steps of nanoGPT's train.py with --init_from=resume, and the first update."""
    run = save_run(tmp_path / "run", config, random_params(config), step=9)
    convert(str(run), "nanogpt", tmp_path / "out")
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", map_location="cpu")
    model = NanoGPT(**checkpoint["model_args"])
    model.load_state_dict(checkpoint["model"])
    assert checkpoint["iter_num"] == 9
    assert torch.tensor(3.0) < checkpoint["best_val_loss"]  # the first evaluation is the best one
    optimizer, fresh = model.configure_optimizers(), NanoGPT(**checkpoint["model_args"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    fresh.load_state_dict(checkpoint["model"])
    expected = fresh.configure_optimizers()
    assert [len(group["params"]) for group in optimizer.param_groups] == [14, 26 if config.bias else 7]
    for one, parts in ((optimizer, model), (expected, fresh)):
        for group in one.param_groups:
            group["lr"] = 1e-3  # as train.py sets it before each update
        for parameter in parts.parameters():
            parameter.grad = torch.ones_like(parameter)
        one.step()
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # the same as with a new optimizer


def test_a_damaged_checkpoint_is_one_clear_line(theirs_exact, tmp_path):
    path = tmp_path / "ckpt.pt"

    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            load(str(path))
        assert "\n" not in str(error.value)

    checkpoint = nanogpt_checkpoint(theirs_exact, EXACT)
    torch.save(checkpoint | {"config": Trap(tmp_path / "sprung")}, path)
    refused("holds Python objects besides tensors, and reading them could run arbitrary code")
    assert not (tmp_path / "sprung").exists()
    torch.save(checkpoint, path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused("is cut off, damaged or not torch's")
    path.write_bytes(b"no checkpoint at all")
    refused("is not a checkpoint that torch can read|cannot be read")
    torch.save(checkpoint["model"], path)
    refused("is not a nanoGPT checkpoint: it holds .*; expected model and model_args")
    torch.save(checkpoint | {"model_args": None}, path)
    refused("expected dicts as its model and model_args")
    torch.save(checkpoint | {"model_args": checkpoint["model_args"] | {"n_head": 5}}, path)
    refused("is not a multiple of n_head = 5")
    torch.save(checkpoint | {"model": {"a": 1}}, path)
    refused("holds no state dict; expected a dict with only tensors as values")
    integers = {name: tensor.int() for name, tensor in checkpoint["model"].items()}
    torch.save(checkpoint | {"model": integers}, path)
    refused("holds int32; expected float32")
    torch.save(checkpoint | {"model_args": {"n_layer": 3}}, path)
    refused(r"h_2/ln_1/scale has the shape \[32\], but its config implies \[768\]")  # nanoGPT's default
    del checkpoint["model"]["transformer.h.1.ln_2.weight"]
    torch.save(checkpoint, path)
    refused("has no h.1.ln_2.weight, which a GPT-2")
    checkpoint["model"]["transformer.h.1.ln_2.weight"] = torch.zeros(33)
    torch.save(checkpoint, path)
    refused(r"h_1/ln_2/scale has the shape \[33\]")
    checkpoint["model"]["transformer.h.9.ln_2.weight"] = torch.zeros(32)
    torch.save(checkpoint, path)
    refused("has the tensor h.9.ln_2.weight, which a GPT-2 of its config does not have")


def test_only_files_that_torch_saved_need_torch(saved, tmp_path, monkeypatch):
    torch.save({}, tmp_path / "ckpt.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    load(str(saved))
    with pytest.raises(UserError, match=r"ckpt.pt needs torch, which is not installed; type pip install torch"):
        load(str(tmp_path / "ckpt.pt"))
