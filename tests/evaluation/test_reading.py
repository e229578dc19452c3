"""Files of examples: what is read, what is refused with the line, and where files are found."""

import json
import sys

import pytest

from gpt2_jax.errors import UserError
from gpt2_jax.evaluation import TASKS, examples
from gpt2_jax.evaluation.examples import load_examples, locate
from gpt2_jax.evaluation.streams import Compression, detokenize_ptb
from gpt2_jax.evaluation.tasks import find_tasks
from gpt2_jax.evaluation.wikitext import detokenize, split_pages

SWAG = {
    "ind": 1,
    "activity_label": "Baking",
    "ctx_a": "A man mixes [substeps] flour.",
    "ctx_b": "he THEN",
    "ctx": "A man mixes [substeps] flour. he THEN",
    "endings": ["bakes [title] it.", "eats  it.", " flies.", ""],
    "label": 2,
}


def read(task, path, limit=None):
    return load_examples(TASKS[task], locate(TASKS[task], [path]), limit)


def write(directory, name, *lines):
    path = directory / name
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def test_hellaswag_is_cleaned_as_in_lm_eval(tmp_path):
    (example,) = read("hellaswag", write(tmp_path, "hellaswag_val.jsonl", SWAG))
    assert example.context == "Baking: A man mixes flour. He then"
    assert example.endings == ("bakes. it.", "eats it.", "flies.", "")
    assert example.label == 2
    (raw,) = read("hellaswag-completion", write(tmp_path, "hellaswag_val.jsonl", SWAG | {"label": "2"}))
    assert (raw.context, raw.endings, raw.label) == (SWAG["ctx"], tuple(SWAG["endings"]), 2)


def test_a_cleaned_context_is_taken_as_it_is(tmp_path):
    row = {"ind": 0, "query": "Baking:  a man", "label": 0, "endings": ["a  b", "c [x] d", "", "e"]}
    path = write(tmp_path, "hellaswag_val_pre.jsonl", row)
    (example,) = read("hellaswag", path)
    assert (example.context, example.endings) == ("Baking:  a man", ("a  b", "c d", "", "e"))
    with pytest.raises(UserError, match=r"line 1 has a cleaned context .* choose the task hellaswag"):
        read("hellaswag-completion", path)


def test_lambada_splits_at_the_last_space(tmp_path):
    lines = [{"text": "One two\nthree four"}, {"text": "double  space"}, {"text": "alone"}]
    found = read("lambada", write(tmp_path, "lambada_test.jsonl", *lines))
    assert [(example.context, example.word) for example in found] == [
        ("One two\nthree", "four"),
        ("double ", "space"),
        ("", "alone"),
    ]


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("lambada", "{", r"line 2 is not JSON"),
        ("lambada", "[1]", r"line 2 has \[1\]; expected a JSON object"),
        ("lambada", "null", r"line 2 has None; expected a JSON object"),
        ("lambada", "[" * 70, r"line 2 is not JSON \(it is nested more than 64 deep"),
        ("lambada", {"txt": "a b"}, r"line 2: text is missing; expected a text"),
        ("lambada", {"text": 5}, r"line 2: text is 5; expected a text"),
        ("lambada", {"text": "a "}, r"line 2: the text is empty or ends with a space"),
        ("hellaswag", SWAG | {"label": 4}, r"line 2: label is 4; expected a number from 0 to 3"),
        ("hellaswag", SWAG | {"label": -1}, r"label is -1; expected"),
        ("hellaswag", SWAG | {"label": True}, r"label is True; expected"),
        ("hellaswag", SWAG | {"label": ""}, r"label is ''; expected"),
        ("hellaswag", SWAG | {"label": "x"}, r"label is 'x'; expected"),
        ("hellaswag", SWAG | {"endings": ["a", "b", "c"]}, r"endings is \['a', 'b', 'c'\]; expected a list of 4 texts"),
        ("hellaswag", SWAG | {"endings": ["a", "b", "c", 1]}, r"expected a list of 4 texts"),
        ("hellaswag", SWAG | {"ctx_b": None}, r"line 2: ctx_b is None; expected a text"),
        ("wikitext2", {"text": "x"}, r"line 2: page is missing"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, task, line, message):
    good = {"lambada": {"text": "a b"}, "hellaswag": SWAG, "wikitext2": {"page": " = A = \n b"}}[task]
    path = write(tmp_path, "lines.jsonl", good, line)
    with pytest.raises(UserError, match=message) as caught:
        read(task, path)
    assert str(path) in str(caught.value)
    assert len(read(task, path, limit=1)) == 1  # the rest is not read


