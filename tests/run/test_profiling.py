"""The profile of a run: which updates are traced, that tracing changes nothing, and where the time went."""

import gzip
import itertools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from gpt2_jax import train as training
from gpt2_jax.config import differences
from gpt2_jax.config.flags import parse_args
from gpt2_jax.config.validation import validate
from gpt2_jax.errors import UserError
from gpt2_jax.metrics import read_rows
from gpt2_jax.run import operations
from gpt2_jax.run.operations import PARTS, read_profile
from gpt2_jax.run.profiling import SUMMARY, parse_updates, traced

TINY = ["--config", "quickstart", "--steps", "12", "--batch_size", "4", "--micro_batch_size", "2", "--log.every", "1",
        "--model.n_layer", "2", "--model.n_embd", "16", "--model.n_head", "2", "--model.block_size", "16",
        "--optimizer.warmup_steps", "2", "--eval.tokens", "16", "--eval.sample_tokens", "0"]  # fmt: skip


def traced_steps(directory):
    """The numbers of the updates in the only trace of a directory."""
    (file,) = directory.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
    return sorted({dict(event.stats)["step_num"] for event in events})


@pytest.fixture
def run(tmp_path):
    """Trains and returns the run directory."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} squared is {number * number}\n" for number in range(200)))

    def run(name, *flags, devices=1):
        args = [*TINY, "--data.text", str(text), "--out", str(tmp_path / name), *flags]
        assert training.train(parse_args("train", "", args), jax.devices()[:devices]) == 0
        return tmp_path / name

    return run


def results(out):
    rows = [row for row in read_rows(out / "metrics.jsonl") if "loss" in row]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.slow
def test_a_traced_run_has_the_same_losses(run):
    plain, profiled = run("plain"), run("traced", "--log.profile", "10:2")
    assert len(results(plain)) == 12
    assert results(profiled) == results(plain)
    assert traced_steps(profiled / "profile") == [10, 11]
    assert not (plain / "profile").exists()


@pytest.mark.slow
def test_xprof_and_perfetto_have_the_updates_by_their_numbers(run):
    """XProf reads one of the two files of a trace. The other is JSON in the format that Perfetto documents."""
    raw_to_tool_data = pytest.importorskip("xprof.convert.raw_to_tool_data", reason="needs pip install xprof")
    directory = run("run", "--log.profile", "6:3") / "profile"
    (file,) = directory.rglob("*.xplane.pb")
    shown, _ = raw_to_tool_data.xspace_to_tool_data([str(file)], "trace_viewer", {})
    (other,) = directory.rglob("*.trace.json.gz")
    for text in (shown, gzip.decompress(other.read_bytes())):
        events = [event for event in json.loads(text)["traceEvents"] if event.get("ph") == "X"]
        assert all({"name", "ts", "dur", "pid", "tid"} <= event.keys() for event in events)
        steps = [event["args"] for event in events if event["name"].split()[0] == "train"]
        assert [step["step_num"] for step in steps] == ["6", "7", "8"]
    table, _ = raw_to_tool_data.xspace_to_tool_data([str(file)], "hlo_stats", {})
    assert json.loads(table)["cols"]


@pytest.mark.parametrize(
    "flags",
    [[], pytest.param(["--model.scan_layers", "true", "--model.remat", "full"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_the_time_of_an_update_is_split_among_the_parts_of_the_model(run, capsys, flags):
    out = run("run", "--log.profile", "6:3", *flags, devices=2)
    lines = (out / "profile" / SUMMARY).read_text().splitlines()
    assert lines[0].startswith("profile: updates 6 to 8, ")
    printed = capsys.readouterr().out
    assert all(line in printed for line in lines)
    shares = {part: int(share) for share, part in re.findall(r"(\d+)% ([^,]+)", lines[0])}
    assert {"attention", "MLP", "norms and residuals", "head and loss", "optimizer", "collectives"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(100, abs=5)  # each is rounded
    assert shares.get("other", 0) < 15  # nearly every instruction has a name that is understood
    assert len(lines) == 2 + operations.N_LONGEST
    assert any("mlp" in line or "attn" in line for line in lines[2:])


def test_the_busy_time_is_that_of_the_other_file_of_the_trace(tmp_path):
    @jax.jit
    def update(state, tokens):
        for _ in range(8):
            with jax.named_scope("mlp"):
                state = jnp.tanh(state @ state)
        return state, None

    with traced(update, tmp_path, 0, range(2, 4), print) as traced_update:
        state = jnp.full((300, 300), 0.1)
        for _ in range(4):
            state, _ = traced_update(state, jnp.int32(0))
    program = update.lower(state, jnp.int32(0)).compile().as_text()
    profile = read_profile(tmp_path, program, 2)
    (file,) = tmp_path.rglob("*.trace.json.gz")  # written by XLA from the same events, in microseconds
    events = [event for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
              if event.get("args", {}).get("hlo_module") == "jit_update"
              and not event["name"].startswith("end")]  # fmt: skip
    busy, until = 0.0, 0.0
    for event in sorted(events, key=lambda event: event["ts"]):
        end = event["ts"] + event["dur"]
        busy += max(0.0, end - max(event["ts"], until))
        until = max(until, end)
    assert 2e6 * profile.seconds * (1 - profile.shares[operations.GAPS]) == pytest.approx(busy, rel=1e-3)
    assert 2e6 * profile.seconds == pytest.approx(until - min(event["ts"] for event in events), rel=1e-3)
    assert profile.shares["MLP"] > 0.5
    assert sum(profile.shares.values()) == pytest.approx(1)
    # Which of the two takes longer depends on the machine and on what else it does.
    assert {operation.name: operation.calls for operation in profile.longest} == {"mlp/dot_general": 8, "mlp/tanh": 8}
    assert profile.longest == sorted(profile.longest, key=lambda operation: -operation.seconds)


BACKWARD = "jit(update)/transpose(jvp(GPT2.hidden))/GPT2._backbone/h_11/attn/mul"
PROGRAM = f"""HloModule jit_update, is_scheduled=true
  %all-reduce-start.1 = f32[8]{{0}} all-reduce-start(%p), metadata={{op_name="jit(update)/psum"}}
  %fusion.1 = f32[8]{{0}} fusion(%p), metadata={{op_name="{BACKWARD}"}}
  %fusion.2 = f32[8]{{0}} fusion(%p), metadata={{op_name="jit(update)/optimizer/add"}}
  ROOT %while.1 = f32[8]{{0}} while(%p), body=%body
