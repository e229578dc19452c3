"""The pages of docs/ as a site: it builds without a warning, and the page of every key is that of the dataclasses."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt2_jax.config import TrainConfig, flatten

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("site_of_docs", ROOT / "docs" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_every_key_is_that_of_the_dataclasses(site):
    page = site.CONFIGURATION.read_text(encoding="utf-8")
    assert page == site.configuration(), "type python docs/site.py"
    rows = dict(re.findall(r"^\| `([\w.]+)` \| [^|]+ \| ?(?:`(.*?)`)? \| ", page, re.MULTILINE))
    shown = {key: json.dumps(value).replace("()", "[]") for key, value in flatten(TrainConfig("", 0, 0)).items()}
    assert rows == shown | {"out": "", "steps": "", "batch_size": ""}


def test_links_out_of_the_pages_lead_to_the_repository(site):
    page = "[a](../bench/gpu.sh), [b](data.md#speed), ![c](../x.png)"
    assert site.on_page_markdown(page, SimpleNamespace(repo_url="")) == "a, [b](data.md#speed), c"
    linked = site.on_page_markdown(page, SimpleNamespace(repo_url="https://example.org/r"))
    assert linked == "[a](https://example.org/r/blob/main/bench/gpu.sh), [b](data.md#speed), c"


@pytest.mark.filterwarnings("default")  # those of the site are counted, and those of its libraries are not ours
def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path):
    mkdocs = pytest.importorskip("mkdocs.config")
    build = importlib.import_module("mkdocs.commands.build").build
    config = mkdocs.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    build(config)  # strict: a warning is an error
    listed = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("nav:")[1]))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}
    for name in listed:
        assert (tmp_path / ("" if name == "index.md" else name[:-3]) / "index.html").exists()
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "Sum of −log p(target) in nats" in api  # a docstring of gpt2_jax/loss.py
