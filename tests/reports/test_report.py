"""The report about runs: what it reads, and the files that it writes."""

import dataclasses
import html.parser
import re

import numpy as np
import pytest

from gpt2_jax import report
from gpt2_jax.config.toml import read_config
from gpt2_jax.errors import UserError
from gpt2_jax.metrics import thinned
from gpt2_jax.reports.figures import loss_figure
from gpt2_jax.reports.markdown import write_markdown
from gpt2_jax.reports.records import read_runs, smoothed
from gpt2_jax.reports.reference_runs import reference_run


def test_what_a_run_tells(runs):
    one, two = read_runs(runs)
    assert (one.name, two.name) == ("one/run", "two/run")
    assert (one.last_step, one.tokens) == (40, 163840)
    assert one.final("val_loss") == pytest.approx(8.5 / 40 + 1)
    assert one.best("val_loss") == one.final("val_loss")
    assert one.speed() == pytest.approx(1020)
    assert one.seconds == {"training": 40.0, "starting": 8.0, "stopped": 6.0}
    assert one.skipped == [(33, "outlier: loss 99")]
    assert one.reference("hellaswag/acc").value == 0.2892
    assert one.facts == {}


def test_a_smaller_model_has_no_published_figure(make_run):
    (run,) = read_runs([make_run("small", n_layer=2)])
    assert run.reference("hellaswag/acc") is None
    (run,) = read_runs([make_run("short", block_size=512)])
    assert run.reference("hellaswag/acc") is None


@pytest.mark.parametrize(
    ("val", "sizes", "drawn"),
    [("data/fineweb10B/fineweb_val_*.bin", {}, True), ("data/mine/val_*.bin", {}, False),
     ("fineweb_val_000000.bin", {"n_layer": 2}, False)],
)  # fmt: skip
def test_a_run_on_the_data_of_a_published_run_is_drawn_over_it(make_run, val, sizes, drawn):
    directory = make_run("run", **sizes)
    config = (directory / "config.toml").read_text()
    (directory / "config.toml").write_text(config.replace('\nval = ""', f'\nval = "{val}"'))
    runs = read_runs([directory])
    names = [trace.name for trace in loss_figure([*runs, *runs]).data]
    assert names.count("llm.c, 124M, validation") == drawn
    if drawn:
        last = loss_figure(runs).data[-1]
        assert (last.x[-1], last.y[-1]) == (19560 * 524288, 3.2722)  # that llm.c reports, after 10.26 B tokens
        row = "| llm.c, 124M (github.com/KellerJordan/modded-nanogpt, records/track_1_short/2024-10-13_llmc/main.log) "
        assert row + "|  | 19,560 | 10.3G | 3.2722 |" in write_markdown(runs)


@pytest.mark.parametrize(
    ("preset", "tokens", "loss"),
    [("shakespeare-char", 5000 * 64 * 256, 1.4697), ("shakespeare-char-cpu", 2000 * 12 * 64, 1.88)],
)
def test_nanogpts_figure_belongs_to_its_character_models(preset, tokens, loss):
    config = read_config(preset)
    reference = reference_run(config)
    ((update, value),) = reference.losses.items()
    assert (update * reference.tokens_per_update, value) == (tokens, loss)
    assert update == config.steps
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, text="mine.txt"))
    assert reference_run(other) is None


