"""The profile of a run: which updates are traced, and that tracing changes nothing."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from gpt2_jax import train as training
from gpt2_jax.config import differences
from gpt2_jax.config.flags import parse_args
from gpt2_jax.config.validation import validate
from gpt2_jax.errors import UserError
from gpt2_jax.metrics import read_rows
from gpt2_jax.run.profiling import traced

TINY = ["--config", "quickstart", "--steps", "12", "--batch_size", "4", "--micro_batch_size", "2", "--log.every", "1",
        "--model.n_layer", "1", "--model.n_embd", "16", "--model.n_head", "2", "--model.block_size", "16",
        "--optimizer.warmup_steps", "2", "--eval.tokens", "16", "--eval.sample_tokens", "0"]  # fmt: skip


def traced_steps(directory):
    """The numbers of the updates in the only trace of a directory."""
    (file,) = directory.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
    return sorted({dict(event.stats)["step_num"] for event in events})


@pytest.mark.slow
def test_a_traced_run_has_the_same_losses(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} squared is {number * number}\n" for number in range(200)))

    def run(out, *flags):
        args = [*TINY, "--data.text", str(text), "--out", str(out), *flags]
        assert training.train(parse_args("train", "", args), jax.devices()[:1]) == 0
        rows = [row for row in read_rows(out / "metrics.jsonl") if "loss" in row]
        return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]

    plain = run(tmp_path / "plain")
    assert len(plain) == 12
    assert run(tmp_path / "traced", "--log.profile_steps", "2") == plain
    assert traced_steps(tmp_path / "traced" / "profile") == [10, 11]
    assert not (tmp_path / "plain" / "profile").exists()


@pytest.mark.parametrize(("count", "steps"), [(2, [110, 111]), (9, [110, 111, 112])])
def test_a_resumed_run_is_traced_from_its_tenth_update(tmp_path, count, steps):
    def update(state, tokens):
        return state + 1, None

    state = jnp.int32(100)
    with traced(update, tmp_path, 100, count) as traced_update:
        for _ in range(12):
            state, _ = traced_update(state, None)
    assert traced_steps(tmp_path) == steps
    assert state == 112


def test_without_profile_steps_the_update_is_called_itself(tmp_path):
    with traced(itertools.repeat, tmp_path, 0, 0) as update:
        assert update is itertools.repeat


def test_profile_steps_are_checked_and_change_no_mathematics():
    plain, profiled = (parse_args("train", "", [*TINY, *flags]) for flags in ([], ["--log.profile_steps", "2"]))
    assert differences(plain, profiled) == {}
    with pytest.raises(UserError, match=r"log.profile_steps = -1; expected 0 or more"):
        validate(parse_args("train", "", [*TINY, "--log.profile_steps", "-1"]))
