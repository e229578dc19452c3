"""The line about work that has no memory left. The commands' own tests are with the commands."""

import functools
import weakref
from operator import mul

import jax
import jax.numpy as jnp
import pytest

from gpt2_jax.errors import UserError
from gpt2_jax.hardware import GIB
from gpt2_jax.planning import shortage
from gpt2_jax.planning.shortage import Setting, explaining_memory, naming_a_smaller_setting


@pytest.fixture(autouse=True)
def sixteen_gib(monkeypatch):
    monkeypatch.setattr(shortage, "available_memory", lambda device: 16 * GIB)


def unused():
    raise AssertionError("compiled without a need")


SETTINGS = [Setting({"--fewer": fewer}, unused) for fewer in (16, 8)]
HERE = "while in test_shortage.test_the_first_smaller_setting_that_fits_is_named"
ERRORS = [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("now", "sizes", "message"),
    [
        (20, {8: 17, 4: 14, 2: None}, "work needs 20 of 16 GiB on cpu; type --fewer 4"),
        # A device's allocator does not fill its memory without gaps: 15.5 of 16 GiB are too much.
        (20, {8: 15.5, 4: 15}, "work needs 20 of 16 GiB on cpu; type --fewer 4"),
        (20, {8: 18}, "work needs 20 of 16 GiB on cpu; no smaller setting fits; take a smaller model"),
        (
            10,
            {8: 9, 4: None},
            f"cpu had no memory left {HERE}, though work needs 10 of 16 GiB: another program may use it too; stop that "
            "program, or type --fewer 8",
        ),
        (
            10,
            {},
            f"cpu had no memory left {HERE}, though work needs 10 of 16 GiB: another program may use it too; stop that "
            "program",
        ),
    ],
)
def test_the_first_smaller_setting_that_fits_is_named(error, now, sizes, message):
    settings = [
        Setting({"--fewer": fewer}, unused if size is None else functools.partial(mul, size, GIB))
        for fewer, size in [(16, now), *sizes.items()]
    ]
    with pytest.raises(UserError) as raised, naming_a_smaller_setting("work", settings):
        raise error
    assert str(raised.value) == message
    assert raised.value.__cause__ is error


def test_another_error_passes():
    with pytest.raises(ValueError, match="another"), naming_a_smaller_setting("work", SETTINGS[:1]):
        raise ValueError("another")


@pytest.mark.parametrize(("settings", "advice"), [(SETTINGS, "type --fewer 8"), (SETTINGS[:1], "take a ")])
def test_without_a_figure_or_with_several_processes_nothing_is_compiled(monkeypatch, settings, advice):
    message = f"^cpu had no memory left while .*; {advice}"
    with monkeypatch.context() as patch:
        patch.setattr(shortage, "available_memory", lambda device: None)
        with pytest.raises(UserError, match=message), naming_a_smaller_setting("work", settings):
            raise MemoryError
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=message), naming_a_smaller_setting("work", settings):
        raise MemoryError


@pytest.mark.parametrize("error", ERRORS)
def test_a_compiler_without_memory_leaves_the_plain_line(error):
    def explain(available: int, doing: str) -> str:
        raise error

    with (
        pytest.raises(UserError, match=r"^cpu had no memory left while .*; type less$"),
        explaining_memory(explain, "type less"),
    ):
        raise MemoryError


def test_the_arrays_of_the_work_are_free_when_programs_are_compiled():
    arrays: list[weakref.ref[jax.Array]] = []

    def work() -> None:
        array = jnp.ones(8)
        arrays.append(weakref.ref(array))
        raise MemoryError

    def explain(available: int, doing: str) -> str:
        assert arrays[0]() is None
        return "explained"

    with pytest.raises(UserError, match=r"^explained$"), explaining_memory(explain, ""):
        work()
