"""What another thread is doing, in words, and how much of it is done."""

import importlib
import inspect
import sys
import threading
import time
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import activity
from gpt2_jax.activity import DEVICE, Activity, Stopwatch, activity_of, describe, tracked
from gpt2_jax.config import MeshConfig
from gpt2_jax.config.flags import parse_args
from gpt2_jax.data import corpus, encode, open_data
from gpt2_jax.data.pipeline import read_ahead
from gpt2_jax.data.tokenizer import gpt2_encoding
from gpt2_jax.run.evaluating import validation_loss
from gpt2_jax.sharding import make_mesh


def what_it_does(work):
    """What `describe` says of a thread in the middle of `work`, which gets a function to wait in."""
    inside, leave = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert leave.wait(20)

    thread = threading.Thread(target=work, args=(wait,))
    thread.start()
    assert inside.wait(20)
    time.sleep(0.05)  # until those that wait for it do
    said = describe(activity._outwards(sys._current_frames()[thread.ident]))
    leave.set()
    thread.join()
    return said


def test_names_a_batch():
    class Source:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return self.wait() or index

    def work(wait):
        Source.wait = staticmethod(wait)
        list(read_ahead(Source(), 0, 4))

    assert what_it_does(work) == "reading a batch of training data"


def test_names_compilation():
    def work(wait):
        jax.jit(lambda x: wait() or x + 1).lower(jnp.zeros(3))

    assert what_it_does(work) == "compiling"


def test_compilation_has_no_share():
    def work(wait):
        for _ in tracked("ab", total=2):
            jax.jit(lambda x: wait(activity_of(threading.get_ident())) or x + 1).lower(jnp.zeros(3))

    seen = []
    work(seen.append)
    assert seen == [Activity("compiling")] * 2


def test_names_the_place_it_does_not_know():
    assert what_it_does(lambda wait: wait()) == "in threading.wait"


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ({"gpt2_jax.train": "train"}, DEVICE),  # a compiled program has no frame
        ({"gpt2_jax.train": "train", "jax._src.api": "block_until_ready"}, DEVICE),
        ({"gpt2_jax.train": "train", "gpt2_jax.run.reporting": "update", "jax._src.array": "_value"}, DEVICE),
        ({"gpt2_jax.run.reporting": "update", "rich.console": "print"}, activity._DOING["gpt2_jax.run.reporting"]),
        ({"gpt2_jax.run.evaluating": "validation_loss", "jax._src.array": "_value"}, "evaluating"),
        ({"gpt2_jax.run.checkpoints": "save", "gpt2_jax.distributed.agreement": "barrier"}, "saving a checkpoint"),
        ({"gpt2_jax.run.checkpoints": "restore_or_init"}, activity._DOING["gpt2_jax.run.checkpoints.restore_or_init"]),
        (
            {"gpt2_jax.run.checkpoints": "restore_or_init", "gpt2_jax.data.contents": "_hash"},
            "hashing the token files",
        ),
        ({"gpt2_jax.distributed.agreement": "stop_requested", "jax.experimental": "f"}, "waiting for another process"),
    ],
)
def test_names_the_outermost_phase(modules, expected):
    frame = None
    for module, function in modules.items():  # each calls the next
        frame = Frame({"__name__": module}, types.SimpleNamespace(co_name=function), frame)
    assert describe(activity._outwards(frame)) == expected


class Frame(NamedTuple):
    """What `describe` reads of a frame."""

    f_globals: dict[str, str]
    f_code: types.SimpleNamespace
    f_back: "Frame | None"


def test_every_place_exists():
    """A module or method that is renamed would lose its words."""
    for place in activity._DOING:
        try:
            importlib.import_module(place)
        except ModuleNotFoundError:
            name, _, function = place.rpartition(".")
            module = importlib.import_module(name)
            classes = [value for value in vars(module).values() if getattr(value, "__module__", "") == name]
            assert any(function in vars(holder) for holder in (module, *filter(inspect.isclass, classes))), place
    for module in (*activity._COMPILERS, *activity._CALLS_DEVICE):
        importlib.import_module(module)


# --- how much of it is done ------------------------------------------------------------------------------


def share_here():
    return activity_of(threading.get_ident()).share


def test_the_share_of_the_items_that_are_finished():
    shares = []
    for _ in tracked([1, 2, 1], total=4, size=float):
        shares.append(share_here())
    assert shares == [0.0, 0.25, 0.75]
    assert share_here() is None


def test_work_within_work_is_a_part_of_its_share():
    shares = []
    for _ in tracked("ab", total=2):
        for _ in tracked("cd", total=2):
            shares.append(share_here())
        shares.append(share_here())
    assert shares == [0.0, 0.25, 0.0, 0.5, 0.75, 0.5]


def test_an_error_ends_the_share():
    def fail():
        for _ in tracked("ab", total=0):
            raise ValueError(share_here())

    with pytest.raises(ValueError, match=r"0\.0") as kept:
        fail()
    assert share_here() is None
    for _ in tracked("ab", total=2):
        shares = [share_here()]
        kept = None  # what was given up ends now
        shares.append(share_here())
        assert shares[0] == shares[1] is not None
    assert kept is share_here() is None


def test_a_long_text_has_a_share(gpt2_vocabulary, monkeypatch):
    monkeypatch.setattr(encode.importlib.util, "find_spec", lambda name: None)  # no gigatoken
    monkeypatch.setattr(encode, "PIECE_BYTES", 100)
    shares = []
    encode_piece = encode.encode_byte_pairs
    monkeypatch.setattr(encode, "encode_byte_pairs", lambda *args: shares.append(share_here()) or encode_piece(*args))
    encode.encode_document(gpt2_encoding(), b"word " * 100)
    np.testing.assert_allclose(shares, [0.0, 0.198, 0.388, 0.578, 0.768, 0.958])  # cuts are before spaces: 99, 95, …


def test_what_another_thread_does():
    started, end, found = threading.Event(), threading.Event(), list[Stopwatch]()

    def work():
        found.append(Stopwatch())
        for item in tracked([False, True], total=2):
            if item:
                started.set()
                end.wait()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    while found[0].line() != "in threading.wait, 50%, 0:00":  # it is on its way there
        time.sleep(0.001)
    end.set()
    thread.join()
    assert str(Activity("evaluating")) == "evaluating"
    assert Stopwatch().line() == ""


def test_reading_and_evaluating_have_a_share(tmp_path, monkeypatch):
    """The share of a validation reaches the last batch, and that of a text its last document."""
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text("some words " * 40)
    shares = []
    encode_document = corpus.encode_document
    monkeypatch.setattr(corpus, "encode_document", lambda *args: shares.append(share_here()) or encode_document(*args))
    flags = ["--config", "quickstart", "--data.text", str(tmp_path / "*.txt"), "--model.block_size", "16",
             "--batch_size", "2", "--micro_batch_size", "2"]  # fmt: skip
    data, config = open_data(parse_args("train", "", flags))
    assert shares == [0.0, 0.25, 0.5, 0.75]
    shares.clear()

    def evaluate(params, batch):
        shares.append(share_here())
        return jnp.zeros(()), jnp.ones(())

    validation_loss(evaluate, data.val, config, make_mesh(MeshConfig(), jax.devices()[:1]), {}, 0)
    targets = data.val.n_tokens - len(data.val.streams)
    np.testing.assert_allclose(shares, np.arange(len(shares)) * 2 * 16 / targets)
    assert 1 - shares[-1] <= 2 * 16 / targets
