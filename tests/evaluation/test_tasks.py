"""Tasks by hand: what they ask, and what they make of given scores."""

import json
import math

import jax
import numpy as np
import pytest
from token_files import write_llmc

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.tokenizer import CharTokenizer, byte_encoding
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation import TASKS, evaluate, published
from gpt2_jax.evaluation.cbt import Cloze
from gpt2_jax.evaluation.published import PAPER, SIZES, published_figures
from gpt2_jax.evaluation.requests import Score
from gpt2_jax.evaluation.task import Collector, Setting
from gpt2_jax.model import GPT2, init_params

END = 256  # of the byte encoding


def setting(block_size=64, **options):
    return Setting(byte_encoding(), block_size, **options)


def scores_of(prepared, log_prob):
    """Scores with the log-probabilities that a function gives for a context and a continuation, as texts."""

    def text(tokens):
        return bytes(int(token) for token in tokens if token != END).decode()

    def score(request, tokens):
        log_probs = np.zeros(len(tokens), np.float32)
        log_probs[:1] = log_prob(text(request.context), text(tokens))
        return Score(log_probs, np.zeros(len(tokens), bool))

    return [[score(request, tokens) for tokens in request.continuations] for request in prepared.requests]


def values(metrics):
    return {metric.name: metric.value for metric in metrics}


def swag(*endings, label=0, query="A man"):
    row = {"query": query, "endings": list(endings), "label": label}
    return TASKS["hellaswag"].from_row(row, "a test")


def test_the_endings_of_hellaswag_share_a_context():
    prepared = TASKS["hellaswag"].prepare([swag("runs", "sits", "is", "eats"), swag("a", "b", "c", "d")], setting())
    assert [bytes(request.context).decode() for request in prepared.requests] == ["A man"] * 2
    assert [bytes(tokens) for tokens in prepared.requests[0].continuations] == [b" runs", b" sits", b" is", b" eats"]
    assert prepared.origins == ["example 1", "example 2"]


def test_spaces_at_the_end_of_a_context_go_to_the_endings():
    prepared = TASKS["hellaswag"].prepare([swag("runs", "sits", "is", "eats", query="A man  ")], setting())
    (request,) = prepared.requests
    assert bytes(request.context) == b"A man"
    assert bytes(request.continuations[2]) == b"   is"


def test_an_empty_context_is_end_of_text():
    for name in ("hellaswag", "hellaswag-completion"):
        prepared = TASKS[name].prepare([swag("runs", "sits", "is", "eats", query="")], setting())
        assert list(prepared.requests[0].context) == [END]
    characters = Setting(CharTokenizer("abcdefgrst nu"), 64)
    with pytest.raises(UserError, match="hellaswag starts texts with the end-of-text token"):
        TASKS["hellaswag"].prepare([swag("runs", "sat", "a", "eats", query="")], characters)


def test_hellaswag_divides_by_characters():
    # Of equal ones the first is chosen. é has one character and two bytes.
    chosen = {" aaaa": -4.0, " ééé": -4.0, " a": -4.5, " bbbbbbbb": -8.0}
    examples = [swag("aaaa", "ééé", "a", "bbbbbbbb", label=label) for label in range(4)]
    prepared = TASKS["hellaswag"].prepare(examples, setting())
    metrics = prepared.metrics(scores_of(prepared, lambda _, ending: chosen[ending]))
    assert metrics[0].sums.tolist() == [1, 0, 0, 0]
    assert metrics[1].sums.tolist() == [1, 0, 0, 0]  # −1, −4/3, −4.5, −1


def test_an_empty_ending_is_never_chosen_per_character():
    examples = [swag("aaaa", "", "bb", "c", label=label) for label in (0, 1)]
    prepared = TASKS["hellaswag"].prepare(examples, setting())
    assert bytes(prepared.requests[0].continuations[1]) == b" "
    metrics = prepared.metrics(scores_of(prepared, lambda _, ending: -1.0 if ending == " " else -2.0))
    assert metrics[0].sums.tolist() == [0, 1]
    assert metrics[1].sums.tolist() == [1, 0]


def test_an_ending_can_begin_another():
    examples = [swag("run", "runs", "run away", "r", label=3)]
    prepared = TASKS["hellaswag"].prepare(examples, setting())
    lengths = {" run": -3, " runs": -2.5, " run away": -8, " r": -2}
    assert values(prepared.metrics(scores_of(prepared, lambda _, ending: lengths[ending]))) == {"acc": 1, "acc_norm": 0}