def test_long_lines_and_other_bytes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "MAX_LINE_BYTES", 100)
    with pytest.raises(UserError, match=r"line 1 has more than 100 bytes"):
        read("lambada", write(tmp_path, "a.jsonl", {"text": "a " * 60 + "b"}))
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a b"}\n\n{"text": "\xff b"}\n')
    with pytest.raises(UserError, match=r"line 3 is not UTF-8 text \(byte 10\)"):
        read("lambada", path)
    path.write_bytes(b"a\xff")
    for task in ("wikitext2", "ptb", "loss"):
        with pytest.raises(UserError, match=r"not UTF-8 text \(byte 1\)"):
            read(task, path)


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("loss", "enwik8", "text8")])
def test_an_empty_file_is_refused(tmp_path, task):
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(UserError, match=f"{path} (is empty|has no examples of {task})"):
        read(task, path)


WIKI = " \n = First = \n \n Some text . \n = = Part = = \n = = = Sub = = = \n = Second = \n more"


def test_pages_begin_at_titles(tmp_path):
    pages = [" = First = \n \n Some text . \n = = Part = = \n = = = Sub = = = ", " = Second = \n more"]
    assert list(split_pages(WIKI)) == pages
    plain = tmp_path / "wiki.test.raw"
    plain.write_bytes(WIKI.replace("\n", "\r\n").encode())
    assert read("wikitext2", plain) == pages
    assert read("wikitext103-sliding", write(tmp_path, "pages.jsonl", *({"page": page} for page in pages))) == pages
    assert list(split_pages("no title")) == ["no title"]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("the dogs ' 1 @,@ 000 @.@ 5 mid @-@ size", "the dogs' 1,000.5 mid-size"),
        ("a , b . c ! d ? e ; f : g", "a, b. c! d? e; f: g"),
        ("( 60 cm ) [ x ] { y }", "(60 cm) [x] {y}"),
        ("\" lobster red \" ' plain '", "\"lobster red\" 'plain'"),
        ("= = = = A = = B", "==== A == B"),
        (" = = = C = = = \n next", " === C ===\nnext"),
        ("5 ° N , N and N N", "5°N, 1 and 1 N"),
        ("John 's", "John's"),
        ("/' 5/", "/'[0-9]/"),
    ],
)
def test_wikitext_is_detokenized(raw, text):
    assert detokenize(raw) == text


def test_ptb_is_detokenized():
    line = " no it was n't black monday the company 's workers ' pay $ N or N % they 'll say <unk> a $ sign 'tis "
    assert detokenize_ptb(line) == (
        "no it wasn't black monday the company's workers' pay $N or N% they'll say <unk> a $ sign 'tis"
    )


def test_the_last_bytes_are_read_from_a_character_on(tmp_path):
    task, path = Compression("enwik8", "byte", whole=20, tail=8), tmp_path / "enwik8"
    path.write_bytes(b"x" * 11 + "é abcé".encode() + b"\xc3")  # the cut is inside the first é
    assert path.stat().st_size == 20
    assert list(task.read(path)) == [" abcé"]
    path.write_bytes(b"abcdefgh")
    assert list(task.read(path)) == ["abcdefgh"]
    path.write_bytes(b"ab\xffdefgh")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 2\)"):
        list(task.read(path))
    path.write_bytes(b"abc")
    with pytest.raises(UserError, match=r"has 3 bytes; expected the 20 of enwik8, or its last 8"):
        list(task.read(path))


def story(question="21 `` I saw the XXXXX 's , '' she said .\tking\t\tking|a|b|c|d|e|f|g|h|i", n=20):
    return [f"{number} Line {number} did n't end ." for number in range(1, n + 1)] + [question]


