"""Published figures for OpenAI's weights, to compare with: those of the same protocol, and those of the GPT-2 paper."""

from __future__ import annotations

from typing import NamedTuple

from gpt2_jax.config import GPT2Config

LM_EVAL = "lm-evaluation-harness"
LM_EVAL_124M = f"{LM_EVAL} issue 2159"
LM_EVAL_1558M = f"{LM_EVAL} issue 911"
NANOGPT = "build-nanogpt hellaswag.py and llm.c dev/data/hellaswag.py"
LLMC = "llm.c dev/vislog.ipynb"
PAPER = "GPT-2 paper, table 3"


class Figure(NamedTuple):
    """A published number.

    Attributes:
        value: in the unit of the metric; accuracies are between 0 and 1.
        source: where it is published.
        same_protocol: False for the paper, whose evaluation code was never released.
    """

    value: float
    source: str
    same_protocol: bool


SIZES = {(12, 768): 0, (24, 1024): 1, (36, 1280): 2, (48, 1600): 3}  # (n_layer, n_embd) of 124M, 355M, 774M, 1558M

Row = tuple[float | None, float | None, float | None, float | None]

_SAME_PROTOCOL: dict[tuple[str, str], list[tuple[Row, str]]] = {
    ("hellaswag", "acc"): [((0.2892, None, None, 0.4004), f"{LM_EVAL}, quoted in llm.c dev/data/hellaswag.py")],
    ("hellaswag", "acc_norm"): [((0.3114, None, None, 0.5089), f"{LM_EVAL}, quoted in llm.c dev/data/hellaswag.py")],
    ("hellaswag-completion", "acc"): [((0.2859, None, None, 0.3842), NANOGPT)],
    ("hellaswag-completion", "acc_norm"): [
        ((0.2955, None, None, 0.4893), NANOGPT),
        ((None, 0.3752, 0.4320, None), LLMC),
    ],
    ("lambada", "acc"): [((0.3256, None, None, None), LM_EVAL_124M)],
    ("lambada", "perplexity"): [
        ((40.0554, None, None, None), LM_EVAL_124M),
        ((None, None, None, 10.63), LM_EVAL_1558M),
    ],
    ("wikitext2", "word_perplexity"): [((37.37, None, None, None), f"{LM_EVAL}, in transformers issue 13761")],
    ("wikitext103", "word_perplexity"): [((37.37, None, None, None), f"{LM_EVAL}, in transformers issue 13761")],
}

_PAPER: dict[tuple[str, str], Row] = {
    ("lambada", "perplexity"): (35.13, 15.60, 10.87, 8.63),
    ("lambada", "last_token_acc"): (0.4599, 0.5548, 0.6012, 0.6324),
    ("cbt-cn", "acc"): (0.8765, 0.9235, 0.9345, 0.9330),
    ("cbt-ne", "acc"): (0.834, 0.871, 0.880, 0.8905),
    ("wikitext2", "word_perplexity"): (29.41, 22.76, 19.93, 18.34),
    ("wikitext103", "word_perplexity"): (37.50, 26.37, 22.05, 17.48),
    ("wikitext2-sliding", "word_perplexity"): (29.41, 22.76, 19.93, 18.34),
    ("wikitext103-sliding", "word_perplexity"): (37.50, 26.37, 22.05, 17.48),
    ("ptb", "word_perplexity"): (65.85, 47.33, 40.31, 35.76),
    ("enwik8", "bits_per_byte"): (1.16, 1.01, 0.97, 0.93),
    ("text8", "bits_per_character"): (1.17, 1.06, 1.02, 0.98),
}


def published_figures(task: str, metric: str, config: GPT2Config) -> tuple[Figure, ...]:
    """The figures for OpenAI's weights of the size of a model, those of the same protocol first; often none."""
    column = SIZES.get((config.n_layer, config.n_embd))
    if column is None:
        return ()
    rows = [(row, source, True) for row, source in _SAME_PROTOCOL.get((task, metric), [])]
    if row := _PAPER.get((task, metric)):
        rows.append((row, PAPER, False))
    found = ((row[column], source, same) for row, source, same in rows)
    return tuple(Figure(value, source, same) for value, source, same in found if value is not None)
