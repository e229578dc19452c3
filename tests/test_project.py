"""Files around the package agree: versions, console scripts, checks and constraints."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(("script", "target"), PROJECT["scripts"].items())
def test_console_scripts_run_the_commands(monkeypatch, script, target):
    name, function = target.split(":")
    assert script == "gpt2-" + name.removeprefix("gpt2_jax.")
    module = importlib.import_module(name)
    started = []
    monkeypatch.setattr(module, "run_command", started.append)
    getattr(module, function)()
    assert started == [module.main]


def test_every_file_has_the_same_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest
    assert PROJECT["version"] == citation["version"] == newest[1]


def test_pre_commit_runs_the_checks_of_ci_that_need_no_tests_and_mypy_for_windows():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    steps = re.findall(r"^step (.*)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    windows = "mypy --platform win32 --cache-dir .mypy_cache/win32"  # takes a minute, and names rarely change
    assert hooks == [*(step for step in steps if not re.search(r"\b(pip|pytest)\b", step)), windows]


@pytest.mark.parametrize("path", sorted((ROOT / "constraints").glob("*.txt")), ids=lambda path: path.stem)
def test_constraints_pin_what_the_project_requires(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *(line for name in ("data", "fast", "test") for line in extras[name])]:
        requirement = Requirement(line)
        if requirement.name != PROJECT["name"]:
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, line
