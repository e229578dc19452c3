"""A process whose save failed ends at once. (faults/test_damage.py: a restore that fails prints nothing.)"""

import os
import subprocess
import sys

FAILING_SAVE = """
import shutil, sys
from pathlib import Path
import jax.numpy as jnp
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.cli import silence_third_parties

silence_third_parties()
directory, state = Path(sys.argv[1]), {name: jnp.ones((64, 64)) for name in "abcdefgh"}
with Checkpoints(directory, keep=2) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    shutil.rmtree(directory)
    directory.touch()  # no directory can be made in it, not even by root
    checkpoints.save(2, state, {})
    try:
        checkpoints.wait()
    except NotADirectoryError:
        print("failed")
"""


def test_a_process_whose_save_failed_ends_at_once_and_prints_nothing(tmp_path):
    """A process of its own: Orbax's threads would delay its exit by ten minutes."""
    words = [sys.executable, "-c", FAILING_SAVE, str(tmp_path / "c")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "failed\n", "")