def test_smoothing_and_thinning_are_means():
    values = np.arange(10.0)
    assert smoothed(values, 0.3).tolist() == [0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert [column.tolist() for column in thinned([values, 2 * values], 4)] == [
        [1.0, 4.0, 7.0, 9.0],
        [2.0, 8.0, 14.0, 18.0],
    ]
    assert thinned([values], 10)[0].tolist() == values.tolist()


TRICKY = '<script>alert(1)</script> | "quoted" & `code`'  # in the samples


class Tags(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its visible text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.inside = [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.inside.pop()

    def handle_data(self, data):
        self.text += "" if self.inside else data


def test_the_page_is_one_file_with_everything(runs, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert report.main([*map(str, runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote     {out}\n"
    page = Tags(out.read_text(encoding="utf-8"))
    loaded = [attrs for _, attrs in page.tags if {"src", "href"} & attrs.keys()]
    assert loaded == []
    for words in (
        "one/run, two/run", "40 of 40", "0:48", "Where the time went", "OpenAI's weights, published", "0.2892",
        TRICKY, "outlier: loss 99", "seed", "optimizer.learning_rate",
    ):  # fmt: skip
        assert words in page.text, words
    assert sum("plotly-graph-div" in attrs.get("class", "") for _, attrs in page.tags) == 4
    assert page.text.count("differs") == 0
    assert sum(attrs.get("class") == "differs" for _, attrs in page.tags) == 2 * 2  # seed, in both tables


def test_a_run_with_nothing_but_losses(make_run, tmp_path):
    directory = make_run("run")
    for name in ("samples.jsonl", "time.jsonl"):
        (directory / name).unlink()
    (directory / "metrics.jsonl").write_text('{"step": 1, "tokens": 4, "loss": 3.0}\n')
    out = tmp_path / "report.html"
    assert report.main([str(directory), "--out", str(out), "--md", str(tmp_path / "report.md")]) == 0
    page = Tags(out.read_text(encoding="utf-8"))
    titles = ("Samples", "Where the time went", "Evaluations", "Skipped updates", "Made by")
    assert not [title for title in titles if title in page.text]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"step": 41, "tokens": "x", "grad_norm": 1.0}', "has a row with 'grad_norm' and without a count 'tokens'"),
        ('{"step": 41, "tokens": 5, "grad_norm": ' + "9" * 400 + "}", None),
        ('{"step": 41, "tokens": 5, "layers": {"grad_norm": 3}}', None),
        ('{"step": 41, "tokens": 5, "layers": {"grad_norm": {"h_0": "x"}}}', None),
        ('{"step": "x"}', "does not hold the row of a run"),
    ],
)
def test_damaged_rows_are_one_line_or_left_out(make_run, tmp_path, row, message):
    run = make_run("run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(row + "\n")
    args = [str(run), "--md", str(tmp_path / "report.md")]
    if message is None:
        assert report.main(args) == 0
    else:
        with pytest.raises(UserError, match=message):
            report.main(args)


def test_markdown_and_a_picture(runs, tmp_path):
    md, png = tmp_path / "report.md", tmp_path / "losses.png"
    assert report.main([*map(str, runs), "--md", str(md), "--png", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "report.md", "losses.png"}
    text = md.read_text(encoding="utf-8")
    assert "| seed | `1` | `2` |" in text
    assert "| training | 0:40 (74.1%) | 0:40 (74.1%) |" in text
    assert "| hellaswag/acc | 0.2900 | 0.2900 | 0.2892 (lm-evaluation-harness" in text
    for line in filter(lambda line: line.startswith("|"), text.splitlines()):
        assert len(re.findall(r"(?<!\\)\|", line)) in (4, 5, 10), line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no run was given; type python -m gpt2_jax.report RUN [RUN ...] --out report.html, or --compare A B"),
        (["RUN", "--compare", "a", "b"], "--compare takes two runs, and writes no file; leave out what else was given"),
        (["RUN", "RUN"], "a run is given twice; give each once"),
        (["none"], "none has no metrics.jsonl with rows; give the directory of a run"),
        (["RUN", "--out", "."], "--out . is a directory; give a file"),
        (["RUN", "--out", "missing/report.html"], "--out missing/report.html cannot be written (No such file"),
    ],
)
def test_bad_input_is_one_line(make_run, tmp_path, monkeypatch, args, message):
    run = make_run("run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        report.main([str(run) if arg == "RUN" else arg for arg in args])
