"""A run on a device with little memory: what it takes, keeps and remembers, and the line when nothing is left."""

import dataclasses
import json

import jax
import pytest

from gpt2_jax import train as training
from gpt2_jax.checkpoint_info import COMPLETE, INFO, seal
from gpt2_jax.compilation_cache import ProgramCache
from gpt2_jax.config.flags import parse_args
from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import GIB
from gpt2_jax.metrics import read_rows
from gpt2_jax.planning import micro_batch, shortage
from gpt2_jax.planning.estimate import Memory, TooLargeError, compile_step
from gpt2_jax.run import fitting
from gpt2_jax.run.provenance import made_by
from gpt2_jax.sharding import make_mesh

TINY = ["--config", "quickstart", "--batch_size", "16", "--model.n_layer", "1", "--model.n_head", "2",
        "--model.block_size", "64", "--model.n_embd", "64", "--optimizer.warmup_steps", "1",
        "--optimizer.decay_steps", "9", "--eval.tokens", "64", "--eval.sample_tokens", "0",
        "--micro_batch_size", "auto"]  # fmt: skip
MEMORY = 6 << 20  # bytes. Micro-batches of 4 take 4 MiB, those of 16 take 12.


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Trains on a device with `memory` bytes. Returns the settings, the banner's line, and the sizes compiled for."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} squared is {number * number}\n" for number in range(1000)))
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(training.runtime, "enable_compilation_cache", lambda name: ProgramCache(cache, 1 << 30))
    compiled = []

    def compile_and_count(config, *args):
        compiled.append(config.micro_batch_size)
        return compile_step(config, *args)

    monkeypatch.setattr(micro_batch, "compile_step", compile_and_count)

    def train(name, steps, memory=MEMORY, flags=()):
        compiled.clear()
        monkeypatch.setattr(fitting, "available_memory", lambda device: memory)
        args = [*TINY, "--data.text", str(text), "--out", str(tmp_path / name), "--steps", str(steps), *flags]
        assert training.train(parse_args("train", "", args), jax.devices()[:1]) == 0
        config = read_config(str(tmp_path / name / "config.toml"))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory ")]
        return (config.micro_batch_size, config.model.remat), "".join(lines), list(compiled)

    return train


@pytest.mark.slow
def test_a_small_device_gets_a_run_that_fits_and_the_search_is_remembered(run):
    settings, line, compiled = run("a", 1)
    assert settings == (4, "none")
    assert "of 0.00586 GiB, found in" in line
    assert 1 <= len(compiled) <= micro_batch.MAX_COMPILATIONS
    again, line, compiled = run("b", 1)
    assert (again, compiled) == (settings, [])
    assert "as found before" in line
    # Resumed here, it stays as it was. Otherwise it would not be bit for bit the run that was not interrupted.
    resumed, line, compiled = run("a", 2, 4 * MEMORY)
    assert (resumed, compiled) == (settings, [])
    assert "as before" in line
    larger, _, compiled = run("c", 1, 4 * MEMORY)
    assert larger[0] == 16
    assert compiled[-1] == 16


@pytest.mark.slow
def test_a_model_of_27_million_parameters_trains_in_2_gib(run, tmp_path):
    sizes = {"n_layer": 8, "n_head": 8, "n_embd": 512, "block_size": 512, "scan_layers": "true"}
    flags = [word for key, size in sizes.items() for word in (f"--model.{key}", str(size))]
    (size, remat), line, compiled = run("run", 1, 2 * GIB, [*flags, "--batch_size", "8"])
    assert remat == "none"
    assert size in (2, 4)  # 4 takes 1.90 GiB, just below the limit
    assert "of 2 GiB, found in" in line
    assert size in compiled
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == [1]
    config = read_config(str(tmp_path / "run" / "config.toml"))
    assert compile_step(config, jax.devices()[:1], None).memory.required <= 2 * GIB
    usable = int(micro_batch.USABLE * 2 * GIB)
    next_larger = dataclasses.replace(config, micro_batch_size=2 * size)  # that divides the batch
    with pytest.raises(TooLargeError) as error:
        compile_step(next_larger, jax.devices()[:1], usable)
    assert error.value.memory.required > usable


def write_checkpoint(path, devices):
    """All of a checkpoint that a search reads."""
    (path / INFO).parent.mkdir(parents=True)
    (path / INFO).write_text(json.dumps(seal(int(path.name), {}, {"made_by": devices})))
    (path / COMPLETE).touch()


