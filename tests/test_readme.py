"""What the README shows works."""

import re
from pathlib import Path

from gpt2_jax.config import validate
from gpt2_jax.config.toml import preset_names, read_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["logits"].shape == (1, 3, 50257)


def test_the_config_example_is_one(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "config.toml").write_text('out = "run"\nsteps = 1000\nbatch_size = 8\n' + example)
    config = read_config(str(tmp_path / "config.toml"))
    validate(config)
    assert [source.weight for source in config.data.sources] == [0.8, 0.2]


def test_every_preset_and_every_file_is_named():
    for preset in preset_names():
        assert f"`{preset}`" in README
    for path in (ROOT / "gpt2_jax").rglob("*.py"):
        assert path.name == "__init__.py" or re.search(rf"^ +{path.name} ", README, re.MULTILINE), path


def test_links_lead_somewhere():
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert target[1:] in headings if target.startswith("#") else (ROOT / target).exists(), target
