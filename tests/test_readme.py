"""What the README shows works."""

import re
from pathlib import Path

from gpt2_jax.config import preset_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["logits"].shape == (1, 3, 50257)


def test_every_preset_and_every_file_is_named():
    for preset in preset_names():
        assert f"`{preset}`" in README
    for path in (ROOT / "gpt2_jax").rglob("*.py"):
        assert path.name == "__init__.py" or re.search(rf"^ +{path.name} ", README, re.MULTILINE), path


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