def test_completion_divides_by_tokens():
    chosen = {" aaaa": -4.0, " éééé": -4.5, " a": -1.01, " bbbbbbbb": -6.0}
    examples = [swag("aaaa", "éééé", "a", "bbbbbbbb", label=label) for label in range(4)]
    prepared = TASKS["hellaswag-completion"].prepare(examples, setting())
    metrics = prepared.metrics(scores_of(prepared, lambda _, ending: chosen[ending]))
    assert metrics[0].sums.tolist() == [0, 0, 1, 0]
    assert metrics[1].sums.tolist() == [0, 1, 0, 0]  # per byte −4/5, −4.5/9, −1.01/2, −6/9


def test_different_contexts_become_different_requests():
    collector = Collector()
    collector.add([([1, 2], [5]), ([1], [2, 6]), (np.array([1, 2]), [7])], "example 1")
    collector.add([([1, 2], [8])], "example 2")
    assert [list(request.context) for request in collector.requests] == [[1, 2], [1], [1, 2]]
    assert collector.origins == ["example 1", "example 1", "example 2"]
    a, b, c, d = (Score(np.array([-x], np.float32), np.array([False])) for x in (1.0, 2.0, 3.0, 4.0))
    assert collector.by_example([[a, c], [b], [d]]) == [[a, b, c], [d]]


def test_lambada_wants_every_token_of_the_word():
    task = TASKS["lambada"]
    rows = [{"text": "So it was Zoë"}, {"text": "said  he"}, {"text": "one\nword"}]
    examples = [task.from_row(row, "a test") for row in rows]
    prepared = task.prepare(examples, setting())
    asked = [(list(request.context[-4:]), bytes(*request.continuations)) for request in prepared.requests]
    assert asked == [([*b" was"], " Zoë".encode()), ([*b"said"], b"  he"), ([END], b" one\nword")]
    greedy = [[False] * 4 + [True], [False, True, True, True], [True] * 9]
    log_probs = [[-0.5] * 5, [-1.0, 0, 0, 0], [-0.25] * 9]
    scores = [[Score(np.array(p, np.float32), np.array(g))] for p, g in zip(log_probs, greedy, strict=True)]
    assert values(prepared.metrics(scores)) == {
        "acc": pytest.approx(1 / 3),
        "perplexity": pytest.approx(math.exp((2.5 + 1 + 2.25) / 3)),
        "last_token_acc": 1,
    }


def test_wikitext_counts_words_and_bytes_of_the_raw_page():
    task = TASKS["wikitext2"]
    pages = [" = Zoë = \n \n a @-@ b . \n", "c"]
    prepared = task.prepare(pages, setting(block_size=8))
    texts = [" = Zoë =\n\na-b.\n", "c"]
    read = [bytes(np.concatenate([r.continuations[0] for r in prepared.requests[:-1]]).tolist()).decode()]
    assert [*read, bytes(prepared.requests[-1].continuations[0].tolist()).decode()] == texts
    assert [int(request.context[0]) for request in prepared.requests[:1] + prepared.requests[-1:]] == [END, END]
    assert prepared.origins == ["page 1"] * (len(prepared.requests) - 1) + ["page 2"]
    metrics = prepared.metrics(scores_of(prepared, lambda _, text: -2.0 * len(text.encode())))
    n_bytes = [len(text.encode()) for text in texts]
    assert [metric.name for metric in metrics] == ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    assert metrics[0].sums.tolist() == [2.0 * n for n in n_bytes]
    assert metrics[0].weights.tolist() == [9, 1]  # lm-eval counts what is before the first and after the last space
    assert metrics[1].weights.tolist() == [len(pages[0].encode()), 1]
    assert metrics[2].value == pytest.approx(2 * sum(n_bytes) / sum(metrics[1].weights) / math.log(2))


