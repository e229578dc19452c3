"""README.md and docs/: snippets run, commands and flags exist, links lead somewhere, tables are complete."""

import dataclasses
import itertools
import re
import shlex

import jax
import pytest
from commands import check_command
from pages import FENCED, PAGES, ROOT, blocks, prose, shell_lines

import gpt2_jax.data.__main__ as data
from gpt2_jax import convert, evaluate, generate, prepare, report
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import DataConfig, GPT2Config, ModelConfig
from gpt2_jax.config.toml import all_keys, preset_names, read_config, to_toml
from gpt2_jax.config.validation import validate
from gpt2_jax.distributed.cluster import ClusterFlags
from gpt2_jax.model import GPT2, init_params
from gpt2_jax.plan import PlanFlags

README = PAGES["README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language(page):
    """Commands are in those of `sh`: they are parsed below, and run in test_guides.py."""
    found = {language for language, _ in FENCED.findall(PAGES[page])}
    assert {language.split(" ")[0] for language in found} <= {"python", "sh", "text", "toml"}


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


def filled(words: list[str]) -> list[str]:
    """The words of a command, with something in place of those in capitals: N, MODEL, `--config FILE.toml`."""
    words = [word for word in words if word != "…"]
    return [
        "quickstart" if before == "--config" and word[0].isupper() else re.sub("^[A-Z]+$", "1", word)
        for before, word in itertools.pairwise(["", *words])
    ]


def inline_code() -> list[str]:
    """What is between backticks in the text and the tables."""
    return [" ".join(code.split()) for page in PAGES for code in re.findall("`([^`]+)`", prose(page))]


def commands() -> list[tuple[str, str]]:
    """Every `python -m gpt2_jax.NAME …` in a block or in the text: the name, and the words after it."""
    lines = [*(line for page in PAGES for line in shell_lines(page)), *inline_code()]
    found = (re.search(r"(?:^|[|&;] *)(?:\w+=\S+ )*python -m gpt2_jax\.(\w+)(?![.\w])([^|]*)", line) for line in lines)
    return sorted({(match[1], match[2].strip()) for match in found if match})


@pytest.mark.parametrize(("name", "words"), commands())
def test_commands_have_the_flags_that_are_shown(name, words):
    check_command(name, filled(shlex.split(words, comments=True)))


# Flags of train, of the other commands, and of programs of others.
TRAIN = {"config", *all_keys(), *(field.name for field in dataclasses.fields(ClusterFlags))}
OTHERS = {
    "section.key", "help", "peers",  # any key; every command; bench/
    "dry_run", "spot", "queued", "storage", "worker", "init", "ntasks_per_node", "num_nodes",  # launch/
    "quantization",  # CTranslate2
} | {
    field.name
    for flags in (convert.Flags, data.Flags, evaluate.Flags, generate.Flags, prepare.Flags, report.Flags, PlanFlags)
    for field in dataclasses.fields(flags)
}  # fmt: skip


@pytest.mark.parametrize("code", sorted({code for code in inline_code() if code.startswith("--")}))
def test_flags_in_the_text_exist_and_go_together(code):
    """Those of train are parsed and validated with a preset, as if they were typed after it."""
    words = filled(shlex.split(code))
    names = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    if len(words) > 1 and names <= TRAIN:
        preset = "quickstart" if "data.text" in names else "gpt2-124m"
        check_command("train", [*([] if "config" in names else ["--config", preset]), *words])
    else:
        assert {name for name in names - TRAIN - OTHERS if not name.startswith("xla_")} == set()


# --- tables --------------------------------------------------------------------------------------------


def test_every_preset_has_a_row():
    assert set(re.findall(r"^\| `([\w-]+)` \|", README, re.MULTILINE)) == set(preset_names())


# --- links ---------------------------------------------------------------------------------------------


def slugs(page: str) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in slugs(path.resolve().relative_to(ROOT).as_posix()), link
