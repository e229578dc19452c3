"""An undisturbed run, copies of it to damage, and a hook that acts in the middle of a run."""

import shutil

import pytest
from faulty import CONFIG, TEXT, names, run

from gpt2_jax import train as training


@pytest.fixture(scope="session")
def flags(tmp_path_factory):
    """The flags of a tiny run on a text of its own, with evaluations and saves."""
    directory = tmp_path_factory.mktemp("faults")
    (directory / "tiny.toml").write_text(CONFIG)
    (directory / "text.txt").write_text(TEXT)
    return ["--config", str(directory / "tiny.toml"), "--data.text", str(directory / "text.txt")]


@pytest.fixture(scope="session")
def whole(flags, tmp_path_factory):
    """The directory of the run that nobody disturbed, with the checkpoints 2, 4, 6, 8 and 10."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(flags, out) == 0
    return out


@pytest.fixture
def stopped(whole, tmp_path):
    """Copies the undisturbed run as a kill after update 8 would have left it, with these checkpoints."""

    def stopped(*steps):
        out = tmp_path / "run"
        shutil.copytree(whole, out)
        for name in set(names(out)) - {str(step) for step in steps}:
            shutil.rmtree(out / "checkpoints" / name)
        return out

    return stopped


@pytest.fixture
def after_update(monkeypatch):
    """`after_update(k, act)` calls `act(state, metrics)` after update k of the process, and takes what it returns.

    With `times`, it does so after as many updates, from update k on.
    """
    make_train_step = training.make_train_step

    def after_update(number, act, times=1):
        count = 0  # also goes on when the run continues from a checkpoint

        def make(*args, **keywords):
            step = make_train_step(*args, **keywords)

            def update(*inputs):
                nonlocal count
                count += 1
                outputs = step(*inputs)
                return (act(*outputs) or outputs) if number <= count < number + times else outputs

            update.lower = step.lower
            return update

        monkeypatch.setattr(training, "make_train_step", make)

    return after_update