def test_sliding_windows_predict_each_token_once():
    task = TASKS["wikitext103-sliding"]
    pages = [" = A = \n b", " = C = \n d @-@ e"]
    prepared = task.prepare(pages, setting(block_size=8, stride=3))
    asked = [bytes(request.continuations[0].tolist()).decode() for request in prepared.requests]
    assert "".join(asked) == " = A =\nb\n = C =\nd-e"
    assert [len(part) for part in asked] == [8, 3, 3, 3, 2]
    sizes = [len(request.context) + len(*request.continuations) - 1 for request in prepared.requests]
    assert sizes == [8] * 5
    metrics = prepared.metrics(scores_of(prepared, lambda _, part: -len(part)))
    # 19 tokens of 1 nat each, and 10 words.
    assert values(metrics) == {
        "word_perplexity": pytest.approx(math.exp(1.9)),
        "token_perplexity": pytest.approx(math.e),
    }
    assert metrics[0].count == 5
    limited = task.prepare(pages, setting(block_size=8, stride=3, limit=2))
    two = limited.metrics(scores_of(limited, lambda _, part: -len(part)))
    assert two[0].count == 2
    assert values(two) == pytest.approx(values(metrics))
    assert "windows of 8 tokens that predict 3;" in task.describe(setting(block_size=8, stride=3))
    assert "windows of 64 tokens that predict 32;" in task.describe(setting())


def test_the_end_of_a_line_is_a_word_in_ptb():
    prepared = TASKS["ptb"].prepare([" it is n't \n $ N \n"], setting())
    (request,) = prepared.requests
    assert bytes(request.continuations[0].tolist()) == b"it isn't\n$N\n"
    metrics = prepared.metrics(scores_of(prepared, lambda _, text: -14.0))
    assert metrics[0].value == pytest.approx(math.exp(14 / 7))


def test_bits_per_byte_are_per_byte():
    prepared = TASKS["enwik8"].prepare(["éab"], setting(block_size=4, stride=2))
    metrics = prepared.metrics(scores_of(prepared, lambda _, text: -math.log(2) * 3 * len(text.encode())))
    assert values(metrics) == {"bits_per_byte": pytest.approx(3), "token_perplexity": pytest.approx(8)}
    one = [[Score(np.zeros(2, np.float32), np.zeros(2, bool))]]
    metrics = TASKS["text8"].prepare(["ab"], setting()).metrics(one)
    assert list(values(metrics)) == ["bits_per_character", "token_perplexity"]


def test_the_candidates_of_cbt_are_followed_by_the_rest():
    candidates = ("king", *"abcdefghi")
    examples = [
        Cloze("It was n't . `` I saw the", "'s , '' she said .", candidates, 0),
        Cloze("XXXXX said : ``", "!", candidates, 3),
    ]
    prepared = TASKS["cbt-cn"].prepare(examples, setting())
    first, second = prepared.requests
    assert bytes(first.context) == b"It wasn't. \"I saw the"
    assert bytes(first.continuations[0]) == b" king's,\" she said."
    assert bytes(first.continuations[9]) == b" i's,\" she said."
    assert (bytes(second.context), bytes(second.continuations[3])) == (b'XXXXX said: "', b"c!")
    metrics = prepared.metrics(scores_of(prepared, lambda _, text: -1.0 if "c" in text else -2.0))
    assert values(metrics) == {"acc": 0.5}


@pytest.fixture(scope="module")
def byte_model():
    model = GPT2(GPT2Config(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=8, attention="xla"))
    return model, init_params(model, jax.random.key(0))


def test_the_loss_of_files(byte_model, tmp_path):
    tokens = np.array([END, 72, 105, END, 33] + [97] * 20, np.uint16)
    write_llmc(tmp_path / "val.bin", tokens)
    (tmp_path / "a.txt").write_text("Zoë")
    data = [tmp_path / "val.bin", tmp_path / "a.txt"]
    calls = []
    results = evaluate(*byte_model, byte_encoding(), "loss", data=data, progress=lambda *call: calls.append(call))
    result = results["loss"]
    records = list(result.records())
    assert calls[-1] == ("loss", 3)
    assert [record["origin"].rpartition("/")[2] for record in records] == [
        "val.bin, window 1",
        "val.bin, window 2",
        "a.txt, window 1",
    ]
    scored = [token for record in records for token in record["tokens"]]
    assert scored == [*tokens[1:].tolist(), *"Zoë".encode()]
    log_probs = np.array([log_prob for record in records for log_prob in record["log_probs"]])
    assert len(log_probs) == len(scored) == 28
    assert result.metrics["loss"].value == pytest.approx(-log_probs.mean())
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(-log_probs.mean()))
    assert result.metrics["bits_per_byte"].value == pytest.approx(-log_probs.sum() / 27 / math.log(2))
    assert result.metrics["loss"].count == 3
    assert "windows of 16 tokens" in result.protocol
    json.dumps(records)
    limited = evaluate(*byte_model, byte_encoding(), "loss", data=data, limit=2)["loss"]
    assert list(limited.records()) == records[:2]
    assert not result.published