def test_the_childrens_book_test(tmp_path):
    path = write(tmp_path, "cbtest_CN_test_2500ep.txt", *story(), "", *story())
    first, second = read("cbt-cn", path)
    assert first == second
    assert first.before.startswith("Line 1 did n't end . Line 2 did")
    assert first.before.endswith("end . `` I saw the")
    assert (first.after, first.candidates, first.label) == ("'s , '' she said .", ("king", *"abcdefghi"), 0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (story(n=19), r"line 20 begins with '21'; expected 20"),
        (story()[:-1], r"ends after sentence 20 of a story; expected 21"),
        (story("21 no blank\tking\t\tking|a|b|c|d|e|f|g|h|i"), r"line 21 is no question"),
        (story("21 XXXXX\tking\t\tking|a|b"), r"line 21 is no question"),
        (story("21 XXXXX\tqueen\t\tking|a|b|c|d|e|f|g|h|i"), r"line 21 is no question"),
        (story("21 XXXXX"), r"line 21 is no question"),
    ],
)
def test_a_wrong_story_is_refused(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read("cbt-cn", write(tmp_path, "story.txt", *lines))


def test_files_are_found_by_their_names(tmp_path):
    (tmp_path / "wikitext-2-raw").mkdir()
    (tmp_path / "wikitext-2-raw" / "wiki.test.raw").write_text(WIKI)
    (tmp_path / "wiki.test.tokens").write_text(WIKI)
    raw = locate(TASKS["wikitext2"], [tmp_path])
    assert (raw.name, raw.standard) == (str(tmp_path / "wikitext-2-raw" / "wiki.test.raw"), True)
    other = locate(TASKS["wikitext103"], [tmp_path])
    assert (other.name, other.standard) == (str(tmp_path / "wiki.test.tokens"), False)
    mine = write(tmp_path, "mine.jsonl", {"text": "a b"})
    assert not locate(TASKS["lambada"], [mine]).standard
    lambada = write(tmp_path, "lambada_test.jsonl", {"text": "a b"})
    assert locate(TASKS["lambada"], [mine, lambada]).name == str(lambada)
    assert locate(TASKS["loss"], [f"{tmp_path}/*.jsonl"]).paths == (lambada, mine)


def test_a_missing_file_says_both_ways(tmp_path):
    with pytest.raises(UserError, match=r"no examples of lambada: download .* leave --data out .*'gpt2_jax\[eval\]'"):
        locate(TASKS["lambada"], [tmp_path])
    with pytest.raises(UserError, match=r"ptb has no dataset on the hub; type --data DIR, with ptb.test.txt"):
        locate(TASKS["ptb"], None)
    with pytest.raises(UserError, match=r"loss has no dataset on the hub; type --data FILE"):
        locate(TASKS["loss"], None)
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        locate(TASKS["lambada"], [tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"matches no file"):
        locate(TASKS["loss"], [tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"is a directory; type its files"):
        locate(TASKS["loss"], [tmp_path])


class Hub:
    """Stands for `datasets`."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def load_dataset(self, *names, **options):
        self.asked.append((names, options))
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            yield row


def test_examples_come_from_the_hub(monkeypatch):
    hub = Hub([{"text": "a b"}, {"text": "c d"}, ConnectionError("gone\nnow")])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    task = TASKS["lambada"]
    found = locate(task, None)
    assert (found.name, found.standard) == ("EleutherAI/lambada_openai, default, test", True)
    assert [example.word for example in load_examples(task, found, limit=2)] == ["b", "d"]
    assert hub.asked == [(("EleutherAI/lambada_openai", "default"), {"split": "test", "streaming": True})]
    with pytest.raises(UserError, match=r"from the hub \(ConnectionError: gone now\); without network, download"):
        load_examples(task, found)
    hub.rows = [{"text": 1}]
    with pytest.raises(UserError, match=r"lambada_openai, default, test, row 1: text is 1"):
        load_examples(task, found)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"type --data DIR, with lambada_test.jsonl .* pip install 'gpt2_jax\[eval\]'"):
        load_examples(task, found)


def test_tasks_by_name():
    assert [task.name for task in find_tasks("lambada, hellaswag,lambada")] == ["lambada", "hellaswag"]
    assert [task.name for task in find_tasks(["ptb"])] == ["ptb"]
    with pytest.raises(UserError, match=r"no task 'lambda'; the tasks are hellaswag, hellaswag-completion, lambada"):
        find_tasks("lambda")
    with pytest.raises(UserError, match="no task is named"):
        find_tasks(",")
