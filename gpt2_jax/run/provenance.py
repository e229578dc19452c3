"""What trains a run: the code, the versions of its libraries, and the devices.

All processes have to agree on the code and the versions. Each checkpoint records them, so that a resumed run can say
what changed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from gpt2_jax.distributed.agreement import assert_equal
from gpt2_jax.errors import strip_controls

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# Those that decide the bits of the result, by their names in the line about a change.
_PROGRAM = {"code": "code of gpt2_jax", "jax": "jax", "jaxlib": "jaxlib", "flax": "flax", "optax": "optax"}
_DEVICES = {"device": "devices", "processor": "processor", "mesh": "mesh"}


def hash_sources(package: Path) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the names and contents of all .py files below a directory."""
    digest = hashlib.sha256()
    names = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    for name, path in sorted(names.items()):
        if path.is_file():  # Emacs marks a file that it edits with a link to nowhere
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


@functools.cache  # as they were when the process first asked: somebody may edit or install while it trains
def software() -> Mapping[str, str]:
    """The hash of the package's code, and the versions of Python and of the libraries."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"code": hash_sources(PACKAGE), "python": f"{sys.version_info.major}.{sys.version_info.minor}", **versions}


def check_same_software() -> None:
    """Checks that all processes run the same code with the same versions.

    Raises:
        UserError: the code or a version differs from that of process 0.
    """
    lines = "\n".join(f"{name} {version}" for name, version in software().items())
    assert_equal("software", lines, "install the same code and the same versions on every host")


def made_by(mesh: Mesh) -> dict[str, str]:
    """The entry "made_by" of a checkpoint: `software`, the kind of the devices, and the mesh with its processes.

    On CPU also the model of the processor: the same program rounds differently on another one.
    """
    device = mesh.devices.flat[0]
    processor = {"processor": processor_name()} if device.platform == "cpu" else {}
    shape = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    several = f" over {count} processes" if (count := jax.process_count()) > 1 else ""
    return {**software(), "device": device.device_kind, **processor, "mesh": shape + several}


@functools.cache
def processor_name() -> str:
    """The model of the processor by /proc/cpuinfo, as "AMD EPYC, family 25, model 17"; elsewhere by the system."""
    try:
        info = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return platform.processor()
    names = [re.search(rf"^{key}\s*: (.*)$", info, re.MULTILINE) for key in ("model name", "cpu family", "model")]
    return ", ".join(prefix + name[1] for prefix, name in zip(("", "family ", "model "), names, strict=True) if name)


def describe_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The line about what changed since a checkpoint was saved and changes the bits of the result; "" for nothing.

    Args:
        before: `made_by` in the checkpoint.
        now: `made_by` of this process. Keys that one of them does not have did not change.
    """
    changed = [key for key in (*_PROGRAM, *_DEVICES) if key in before and key in now and before[key] != now[key]]
    if not changed:
        return ""
    listed = ", ".join(f"{(_PROGRAM | _DEVICES)[key]} {before[key]} -> {now[key]}" for key in changed)
    only = " (only rounding changes, and dropout masks)" if changed == ["mesh"] else ""
    return strip_controls(f"{listed}; from here on the run need not equal an undisturbed one bit for bit{only}")