"""


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_traces_of_gpus_and_tpus(monkeypatch, tmp_path, kind):
    """By the forms that the profilers of these devices are known to write; no trace of a real one was at hand."""

    def event(name, start, end):
        stats = {"hlo_op": name, "hlo_module": "jit_update"} if kind == "gpu" else {}
        shown = "void kernel<float>" if kind == "gpu" else f"%{name} = f32[8]{{0}} fusion(f32[8]{{0}} %p)"
        return SimpleNamespace(name=shown, start_ns=start, end_ns=end, stats=stats.items())

    compute = [event("while.1", 0, 100), event("fusion.1", 0, 40), event("fusion.2", 60, 80)]
    exchange = [event("all-reduce-start.1", 30, 70)]
    other = SimpleNamespace(name="Steps", events=[event("fusion.1", 0, 1000)])
    if kind == "gpu":
        lines = [SimpleNamespace(name="Stream #1(Compute)", events=compute),
                 SimpleNamespace(name="Stream #2(NCCL)", events=exchange)]  # fmt: skip
    else:
        lines = [SimpleNamespace(name="XLA Ops", events=compute + exchange), other]
    planes = [SimpleNamespace(name=f"/device:{kind.upper()}:{number}", lines=lines) for number in range(2)]
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda name: SimpleNamespace(planes=planes))
    (tmp_path / "host.xplane.pb").touch()
    profile = read_profile(tmp_path, PROGRAM, 1)
    assert profile.seconds == pytest.approx(80e-9)
    expected = {"attention": 40 / 80, "optimizer": 20 / 80, "collectives": 20 / 80}  # the rest of it is hidden
    assert {part: share for part, share in profile.shares.items() if share} == pytest.approx(expected)
    names = [(operation.name, operation.calls) for operation in profile.longest]
    assert names[0] == ("h_*/attn/mul, backward", 1)
    assert set(names[1:]) == {("optimizer/add", 1), ("all-reduce-start psum", 1)}


@pytest.mark.parametrize("method", ["start_trace", "stop_trace"])
def test_a_profiler_that_fails_does_not_stop_the_run(monkeypatch, tmp_path, method):
    def fail(*args):
        raise OSError("No space left on device")

    if method == "stop_trace":
        monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: None)
    monkeypatch.setattr(jax.profiler, method, fail)
    lines = []
    with traced(jax.jit(lambda state, tokens: (state + 1, None)), tmp_path, 0, range(1, 3), lines.append) as update:
        assert update(jnp.int32(1), jnp.int32(0))[0] == 2
        assert update(jnp.int32(2), jnp.int32(0))[0] == 3
    assert [line for line in lines if line.startswith("profile: ") and line.endswith("No space left on device")]
    assert len(lines) <= 2


def test_a_trace_that_cannot_be_read_does_not_stop_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(operations, "_read_events", lambda *args: {})
    lines = []
    with traced(jax.jit(lambda state, tokens: (state + 1, None)), tmp_path, 0, range(1, 2), lines.append) as update:
        assert update(jnp.int32(1), jnp.int32(0))[0] == 2
    assert lines[0].startswith("profile: the trace cannot be written or read: ")
    assert "no event of the program jit__lambda" in lines[0]
    assert lines[1].startswith("type xprof --logdir ")


@pytest.mark.parametrize(
    ("text", "steps"), [("103:2", [103, 104]), ("99:4", [101, 102]), ("111:9", [111, 112]), ("90:5", [])]
)
def test_a_resumed_run_is_traced_where_it_has_not_been(tmp_path, text, steps):
    update = jax.jit(lambda state, tokens: (state + 1, None))
    state = jnp.int32(100)
    with traced(update, tmp_path, 100, parse_updates(text), print) as traced_update:
        for _ in range(12):
            state, _ = traced_update(state, jnp.int32(0))
    assert state == 112
    assert (traced_steps(tmp_path) if steps else list(tmp_path.iterdir())) == steps


def test_without_updates_to_trace_the_update_is_called_itself(tmp_path):
    with traced(itertools.repeat, tmp_path, 0, parse_updates(""), print) as update:
        assert update is itertools.repeat


@pytest.mark.parametrize("text", ["5", "0:5", "5:0", "-1:5", "5:", ":", "1:2:3", "a:b", "٣:١"])
def test_the_updates_to_trace_are_checked(text):
    with pytest.raises(UserError, match=r"log.profile = '.*'; expected START:COUNT, such as 100:5"):
        validate(parse_args("train", "", [*TINY, f"--log.profile={text}"]))


def test_a_profile_changes_no_mathematics():
    plain, profiled = (parse_args("train", "", [*TINY, *flags]) for flags in ([], ["--log.profile", "10:2"]))
    assert differences(plain, profiled) == {}


def test_every_part_is_found_in_names_of_the_model():
    for name, part in {
        "jit(update)/jvp(GPT2.hidden)/GPT2._backbone/h_0/attn/c_attn/dot_general": "attention",
        "jit(update)/jvp(GPT2.hidden)/GPT2._backbone/h/mlp/tanh": "MLP",
        "jit(update)/jvp(GPT2.hidden)/GPT2._backbone/h_0/add": "norms and residuals",
        "jit(update)/jvp(GPT2.hidden)/GPT2._backbone/ln_f/mul": "norms and residuals",
        "jit(update)/jvp(GPT2.hidden)/GPT2._backbone/wte/jit(_take)/gather": "embeddings",
        "jit(update)/transpose(jvp(head_and_loss))/mul": "head and loss",
        "jit(update)/optimizer/jit(clip)/min": "optimizer",
    }.items():
        assert next(part for part, pattern in PARTS.items() if pattern.search(name)) == part
