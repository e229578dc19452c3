"""What made a checkpoint: its record, the line about a change, and processes with different software."""

import json
import re
import subprocess

import jax
import jaxlib
import optax
import pytest

from gpt2_jax import train as training
from gpt2_jax.checkpoint_info import seal
from gpt2_jax.config import MeshConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.distributed import agreement
from gpt2_jax.errors import UserError
from gpt2_jax.run import provenance
from gpt2_jax.sharding import make_mesh

TINY = ["--config", "quickstart", "--batch_size", "2", "--model.n_layer", "1", "--model.n_embd", "8",
        "--model.n_head", "1", "--model.block_size", "8", "--optimizer.warmup_steps", "1", "--optimizer.decay_steps",
        "9", "--eval.tokens", "8", "--eval.sample_tokens", "0"]  # fmt: skip


def test_the_hash_is_of_names_and_contents(tmp_path):
    (tmp_path / "inner").mkdir()
    first, second = tmp_path / "first.py", tmp_path / "inner" / "second.py"
    first.write_text("a")
    second.write_text("b")
    seen = {before := provenance.hash_sources(tmp_path)}
    (tmp_path / "notes.txt").write_text("no code")
    (tmp_path / ".#first.py").symlink_to("somebody@somewhere.1234")  # as Emacs marks a file that it edits
    assert provenance.hash_sources(tmp_path) == before
    second.write_text("c")
    seen.add(provenance.hash_sources(tmp_path))
    second.rename(tmp_path / "inner" / "third.py")
    seen.add(provenance.hash_sources(tmp_path))
    first.write_text("ac")  # the same letters in other files
    (tmp_path / "inner" / "third.py").write_text("")
    seen.add(provenance.hash_sources(tmp_path))
    assert len(seen) == 4


def test_the_hash_is_sha256_in_the_order_of_the_names(tmp_path):
    """The reference sorts with `sort` and hashes with `sha256sum`."""
    for name in ("b.py", "B.py", "a/z.py", "a.py", "a-b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name * 2)
    script = (
        "find . -name '*.py' | sed 's|^./||' | LC_ALL=C sort | while read -r name; do "
        'printf "%s\\0%s\\0" "$name" "$(wc -c < "$name")"; cat "$name"; done | sha256sum'
    )
    expected = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert provenance.hash_sources(tmp_path) == expected.stdout[:12]


def test_versions_are_those_of_the_imported_libraries():
    assert provenance.software()["jax"] == jax.__version__
    assert provenance.software()["jaxlib"] == jaxlib.__version__


BEFORE = {"code": "aa", "python": "3.11", "jax": "1.0", "jaxlib": "1.0", "flax": "1.0", "optax": "1.0",
          "orbax-checkpoint": "1.0", "numpy": "1.0", "device": "cpu", "processor": "x86",
          "mesh": "data 1 × fsdp 1"}  # fmt: skip


@pytest.mark.parametrize("key", ["python", "numpy", "orbax-checkpoint"])
def test_what_changes_no_bits_is_not_mentioned(key):
    assert provenance.describe_changes(BEFORE, BEFORE | {key: "2.0"}) == ""


@pytest.mark.parametrize("key", ["code", "jax", "jaxlib", "flax", "optax", "device", "processor"])
def test_what_may_change_bits_is_named(key):
    line = provenance.describe_changes(BEFORE, BEFORE | {key: "new"})
    assert f"{BEFORE[key]} -> new;" in line
    assert line.endswith("need not equal an undisturbed one bit for bit")
    older = {name: version for name, version in BEFORE.items() if name != key}
    assert provenance.describe_changes(older, BEFORE) == ""


def test_the_processor_is_recorded_where_it_computes():
    made_by = provenance.made_by(make_mesh(MeshConfig(), jax.devices()[:1]))
    assert made_by["processor"] == provenance.processor_name() != ""
    on_gpu = {key: value for key, value in BEFORE.items() if key != "processor"} | {"device": "gpu"}
    line = provenance.describe_changes(BEFORE, on_gpu)
    assert line.startswith("devices cpu -> gpu; ")


def test_another_mesh_is_said_to_change_only_rounding():
    line = provenance.describe_changes(BEFORE, BEFORE | {"mesh": "data 8 × fsdp 1"})
    assert line.startswith("mesh data 1 × fsdp 1 -> data 8 × fsdp 1;")
    assert "only rounding" in line
    assert "only rounding" not in provenance.describe_changes(BEFORE, BEFORE | {"mesh": "new", "optax": "new"})


def test_a_process_with_other_software_is_refused_in_one_line(monkeypatch):
    theirs = "code aa\njax 9.9"
    monkeypatch.setattr(agreement, "broadcast_from_primary", lambda name, value: theirs)
    monkeypatch.setattr(provenance, "software", lambda: {"code": "aa", "jax": "9.8"})
    with pytest.raises(UserError) as error:
        provenance.check_same_software()
    assert str(error.value) == (
        "the software differs from process 0: jax 9.8 here, jax 9.9 on process 0; install the same code and the same "
        "versions on every host"
    )


@pytest.mark.slow
def test_a_resumed_run_says_what_changed_since_its_checkpoint(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} squared is {number * number}\n" for number in range(60)))

    def run(steps):
        args = [*TINY, "--data.text", str(text), "--out", str(tmp_path / "run"), "--steps", str(steps)]
        assert training.train(parse_args("train", "", args), jax.devices()[:1]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if re.match("changed|run .* resumed", line)]

    assert run(1) == []
    info = tmp_path / "run" / "checkpoints" / "1" / "info" / "metadata"
    saved = json.loads(info.read_text())
    used = saved["made_by"]["optax"]
    assert used == optax.__version__
    facts = {key: value for key, value in saved.items() if key not in ("step", "metrics", "checksum")}
    facts["made_by"] |= {"optax": "0.0", "numpy": "0.0"}
    info.write_text(json.dumps(seal(1, saved["metrics"], facts)))
    changed, resumed = run(2)
    assert changed.startswith(f"changed   optax 0.0 -> {used}; ")
    assert "resumed after update 1" in resumed


@pytest.mark.slow
def test_a_run_resumes_silently_on_the_same_software_and_from_older_checkpoints(tmp_path, capsys):
    args = [*TINY, "--data.text", provenance.__file__, "--out", str(tmp_path / "run")]

    def run(steps):
        assert training.train(parse_args("train", "", [*args, "--steps", str(steps)]), jax.devices()[:1]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if re.match("changed|run .* resumed", line)]

    assert run(1) == []
    (resumed,) = run(2)
    info = tmp_path / "run" / "checkpoints" / "2" / "info" / "metadata"
    saved = json.loads(info.read_text())
    info.write_text(json.dumps({key: saved[key] for key in ("data", "layout", "sha256")}))
    (resumed,) = run(3)
    assert "resumed after update 2" in resumed