def test_token_files_need_no_tokenizer(byte_model, tmp_path):
    write_llmc(tmp_path / "val.bin", np.arange(40, dtype=np.uint16))
    result = evaluate(*byte_model, None, ["loss"], data=tmp_path / "val.bin", limit=1)["loss"]
    assert list(result.metrics) == ["loss", "perplexity"]
    assert result.metrics["loss"].weights.tolist() == [16]
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(UserError, match="loss needs the model's tokenizer"):
        evaluate(*byte_model, None, ["loss"], data=tmp_path / "a.txt")


def test_characters_have_no_end_of_text(byte_model, tmp_path):
    (tmp_path / "a.txt").write_text("abcab")
    characters = CharTokenizer("abc")
    result = evaluate(*byte_model, characters, "loss", data=tmp_path / "a.txt")["loss"]
    assert [record["tokens"] for record in result.records()] == [[1, 2, 0, 1]]
    with pytest.raises(UserError, match="wikitext2 starts texts with the end-of-text token"):
        evaluate(*byte_model, characters, "wikitext2", data=tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("a")
    with pytest.raises(UserError, match=r"b.txt: no token to predict"):
        evaluate(*byte_model, characters, "loss", data=tmp_path / "b.txt")


def test_what_the_model_cannot_read_is_named(byte_model, tmp_path):
    path = tmp_path / "lambada_test.jsonl"
    path.write_text('{"text": "a b"}\n{"text": "a bbbbbbbbbbbbbbbb"}\n')
    model, params = byte_model
    with pytest.raises(UserError, match=r"lambada, example 2: 17 tokens .* block_size is 16"):
        evaluate(model, params, byte_encoding(), "lambada", data=path)
    assert evaluate(model, params, byte_encoding(), "lambada", data=path, limit=1)["lambada"].metrics["acc"].count == 1
    small = GPT2(GPT2Config(vocab_size=99, block_size=16, n_layer=1, n_head=2, n_embd=8, attention="xla"))
    path.write_text('{"text": "a b"}\n{"text": "a c"}\n{"text": "d d"}\n')
    with pytest.raises(UserError, match=r"lambada, example 2: the text has the token 99, .* ends at 98"):
        evaluate(small, params, byte_encoding(), "lambada", data=path)


@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": 17}, {"limit": 0}])
def test_options_out_of_range(byte_model, tmp_path, options):
    (tmp_path / "ptb.test.txt").write_text("a b")
    with pytest.raises(UserError, match=r"(stride|limit) = \d+.* expected 1 "):
        evaluate(*byte_model, byte_encoding(), "ptb", data=tmp_path, **options)


def test_published_figures_are_of_the_size():
    config = GPT2Config(n_layer=12, n_embd=768)
    figures = published_figures("lambada", "perplexity", config)
    assert [(figure.value, figure.same_protocol) for figure in figures] == [(40.0554, True), (35.13, False)]
    xl = published_figures("hellaswag-completion", "acc_norm", GPT2Config(n_layer=48, n_embd=1600, n_head=25))
    assert [figure.value for figure in xl] == [0.4893]
    assert published_figures("lambada", "perplexity", GPT2Config(n_layer=11, n_embd=768)) == ()
    assert published_figures("loss", "loss", config) == ()


def test_every_published_figure_is_of_a_metric_that_a_task_has():
    texts = {"ptb": "a b", "enwik8": "ab", "text8": "ab"}
    for task, metric in {**published._SAME_PROTOCOL, **published._PAPER}:
        if task.startswith("hellaswag"):
            examples = [swag("a", "b", "c", "d")]
        elif task == "lambada":
            examples = [TASKS[task].from_row({"text": "a b"}, "a test")]
        elif task.startswith("cbt"):
            examples = [Cloze("a", "b", tuple("abcdefghij"), 0)]
        else:
            examples = [texts.get(task, " = A = \n b")]
        prepared = TASKS[task].prepare(examples, setting())
        assert metric in values(prepared.metrics(scores_of(prepared, lambda *_: -1.0))), task
    assert {len(row) for row in published._PAPER.values()} == {len(SIZES)}
    assert PAPER in {figure.source for figure in published_figures("cbt-ne", "acc", GPT2Config())}
