"""The line about work that a device has no memory left for: what it needs, what there is, and what to type."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import jax

from gpt2_jax.activity import activity_before
from gpt2_jax.errors import UserError, is_out_of_memory
from gpt2_jax.hardware import available_memory
from gpt2_jax.planning.estimate import Memory
from gpt2_jax.planning.micro_batch import USABLE


@contextmanager
def explaining_memory(explain: Callable[[int, str], str], otherwise: str) -> Iterator[None]:
    """Replaces the error of a device that has no memory left by one line.

    Args:
        explain: the line, from the bytes that were available before, and from "while" and what the thread was doing. It
            may compile programs: the functions that the context called have released their arrays by then.
        otherwise: what to type if the memory of the device is unknown, or if there are several processes: the others
            may not compile with this one.

    Raises:
        UserError: no memory is left.
    """
    device = jax.local_devices()[0]
    available = available_memory(device)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        doing = f"while {activity_before(error)}"
        traceback.clear_frames(error.__traceback__)
        line = f"{device.device_kind} had no memory left {doing}; {otherwise}"
        if available and jax.process_count() == 1:
            try:
                line = explain(available, doing)
            except Exception as another:  # the compiler tries kernels on the device, whose memory may be full still
                if not is_out_of_memory(another):
                    raise
        raise UserError(line) from error


def shortage(work: str, memory: Memory, doing: str, change: str, otherwise: str = "take a smaller model") -> str:
    """The line about work that ran out of memory on the attached devices.

    Args:
        work: its name.
        memory: what it needs on each device, and what there was.
        doing: "while" and what the thread was doing, which need not be that work; "" if nothing has run yet.
        change: the flags with which it fits; "" if there are none.
        otherwise: what to do if there are none.
    """
    kind = jax.local_devices()[0].device_kind
    if not memory.fits:
        advice = f"type {change}" if change else f"no smaller setting fits; {otherwise}"
        return f"{work} needs {memory} on {kind}; {advice}"
    return (
        f"{kind} had no memory left {doing}, though {work} needs {memory}: another program may use it too; stop that "
        f"program{f', or type {change}' if change else ''}"
    )


class Setting(NamedTuple):
    """Flags with their values, and the bytes that the work then requires on each device.

    `required` compiles the programs of the work.
    """

    flags: dict[str, Any]
    required: Callable[[], int]


def naming_a_smaller_setting(work: str, settings: Sequence[Setting]) -> AbstractContextManager[None]:
    """`explaining_memory` with the first smaller setting that fits.

    Args:
        work: its name.
        settings: the present one, and then those that require less, the best one first. All have the same flags.
    """
    now, *smaller = settings

    def changes(setting: Setting) -> str:
        return " ".join(f"{flag} {value}" for flag, value in setting.flags.items() if value != now.flags[flag])

    def explain(available: int, doing: str) -> str:
        fitting = next((setting for setting in smaller if setting.required() <= USABLE * available), now)
        return shortage(work, Memory(now.required(), available), doing, changes(fitting))

    return explaining_memory(explain, f"type {changes(smaller[0])}" if smaller else "take a smaller model")
