"""The lines under the bar, and the drawing at the end."""

import io
import json
import re

import pytest
from rich.console import Console
from rich.text import Text

from gpt2_jax import activity
from gpt2_jax.activity import DEVICE, Activity
from gpt2_jax.config import CheckpointConfig, EvalConfig, GPT2Config, TrainConfig
from gpt2_jax.run.curve import draw_losses
from gpt2_jax.run.panel import BLOCKS, TREND, Panel, Trend, flow

ROW = {"step": 120, "tokens": 30_720, "loss": 2.34567, "grad_norm": 0.51234, "learning_rate": 6e-4,
       "tokens_per_second": 12345.6, "mfu": 0.512}  # fmt: skip


@pytest.fixture
def panel(monkeypatch):
    monkeypatch.setattr(activity, "activity_of", lambda thread: Activity(panel.doing, panel.share))
    config = TrainConfig(
        out="run", steps=1000, batch_size=4, model=GPT2Config(), eval=EvalConfig(every=250),
        checkpoint=CheckpointConfig(every=500),
    )  # fmt: skip
    panel = Panel(config, start=0)
    panel.doing, panel.share = DEVICE, None
    return panel


def shown(panel, width=80):
    return [line.plain for line in panel.lines(width)]


def test_a_run_that_starts(panel):
    assert shown(panel) == ["training · next evaluation at 250 · next save at 500"]


def test_what_a_run_has_reached(panel):
    panel.update(ROW)
    panel.step = 120
    panel.validation(100, 2.5)
    panel.checkpoint = 500
    assert shown(panel) == [
        f"loss 2.3457 {BLOCKS[0]} · validation 2.5000 at 100, the best",
        "gradient norm 0.512 · learning rate 0.0006 · 12.3k tok/s · MFU 51.2%",
        "training · next evaluation at 250 · next save at 500 · last checkpoint 500",
    ]
    panel.validation(110, 2.75)
    assert shown(panel)[0].endswith("validation 2.7500 at 110, best 2.5000 at 100")
    panel.step = 990
    assert shown(panel)[-1] == "training · next evaluation at 1,000 · next save at 1,000 · last checkpoint 500"


def colors(panel, line):
    """The parts of a line that have a color, with it."""
    text = list(panel.lines(200))[line]
    return {text.plain[span.start : span.end]: str(span.style) for span in text.spans if span.style}


def test_a_new_best_is_green_and_a_worse_loss_yellow(panel):
    panel.update(ROW)
    assert colors(panel, 0) == {}
    panel.validation(100, 2.5)
    assert colors(panel, 0) == {"validation 2.5000 at 100, the best": "green"}
    panel.validation(200, 2.5)
    assert colors(panel, 0) == {"validation 2.5000 at 200, best 2.5000 at 100": "yellow"}
    panel.validation(300, 2.25)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=200, _environ={})
    console.print(next(panel.lines(200)))
    assert screen.getvalue().endswith(" · \x1b[32mvalidation 2.2500 at 300, the best\x1b[0m\n")
    assert colors(panel, 1) == colors(panel, 2) == {}


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_every_line_fits(panel, width):
    panel.update(ROW)
    panel.validation(100, 2.5)
    parts = [Text("x" * length) for length in (10, 30, 5, 5, 40)]
    for line in (*panel.lines(width), *flow(parts, width)):
        assert len(line) <= width or " · " not in line.plain  # a single part, which the terminal cuts
        assert line.no_wrap
        assert line.overflow == "ellipsis"
    assert " · ".join(line.plain for line in flow(parts, width)) == " · ".join(part.plain for part in parts)


def test_a_resumed_run_knows_what_was_best(panel):
    panel.resume([{"step": 100, "loss": 3.0}, {"step": 100, "val_loss": 2.0}, {"step": 200, "val_loss": 2.25}])
    panel.validation(300, 2.125)
    panel.update({**ROW, "loss": 1.0})
    assert shown(panel)[0] == f"loss 1.0000 {BLOCKS[-1]}{BLOCKS[0]} · validation 2.1250 at 300, best 2.0000 at 100"


def test_work_that_takes_long_is_named(panel, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(activity.time, "perf_counter", lambda: now[0])
    panel.doing = "compiling"
    assert shown(panel)[-1].startswith("training")  # it began just now
    now[0] += 65
    assert shown(panel)[-1].startswith("compiling, 1:05 · ")
    assert colors(panel, -1) == {"compiling, 1:05": "yellow"}
    panel.doing, panel.share = "evaluating", 0.425
    assert shown(panel)[-1].startswith("training")
    now[0] += 65
    assert shown(panel)[-1].startswith("evaluating, 42%, 1:05 · ")
    panel.doing = DEVICE
    assert shown(panel)[-1].startswith("training · ")
    assert colors(panel, -1) == {}


def test_a_trend_keeps_means_of_equally_many_values():
    trend = Trend()
    assert str(trend) == ""
    for value in range(4 * TREND):
        trend.add(float(value))
    assert len(str(trend)) == TREND
    assert [str(trend)[0], str(trend)[-1]] == [BLOCKS[0], BLOCKS[-1]]
    assert list(str(trend)) == sorted(str(trend))
    for _ in range(4 * TREND):
        trend.add(0.0)
    assert str(trend)[TREND // 2 :] == BLOCKS[0] * (TREND // 2)


def test_losses_are_drawn(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert draw_losses(metrics, 80, color=False) == ""
    rows = [{"step": step, "tokens": 1_000_000 * step, "loss": 8 / step} for step in range(1, 2001)]
    rows += [{"step": step, "tokens": 1_000_000 * step, "val_loss": 9 / step} for step in (1000, 2000)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert draw_losses(metrics, 39, color=False) == ""
    for width in (40, 80, 200):
        drawn = draw_losses(metrics, width, color=False)
        lines = drawn.splitlines()
        assert max(map(len, lines)) <= width
        assert "\x1b" not in drawn
        assert "loss (nats per token) over tokens" in drawn
        assert re.search(r"2(\.0)?G", drawn)
        assert "validation" in drawn
        assert set(lines[2]) & set("▌▙▚▖▝▐")  # it starts at the top
    assert "\x1b[" in draw_losses(metrics, 80, color=True)