@pytest.mark.parametrize(
    ("change", "searches"),
    [
        ({}, False),
        ({"jax": "0.0.1", "processor": "another"}, False),
        ({"device": "NVIDIA H100 80GB HBM3"}, True),
        ({"mesh": "data 2 × fsdp 1"}, True),
        ({"mesh": "data 1 × fsdp 1 over 2 processes"}, True),
    ],
)
def test_a_run_that_resumes_on_other_devices_is_fitted_anew(tmp_path, monkeypatch, change, searches):
    args = ["--config", "quickstart", "--micro_batch_size", "auto", "--out", str(tmp_path), "--batch_size", "16"]
    config = parse_args("train", "", args)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    for step, entries in ((10, {"device": "an older one"}), (20, change)):  # the newest decides
        write_checkpoint(tmp_path / "checkpoints" / str(step), made_by(mesh) | entries)
    assert fitting._ran_here(config, mesh) != searches
    found = micro_batch.Fit(2, "none", Memory(900, 1000), 1)
    monkeypatch.setattr(fitting, "available_memory", lambda device: 1000)
    monkeypatch.setattr(fitting, "fit", lambda *args: found)
    saved = dataclasses.replace(config, micro_batch_size=8)
    size, line = (2, f"{found.memory}, found in 1 compilation") if searches else (8, "as before")
    fitted, said = fitting.fitted(config, saved, mesh, None)
    assert (fitted.micro_batch_size, said) == (size, line)
    assert fitting.fitted(config, None, mesh, None)[0].micro_batch_size == 2  # a new run


@pytest.mark.parametrize(
    ("entry", "available", "is_used"),
    [
        ([4, "none", 900, 1000], 1000, True),
        ([4, "none", 900, 1000], 940, False),  # somebody else uses the device
        ([4, "none", 900, 1000], 1100, False),  # or no longer does
        ([4, "none", 900, 1000], None, False),
    ],
)
def test_what_is_remembered_has_to_fit_now(entry, available, is_used):
    found = fitting._remembered(json.dumps(entry), available)
    assert bool(found) == is_used
    if found:
        assert found[:3] == (4, "none", Memory(900, available))
    assert fitting._remembered("", 1000) is None


def test_the_search_does_not_depend_on_where_the_run_writes():
    config = read_config("gpt2-124m")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    elsewhere = dataclasses.replace(config, out="x", steps=7, eval=dataclasses.replace(config.eval, every=3))
    assert fitting._facts(elsewhere, mesh) == fitting._facts(config, mesh)
    assert fitting._facts(dataclasses.replace(config, batch_size=256), mesh) != fitting._facts(config, mesh)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (
            Memory(20 * GIB, 15 * GIB),
            "^the training step needs 20 of 15 GiB on cpu; type --micro_batch_size 8$",
        ),
        (
            Memory(10 * GIB, 15 * GIB),
            "^cpu had no memory left while evaluating, though the training step needs 10 of 15 GiB: another program "
            "may use it too; stop that program, or type --micro_batch_size 8$",
        ),
    ],
)
@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_out_of_memory_is_one_line_with_the_smallest_change(monkeypatch, memory, message, error):
    config = dataclasses.replace(read_config("gpt2-124m"), micro_batch_size=16)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    mesh = make_mesh(config.mesh, jax.devices()[:1])

    def compiled(config, devices, available):
        if not memory.fits:
            raise TooLargeError(memory)
        return dataclasses.make_dataclass("Step", ["memory"])(memory)

    def change(config, devices, memory):
        assert not memory.fits
        return micro_batch.Change(8)

    monkeypatch.setattr(shortage, "available_memory", lambda device: memory.available)
    monkeypatch.setattr(fitting, "compile_step", compiled)
    monkeypatch.setattr(fitting, "smallest_change", change)
    with pytest.raises(UserError, match=message), fitting.explaining_memory(config, mesh):
        exec("raise error", {"__name__": "gpt2_jax.run.evaluating", "error": error})
    with pytest.raises(ValueError, match="another"), fitting.explaining_memory(config, mesh):
        raise ValueError("another")


def test_a_device_of_unknown_memory_and_several_processes_get_a_line_without_a_search(monkeypatch):
    config = dataclasses.replace(read_config("gpt2-124m"), micro_batch_size=16)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    monkeypatch.setattr(shortage, "available_memory", lambda device: None)
    message = r"^cpu had no memory left while .*; type a smaller --micro_batch_size than 16$"
    with pytest.raises(UserError, match=message), fitting.explaining_memory(config, mesh):
        raise MemoryError
