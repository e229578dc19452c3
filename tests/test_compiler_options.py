"""The options of XLA that follow from a config, a chip and the user's environment."""

import pytest

from gpt2_jax import compiler_options as module
from gpt2_jax.compiler_options import compiler_options, named_options
from gpt2_jax.config import TrainConfig
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import CHIPS, Hardware

BASE = {"out": "runs/x", "steps": 1, "batch_size": 1}


def options_of(platform, kind="", environment=None, **keys):
    return compiler_options(TrainConfig(**BASE, **keys), Hardware(platform, kind=kind), environment or {})


@pytest.mark.parametrize(
    ("keys", "platform", "options"),
    [
        ({}, "cuda", {}),
        ({"deterministic": True}, "cpu", {}),
        ({"deterministic": True}, "tpu", {}),
        ({"deterministic": True}, "cuda", {"xla_gpu_deterministic_ops": True}),
        ({"sdc_checker": True}, "tpu", {"xla_tpu_enable_sdc_checker": True}),
    ],
)
def test_options_that_the_config_asks_for(keys, platform, options):
    assert options_of(platform, **keys) == options
    assert options_of(platform, compiler_options="experimental", **keys) == options


def test_the_checker_of_tpus_is_refused_elsewhere():
    with pytest.raises(UserError, match="sdc_checker = true needs tpu, found cuda; type --sdc_checker false"):
        options_of("cuda", sdc_checker=True)


def test_every_chip_with_options_is_in_the_table_of_chips():
    assert module.EXPERIMENTAL.keys() <= CHIPS.keys()


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
@pytest.mark.parametrize("form", ["--{}=false", "--{}", "--no{}", "-{}=0", "--xla_dump_to=/x --{}=1"])
def test_an_option_of_the_user_is_left_alone(monkeypatch, variable, form):
    monkeypatch.setitem(module.EXPERIMENTAL, "TPU v0", {"xla_tpu_a": True, "xla_tpu_ab": 7})
    environment = {variable: form.format("xla_tpu_a")}
    assert options_of("tpu", "TPU v0", environment) == {}
    on = {"compiler_options": "experimental"}
    assert options_of("tpu", "TPU v0", **on) == {"xla_tpu_a": True, "xla_tpu_ab": 7}
    assert options_of("tpu", "TPU v0", environment, **on) == {"xla_tpu_ab": 7}


def test_the_options_of_the_user_may_be_in_a_file(tmp_path):
    (tmp_path / "flags").write_text("--xla_a=1\n--xla_b\n")
    assert named_options({"XLA_FLAGS": str(tmp_path / "flags")}) == {"xla_a", "xla_b"}
