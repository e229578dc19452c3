"""README.md and docs/: snippets run, commands exist, links lead somewhere, tables are complete."""

import re
import shlex
from pathlib import Path

import jax
import pytest
from commands import check_flags

from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import DataConfig, GPT2Config, ModelConfig
from gpt2_jax.config.toml import preset_names, read_config, to_toml
from gpt2_jax.config.validation import validate
from gpt2_jax.model import GPT2, init_params

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]


def blocks(page: str, language: str = r"\w*") -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


# --- snippets ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory) -> str:
    """A run directory with a model on bytes, in place of the released GPT-2."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    config = GPT2Config(vocab_size=257, block_size=128, n_layer=1, n_head=2, n_embd=16)
    out.mkdir()
    (out / "config.toml").write_text(to_toml(ModelConfig(config, DataConfig(tokenizer="bytes"))))
    with Checkpoints(out / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, {"params": init_params(GPT2(config), jax.random.key(0))}, {})
    return str(out)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_snippets_run(page, tiny_gpt2, tmp_path):
    """One after the other, with small models. A block that cannot run here has more than `python` after its fence."""
    code = "\n".join(blocks(page, "python"))
    code = code.replace('load("gpt2"', f'load("{tiny_gpt2}"').replace('"data/eval"', f'"{tmp_path}"')
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "one two"}\n' * 2)
    (tmp_path / "hellaswag_val_pre.jsonl").write_text(
        '{"query": "a", "endings": ["b", "c", "d", "e"], "label": 0}\n' * 2
    )
    code = code.replace("GPT2Config()", "GPT2Config(n_layer=1, n_head=2, n_embd=16)")
    names: dict = {}
    exec(compile(code, page, "exec"), names)
    if page == "README.md":
        assert names["logits"].shape == (1, 5, 257)
    if page == "docs/generation.md":
        assert names["text"].startswith("Hello, I'm a language model,")
        assert len(names["texts"]) == 6
        assert names["logits"].shape == (1, 3, 50257)
        assert len(names["new"]) == 2


def test_the_config_snippet_is_one(tmp_path):
    (example,) = blocks("docs/data.md", "toml")
    (tmp_path / "config.toml").write_text('out = "run"\nsteps = 1000\nbatch_size = 8\n' + example)
    config = read_config(str(tmp_path / "config.toml"))
    validate(config)
    assert [source.weight for source in config.data.sources] == [0.8, 0.2]


# --- commands ------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """Every `python -m gpt2_jax.NAME …` in a block: the name, and the words after it."""
    lines = (line for page in PAGES for block in blocks(page) for line in block.replace("\\\n", " ").split("\n"))
    found = (re.search(r"(?:^|[|&;] *)(?:\w+=\S+ )*python -m gpt2_jax\.(\w+)(?![.\w])(.*)", line) for line in lines)
    return sorted({(match[1], match[2].strip()) for match in found if match})


@pytest.mark.parametrize(("name", "words"), commands())
def test_commands_have_the_flags_that_are_shown(name, words):
    check_flags(name, shlex.split(words, comments=True))


# --- tables --------------------------------------------------------------------------------------------


def test_every_preset_has_a_row():
    assert set(re.findall(r"^\| `([\w-]+)` \|", README, re.MULTILINE)) == set(preset_names())


# --- links ---------------------------------------------------------------------------------------------


def slugs(page: str) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in slugs(path.resolve().relative_to(ROOT).as_posix()), link
