"""`prepare` compared with the texts, tiktoken and llm.c's file format; kills, full disks and bad input."""

import gzip
import hashlib
import itertools
import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import read_llmc, write_llmc, write_nanogpt, write_npy

from gpt2_jax.config import DataConfig
from gpt2_jax.data import hub
from gpt2_jax.data.__main__ import main as inspect
from gpt2_jax.data.corpus import read_corpus, tokenize
from gpt2_jax.data.encode import encoder, last_safe_cut
from gpt2_jax.data.manifest import read_manifest
from gpt2_jax.data.sources import BLOCK_BYTES, FileSource
from gpt2_jax.data.tokenizer import gpt2_encoding
from gpt2_jax.errors import UserError
from gpt2_jax.prepare import main as prepare

END = 256  # end-of-text of the bytes tokenizer


def documents(seed=0, count=300):
    """Documents with awkward characters, some of them empty."""
    rng = random.Random(seed)
    pieces = ["word ", "\n", "naïve ", "日本語", "<|endoftext|>", "  ", "😀", "\u2028", '"quoted" ', "123 "]
    sizes = [rng.choice([0, 1, 5, 50, 400]) for _ in range(count)]
    return ["".join([f"{number}:"] * (size > 0) + rng.choices(pieces, k=size)) for number, size in enumerate(sizes)]


@pytest.fixture
def lines(tmp_path):
    """`documents` as JSON lines, with an empty line among them."""
    path = tmp_path / "documents.jsonl"
    rows = [json.dumps({"text": text, "id": number}) for number, text in enumerate(documents())]
    path.write_text("\n".join([*rows[:10], "", *rows[10:]]) + "\n")
    return path


def run(*args):
    """Runs the command in this process."""
    assert prepare([str(arg) for arg in args]) == 0


def tokens_of(directory, split):
    """All tokens of a split, read independently of the package."""
    return [token for path in sorted(directory.glob(f"{split}_*.bin")) for token in read_llmc(path)]


def documents_of(directory, split):
    """The documents of a split; the tokens must be bytes."""
    parts, tokens = [], tokens_of(directory, split)
    assert not tokens or tokens[0] == END
    for token in tokens:
        if token == END:
            parts.append(bytearray())
        else:
            parts[-1].append(token)
    return [part.decode() for part in parts]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- the contents of the files -------------------------------------------------------------------------


def test_every_document_is_written_once_after_an_end_of_text(lines, tmp_path):
    run(lines, "--out", tmp_path / "out", "--tokenizer", "bytes", "--shard-tokens", "5000", "--workers", "2")
    splits = [documents_of(tmp_path / "out", split) for split in ("train", "val")]
    assert sorted(splits[0] + splits[1]) == sorted(text for text in documents() if text)
    order = {text: number for number, text in enumerate(documents())}
    for split in splits:
        assert [order[text] for text in split] == sorted(order[text] for text in split)
    shards = sorted((tmp_path / "out").glob("*.bin"))
    assert len(shards) > 4
    last = {path.name for path in (shards[-1], [path for path in shards if "train" in path.name][-1])}
    assert all(len(read_llmc(path)) == 5000 for path in shards if path.name not in last)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_damaged_line_in_the_middle_loses_nothing_else(tmp_path, workers, monkeypatch):
    monkeypatch.setattr("gpt2_jax.data.sources.BLOCK_BYTES", 2000)
    rows = [json.dumps({"text": f"document {number} " * 10}) for number in range(1000)]
    rows.insert(150, "{broken")
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    args = [tmp_path / "a.jsonl", "--tokenizer", "bytes", "--workers", workers, "--out"]
    for _ in range(2):
        with pytest.raises(UserError, match="line 151 is not JSON"):
            run(*args, tmp_path / "out")
    run(*args, tmp_path / "out", "--on-error", "skip")
    run(*args, tmp_path / "whole", "--on-error", "skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")) == 1000


def test_parquet_need_not_be_utf8(gpt2_vocabulary, in_process, tmp_path):
    texts = pyarrow.array([b"fine", b"\xff\xfe", None, b"too"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    args = [tmp_path / "a.parquet", "--val-fraction", "0", "--out", tmp_path / "out"]
    with pytest.raises(
        UserError, match=r"row 2 is not UTF-8 text .byte 0.; correct it, leave it out, or type --on-error skip"
    ):
        run(*args)
    run(*args, "--on-error", "skip")
    assert len([token for token in tokens_of(tmp_path / "out", "train") if token == 50256]) == 2


def test_text_that_cannot_be_cut_is_read_in_linear_time(tmp_path, monkeypatch):
    """With a thousand blocks, reading in quadratic time would take minutes."""
    monkeypatch.setattr("gpt2_jax.data.sources.BLOCK_BYTES", 1 << 13)
    words = "\r\n".join(f"word{number}" for number in range(100_000)).encode()
    for name, content in (("words", words), ("letters", b"a" * 8_000_000), ("spaces", b" " * 8_000_000)):
        (tmp_path / name).write_bytes(content)
        start = time.perf_counter()
        source = FileSource([str(tmp_path / name)], "text", 0, "gpt2", False)
        parts = [block.content.read() for block in source.blocks(None)]
        assert b"".join(parts) == content
        assert time.perf_counter() - start < 10
        assert (len(parts) > 10) == (name == "words")


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet", "workers", "blocks"])
def test_every_format_and_number_of_workers_gives_the_same_tokens(lines, tmp_path, kind, monkeypatch, request):
    args = ["--tokenizer", "bytes", "--shard-tokens", "7000"]
    if kind not in ("workers", "blocks"):
        request.getfixturevalue("in_process")
    run(lines, "--out", tmp_path / "expected", *args)
    other, workers = tmp_path / f"documents.jsonl.{kind}", "1"
    if kind == "gz":
        other.write_bytes(gzip.compress(lines.read_bytes()))
    elif kind == "zst":
        half = len(lines.read_bytes()) // 2
        frames = [lines.read_bytes()[:half], lines.read_bytes()[half:]]
        other.write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, frames)))
    elif kind == "parquet":
        other = tmp_path / "documents.parquet"
        table = pyarrow.table({"id": list(range(300)), "text": documents()})
        pyarrow.parquet.write_table(table, other, row_group_size=70)
    else:
        other, workers = lines, "3"
        if kind == "blocks":
            monkeypatch.setattr("gpt2_jax.data.sources.BLOCK_BYTES", 1000)
    run(other, "--out", tmp_path / "out", "--workers", workers, *args)
    ours, expected = contents(tmp_path / "out"), contents(tmp_path / "expected")
    del ours["manifest.json"], expected["manifest.json"]
    assert ours == expected


def test_shakespeare_has_the_tokens_of_nanogpt_and_of_training(gpt2_vocabulary, in_process, shared_data, tmp_path):
    """nanoGPT's data/shakespeare/prepare.py prints 301,966 and 36,059. An end-of-text token precedes both here."""
    path = shared_data / "tinyshakespeare.txt"
    run(path, "--out", tmp_path / "out")
    train, val = (tokens_of(tmp_path / "out", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (301_966 + 1, 36_059 + 1)
    assert (train[0], val[0]) == (50256, 50256)
    text = tiktoken.get_encoding("gpt2").decode_bytes(train[1:]) + tiktoken.get_encoding("gpt2").decode_bytes(val[1:])
    assert text == path.read_bytes()
    data = DataConfig(text=str(path))
    corpus = tokenize(read_corpus(data), data)
    np.testing.assert_array_equal(corpus.train, train)
    np.testing.assert_array_equal(corpus.val, val)


def test_a_text_of_two_blocks_has_the_tokens_of_the_whole(gpt2_vocabulary, shared_data, tmp_path):
    """The text is cut where that does not change GPT-2's tokens. Two workers tokenize it."""
    path = shared_data / "wikitext2_valid.txt"
    assert path.stat().st_size > BLOCK_BYTES
    run(path, "--out", tmp_path / "out", "--val-fraction", "0", "--shard-tokens", "100000", "--workers", "2")
    tokens = tokens_of(tmp_path / "out", "train")
    assert tokens[1:] == tiktoken.get_encoding("gpt2").encode_ordinary(path.read_text())
    assert not list((tmp_path / "out").glob("val*"))


def test_text_files_are_split_as_in_training(in_process, tmp_path, capsys):
    (tmp_path / "text" / "deep").mkdir(parents=True)
    for number in range(40):
        (tmp_path / "text" / ("deep" if number % 2 else ".") / f"{number}.txt").write_text(f"text {number} ")
    (tmp_path / "text" / "empty.txt").touch()
    pattern = str(tmp_path / "text" / "**" / "*.txt")
    run(pattern, "--out", tmp_path / "out", "--tokenizer", "bytes", "--val-fraction", "0.2")
    data = DataConfig(text=pattern, tokenizer="bytes", val_fraction=0.2)
    corpus = tokenize(read_corpus(data), data)
    assert tokens_of(tmp_path / "out", "train") == corpus.train.tolist()
    assert tokens_of(tmp_path / "out", "val") == corpus.val.tolist()
    # A list of files, as a shell expands the pattern, gives the same split.
    run(*sorted(tmp_path.rglob("*.txt")), "--out", tmp_path / "out2", "--tokenizer", "bytes", "--val-fraction", "0.2")
    assert tokens_of(tmp_path / "out2", "val") == corpus.val.tolist()
    assert "next      python -m gpt2_jax.train --config quickstart --data.text ''" in capsys.readouterr().out


def test_a_single_text_is_split_by_characters_for_any_block_size(tmp_path, monkeypatch):
    text = "日本語 のテキスト。\n" * 30
    (tmp_path / "text.txt").write_text(text)
    for block in (7, 100, 1 << 20):
        monkeypatch.setattr("gpt2_jax.data.sources.BLOCK_BYTES", block)
        for tokenizer in ("bytes", "gpt2"):  # the bytes tokenizer may split a character
            source = FileSource([str(tmp_path / "text.txt")], "text", 0.3, tokenizer, False)
            parts = {"train": b"", "val": b""}
            blocks = list(source.blocks(None))
            for part in blocks:
                parts[part.split] += part.content.read()
            cut = int(len(text.encode()) * 0.7) if tokenizer == "bytes" else len(text[: int(len(text) * 0.7)].encode())
            assert parts == {"train": text.encode()[:cut], "val": text.encode()[cut:]}
            assert [part.split for part in blocks if part.starts_document] == ["train", "val"]
            for number, part in enumerate(blocks):  # reading can resume after each of them
                assert pieces(source.blocks(part.cursor)) == pieces(blocks[number + 1 :])


def pieces(blocks):
    """The bytes of each split and where documents start in them, however they are cut into blocks."""
    parts = {"train": (b"", []), "val": (b"", [])}
    for block in blocks:
        content, starts = parts[block.split]
        parts[block.split] = (content + block.content.read(), starts + [len(content)] * block.starts_document)
    return parts


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    (path := tmp_path / "text.txt").write_text("some text")
    blocks = list(FileSource([str(path)], "text", 0, "bytes", False).blocks(None))
    path.write_text("some")
    with pytest.raises(UserError, match=r"text.txt became shorter while it was read"):
        blocks[0].content.read()
    path.unlink()
    with pytest.raises(UserError, match=r"text.txt cannot be read \(No such file or directory\)"):
        blocks[0].content.read()


def test_the_limit_is_exact(lines, in_process, tmp_path):
    run(lines, "--out", tmp_path / "all", "--tokenizer", "bytes")
    run(lines, "--out", tmp_path / "some", "--tokenizer", "bytes", "--limit", "12345", "--val-fraction", "0")
    whole = sorted(tokens_of(tmp_path / "all", "train") + tokens_of(tmp_path / "all", "val"))
    some = tokens_of(tmp_path / "some", "train")
    assert len(some) == 12345
    assert len(whole) > 20_000
    assert json.loads((tmp_path / "some" / "manifest.json").read_text())["train"]["tokens"] == 12345


# --- tokens --------------------------------------------------------------------------------------------


STRINGS = [
    "",
    "hello",
    "<|endoftext|> as text",
    " " * 100_000,
    "naïve 😀\n\t",
    "\r\n \x1c\x85  x",
    "'s 'LL ſ's I'll",
    "\u088f's a\ua7ce b\u0c5c\u088f",  # letters of Unicode 17, which tiktoken or gigatoken may not know
]


@pytest.mark.parametrize("fast", [True, False])
def test_encoders_give_the_ids_of_tiktoken(gpt2_vocabulary, shared_data, fast, monkeypatch):
    if fast:
        pytest.importorskip("gigatoken")
    else:
        monkeypatch.setattr("gpt2_jax.data.encode.importlib.util.find_spec", lambda name: None)
    encoding = gpt2_encoding()
    encode = encoder(encoding)
    texts = [
        *STRINGS,
        (shared_data / "wikitext2_valid.txt").read_text(),
        (shared_data / "tinyshakespeare.txt").read_text(),
    ]
    for text in texts:
        tokens = encode(text.encode())
        assert tokens.dtype == np.uint16
        np.testing.assert_array_equal(tokens, encoding.encode_ordinary(text))
    with pytest.raises(UnicodeDecodeError) as error:
        encode(b"word " * 300_000 + b"\xff")
    assert error.value.start == 1_500_000

    @given(st.text(st.characters(codec="utf-8"), max_size=200))
    @settings(max_examples=300, deadline=None)
    def same(text):
        assert encode(text.encode("utf-8", "replace")).tolist() == encoding.encode_ordinary(
            text.encode("utf-8", "replace").decode()
        )

    same()


SPACES = " \n\t\r\u00a0\u0085\u2028\x1c"


def test_a_safe_cut_does_not_change_the_tokens(gpt2_vocabulary):
    encoding = gpt2_encoding()

    @given(st.text(st.sampled_from("ab'sé日1½.!-" + SPACES * 2), min_size=1, max_size=40))
    @settings(max_examples=1000, deadline=None)
    def same(text):
        cut = last_safe_cut(text.encode())
        parts = [text.encode()[:cut].decode(), text.encode()[cut:].decode()]
        assert encoding.encode_ordinary(parts[0]) + encoding.encode_ordinary(parts[1]) == encoding.encode_ordinary(text)

    same()
    assert last_safe_cut(b"one two\nthree") == 7
    assert last_safe_cut("日本\n語".encode()) == 6
    assert last_safe_cut(b"  x") == last_safe_cut(b"word") == last_safe_cut(b"") == 0


def test_unpaired_surrogates_have_the_tokens_of_tiktoken(gpt2_vocabulary, in_process, tmp_path):
    text = "a \ud83d b \ud83d\ude00 c"  # JSON can contain both; the second is an emoji
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    run(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--val-fraction", "0")
    assert tokens_of(tmp_path / "out", "train") == [50256, *tiktoken.get_encoding("gpt2").encode_ordinary(text)]


# --- interruptions -------------------------------------------------------------------------------------


COMMAND = """
import sys
from gpt2_jax import prepare
from gpt2_jax.data import preparation, sources
preparation.SECONDS_BETWEEN_SAVES = 0.01
sources.BLOCK_BYTES = 1 << 18
if __name__ == "__main__":
    prepare.run_command(prepare.main)
"""

SHARDS = ["--tokenizer", "bytes", "--shard-tokens", "2000000"]


@pytest.fixture(scope="module")
def many_lines(tmp_path_factory):
    """20 MB of JSON lines, which take a while."""
    text = "".join(json.dumps({"text": text}) + "\n" for seed in range(20) for text in documents(seed))
    path = tmp_path_factory.mktemp("source") / "many.jsonl"
    path.write_text(text * (20_000_000 // len(text)))
    return path


@pytest.fixture(scope="module")
def uninterrupted(many_lines, tmp_path_factory):
    """The directory that a run over `many_lines` writes in one go, with the options `SHARDS`."""
    out = tmp_path_factory.mktemp("uninterrupted")
    run(many_lines, *SHARDS, "--workers", "2", "--out", out)
    return contents(out)


def start(tmp_path, *args):
    """Starts the command in another process, where it saves its progress often."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    return subprocess.Popen(
        [sys.executable, script, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_writes_the_same_bytes(many_lines, uninterrupted, tmp_path, kills):
    out, progress = tmp_path / "out", tmp_path / "out" / "progress.json"
    rng, saved = random.Random(0), []
    for _ in range(kills):
        process = start(tmp_path, many_lines, *SHARDS, "--out", out, "--workers", rng.choice([1, 2, 3]))
        before = progress.read_text() if progress.exists() else ""
        deadline = time.perf_counter() + 60
        while not progress.exists() or progress.read_text() == before:  # until it has written something
            assert process.poll() is None, process.communicate()
            assert time.perf_counter() < deadline
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.25 / kills))
        process.kill()
        process.communicate()
        assert not (out / "manifest.json").exists()  # it was not too late for the kill
        saved.append(progress.read_text())
    assert len(set(saved)) > kills // 2  # the runs progressed
    output, _ = start(tmp_path, many_lines, *SHARDS, "--out", out, "--workers", "1").communicate(timeout=120)
    assert "resumes after" in output
    assert contents(out) == uninterrupted


def test_workers_end_with_their_parent(many_lines, tmp_path):
    process = start(tmp_path, many_lines, "--tokenizer", "bytes", "--out", tmp_path / "out", "--workers", "2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := children.read_text().split()) < 3:  # two, and Python's resource tracker
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    deadline = time.perf_counter() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.perf_counter() < deadline, workers
        time.sleep(0.05)


def test_a_full_disk_is_a_one_line_error_and_the_run_resumes_when_there_is_room(many_lines, uninterrupted, tmp_path):
    args = [str(many_lines), *SHARDS, "--workers", "1", "--out", f"{tmp_path}/full"]
    # Files have 3 MB at most, and a shard has 4 MB.
    full = f"trap '' XFSZ; ulimit -f 3000; exec {sys.executable} -m gpt2_jax.prepare {shlex.join(args)}"
    process = subprocess.run(["bash", "-c", full], capture_output=True, text=True, check=False)
    assert process.returncode == 2, process.stderr
    assert process.stderr == (
        f"error: {tmp_path}/full cannot be written: File too large; make room and type the same command to resume, or "
        "give another --out\n"
    )
    assert not list((tmp_path / "full").glob("*.bin"))  # nothing that looks finished
    run(*args)
    assert contents(tmp_path / "full") == uninterrupted


def test_another_command_in_the_same_directory_is_refused(lines, in_process, tmp_path, capsys):
    out = tmp_path / "out"
    run(lines, "--out", out, "--tokenizer", "bytes")
    before = contents(out)
    run(lines, "--out", out, "--tokenizer", "bytes")  # the same command prints the same summary
    assert capsys.readouterr().out.count("wrote ") == 2
    for other, message in (
        (["--tokenizer", "bytes", "--shard-tokens", "99"], "shard_tokens: 100000000 -> 99"),
        (["--tokenizer", "bytes", "--val-fraction", "0.5"], "val_fraction: 0.1 -> 0.5"),
        (["--tokenizer", "bytes", "--limit", "5"], "limit: 0 -> 5"),
        (["--tokenizer", "gpt2"], "tokenizer: 'bytes' -> 'gpt2'"),
    ):
        with pytest.raises(UserError, match=message):
            run(lines, "--out", out, *other)
    with lines.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"was made with another source or other options \(.*bytes: "):
        run(lines, "--out", out, "--tokenizer", "bytes")
    assert contents(out) == before
    write_nanogpt(tmp_path / "train.bin", [1])
    with pytest.raises(UserError, match=r"has train.bin, which this command did not write"):
        run(lines, "--out", tmp_path, "--tokenizer", "bytes")


def break_off(monkeypatch, source, after):
    """Makes a source fail after some blocks. The run then saves its progress and ends."""
    blocks = source.blocks

    def breaks(self, cursor):
        yield from itertools.islice(blocks(self, cursor), after)
        raise hub._hub_error("small", ConnectionError("reset"))

    monkeypatch.setattr(source, "blocks", breaks)


def test_missing_files_are_noticed(lines, in_process, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2_jax.data.sources.BLOCK_BYTES", 1000)
    out = tmp_path / "out"
    args = [lines, "--tokenizer", "bytes", "--shard-tokens", "20000", "--out"]
    with monkeypatch.context() as patch:
        break_off(patch, FileSource, after=20)
        with pytest.raises(UserError, match="reset"):
            run(*args, out)
    files = {"train_000000.bin", "train_000001.bin", "train_000002.bin.partial", "val_000000.bin.partial"}
    assert contents(out).keys() == files | {"progress.json"}
    for name in sorted(files):
        path = out / name
        path.rename(tmp_path / "away")
        before = (out / "progress.json").read_text()
        for _ in range(2):
            with pytest.raises(UserError, match=rf"{path} is missing; restore it"):
                run(*args, out)
        assert (out / "progress.json").read_text() == before
        (tmp_path / "away").rename(path)
    run(*args, out)
    run(*args, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    (out / "train_000001.bin").unlink()
    with pytest.raises(UserError, match=r"train_000001.bin is missing"):
        run(*args, out)


def test_a_run_that_fails_at_the_first_document_leaves_no_files(lines, in_process, tmp_path):
    """A run was killed after a shard, before it saved progress. Then the source is damaged, then it is repaired."""
    out, content = tmp_path / "out", lines.read_bytes()
    run(lines, "--out", tmp_path / "whole", "--tokenizer", "bytes", "--shard-tokens", "5000")
    run(lines, "--out", out, "--tokenizer", "bytes", "--shard-tokens", "5000")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").unlink()
    nothing = {split: {"number": 0, "tokens": 0, "documents": 0} for split in ("train", "val")}
    progress = {"settings": manifest["settings"], "cursor": None, "text_bytes": 0, "skipped": 0}
    (out / "progress.json").write_text(json.dumps({**progress, "open": nothing, "shards": []}))
    lines.write_bytes(b"{" + content[1:].replace(b'"', b"'", 1))
    with pytest.raises(UserError, match="line 1 is not JSON"):
        run(lines, "--out", out, "--tokenizer", "bytes", "--shard-tokens", "5000")
    assert contents(out) == {}
    lines.write_bytes(content)
    run(lines, "--out", out, "--tokenizer", "bytes", "--shard-tokens", "5000")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_glob_does_not_match_the_output(in_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one ")
    Path("b.txt").write_text("two ")
    for _ in range(2):
        run("**/*", "--out", "deep/out", "--tokenizer", "bytes")
    assert sorted(
        documents_of(tmp_path / "deep" / "out", "train") + documents_of(tmp_path / "deep" / "out", "val")
    ) == [
        "one ",
        "two ",
    ]
    run("a.txt", tmp_path / "b.txt", "--out", "mixed", "--tokenizer", "bytes")  # relative and absolute


# --- bad sources ---------------------------------------------------------------------------------------


ZSTD = zstandard.ZstdCompressor().compress(b"fine " + random.Random(0).randbytes(100_000).hex().encode())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"text": \n',
            r"line 2 is not JSON \(.*; fix it and give another --out, or type --on-error skip",
        ),
        ("a.jsonl", b'{"text": "fine"}\n\n\n[1]\n', "line 4 has no field 'text', but list"),
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"body": "x", "id": 1}',
            "line 2 has no field 'text', but the fields body, id",
        ),
        ("a.jsonl", b'{"text": "fine"}\n{"text": null}', "line 2: text is NoneType, not text"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}', "line 2 is not JSON"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "fine"}\n' * 9, mtime=0)[:-9],  # the time would be part of the test's name
            r"a.jsonl.gz cannot be read \(.*; copy it again",
        ),
        ("a.jsonl.gz", b'{"text": "fine"}\n', r"cannot be read \(Not a gzipped file"),
        ("a.jsonl.zst", b'{"text": "fine"}\n', r"a.jsonl.zst cannot be read \("),
        ("a.jsonl.zst", ZSTD[:-9], r"a.jsonl.zst cannot be read \(the last frame is cut off"),
        ("a.txt.zst", ZSTD[: len(ZSTD) // 2], r"a.txt.zst cannot be read \(the last frame is cut off"),
        ("a.parquet", b"PAR1 not quite", r"a.parquet cannot be read \(Parquet"),
        ("a.txt", b"fine so far caf\xe9 \n", r"is not UTF-8 text \(byte 15\); correct it, .*--on-error skip"),
        ("a.txt", b"caf\xc3", r"is not UTF-8 text \(byte 3\)"),
        ("a.txt", b"", "every file is empty"),
        ("a.jsonl", b"\n\n", "no document has any text"),
        ("a.jsonl", b'{"text": ""}\n', "no document has any text"),
    ],
)
def test_damaged_sources_are_errors_that_name_the_place(gpt2_vocabulary, in_process, name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(tmp_path / name, "--out", tmp_path / "out", "--workers", "1")
    left = {path.name for path in (tmp_path / "out").iterdir()} if (tmp_path / "out").exists() else set()
    assert not any(path.endswith(".bin") for path in left)
    if "fine" not in content.decode(errors="replace") or name != "a.jsonl":
        assert not left


def test_damaged_documents_can_be_skipped(in_process, tmp_path, capsys):
    rows = [json.dumps({"text": text}) for text in ("one", "two", "three")]
    (tmp_path / "a.jsonl").write_text("\n".join([rows[0], "{", rows[1], '{"text": 5}', rows[2]]))
    (tmp_path / "b.txt").write_text("four")
    args = [*sorted(tmp_path.glob("?.*")), "--out", tmp_path / "out", "--tokenizer", "bytes", "--val-fraction", "0"]
    with pytest.raises(UserError, match=r"a.jsonl, line 2 is not JSON"):
        run(*args)
    run(*args, "--on-error", "skip")
    assert documents_of(tmp_path / "out", "train") == ["one", "two", "three", "four"]
    assert "skipped   2 documents" in capsys.readouterr().out


def test_text_that_is_not_utf8_can_be_skipped(gpt2_vocabulary, in_process, tmp_path, capsys):
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_text("four")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    args = ["--out", tmp_path / "out", "--val-fraction", "0", "--on-error", "skip"]
    run(*sorted(tmp_path.glob("?.txt")), *args)
    assert tokens_of(tmp_path / "out", "train") == [50256, 14337]
    assert "skipped   2 documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.txt"], "'missing.txt' matches no file; --help lists"),
        (["tinyshakespeare.txt"], "type curl -o tinyshakespeare.txt"),
        (["."], r"'.' matches no file; type './\*\*/\*.txt'"),
        ([], "no SOURCE; give files, or one of fineweb-edu-10b"),
        (["stdlib", "shakespeare"], "stdlib must be the only SOURCE"),
        (["stdlib", "--workers", "-1"], "--workers -1; expected 0 or more"),
        (["stdlib", "--val-fraction", "1"], "--val-fraction 1.0; expected 0 or more and below 1"),
        (["stdlib", "--shard-tokens", "0"], "--shard-tokens 0; expected 1 to 2147483647"),
        (["stdlib", "--tokenizer", "chars"], "invalid choice 'chars'"),
        (["fineweb-10b-tokenized", "--tokenizer", "bytes"], "--tokenizer is for text"),
        (["fineweb-edu-10b"], "HuggingFaceFW/fineweb-edu cannot be read from the hub .*; without network, prepare on"),
        (["fineweb-10b-tokenized"], "kjj0/fineweb10B-gpt2 cannot be read from the hub .*; without network, prepare on"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_errors(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        run(*args, "--out", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_directory_is_an_error(lines, tmp_path):
    for out in (lines, lines / "deep"):
        with pytest.raises(UserError, match=r"cannot be written: .*; make room and type the same command"):
            run(lines, "--out", out, "--tokenizer", "bytes")


# --- the hub -------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A dataset in a directory; `datasets` streams it like one on the hub."""
    directory = tmp_path / "dataset"
    (directory / "data").mkdir(parents=True)
    for name, part in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("validation-00000-of-00001", 2)):
        table = pyarrow.table({"text": documents(part), "id": list(range(300))})
        pyarrow.parquet.write_table(table, directory / "data" / f"{name}.parquet", row_group_size=40)
    monkeypatch.setitem(hub.DATASETS, "small", hub.Dataset(str(directory), None, "for tests"))
    splits = (("validation", "val"), ("train", "train"))
    monkeypatch.setitem(hub.DATASETS, "small-split", hub.Dataset(str(directory), None, "for tests", splits))
    monkeypatch.setattr(hub, "_info", lambda repository: SimpleNamespace(sha="1234"))
    monkeypatch.setattr(hub, "BLOCK_BYTES", 5000)
    return directory


def test_datasets_are_streamed(dataset, in_process, tmp_path):
    run("small", "--out", tmp_path / "out", "--tokenizer", "bytes", "--val-fraction", "0.2")
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(text for part in (0, 1) for text in documents(part) if text)
    assert 60 < len(val) < 140  # about 0.2 of 480
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["source"]
    assert source == {"dataset": str(dataset), "subset": None, "revision": "1234", "field": "text"}
    run("small-split", "--out", tmp_path / "split", "--tokenizer", "bytes")
    assert documents_of(tmp_path / "split", "val") == [text for text in documents(2) if text]
    with pytest.raises(UserError, match=r"small: .*body.*type --field"):
        run("small", "--out", tmp_path / "out2", "--tokenizer", "bytes", "--field", "body")


def test_a_run_resumes_after_a_lost_connection(dataset, in_process, tmp_path, monkeypatch):
    args = ["small", "--tokenizer", "bytes", "--out"]
    run(*args, tmp_path / "whole")
    for after in (3, 1, 5):
        with monkeypatch.context() as patch:
            break_off(patch, hub.HubSource, after)
            with pytest.raises(UserError, match=r"cannot be read from the hub .ConnectionError: reset"):
                run(*args, tmp_path / "broken")
    # The resumed run keeps the revision that it started with.
    monkeypatch.setattr(hub, "_info", lambda repository: SimpleNamespace(sha="newer"))
    run(*args, tmp_path / "broken")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_tokenized_fineweb_is_downloaded_and_checked(tmp_path, monkeypatch):
    remote = tmp_path / "remote"
    remote.mkdir()
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{n:06d}.bin" for n in range(1, 5))]
    for number, name in enumerate(names):
        write_llmc(remote / name, [50256, *range(100 * number, 100 * number + 1000)])

    def info(repository):
        files = [SimpleNamespace(rfilename="README.md", lfs=None)]
        for name in names:
            sha256 = hashlib.sha256((remote / name).read_bytes()).hexdigest()
            files.append(SimpleNamespace(rfilename=name, lfs=SimpleNamespace(sha256=sha256)))
        return SimpleNamespace(sha="1234", siblings=files)

    downloaded = []

    def download(repository, name, *, repo_type, revision, local_dir):
        assert (repository, repo_type, revision) == (hub.TOKENIZED, "dataset", "1234")
        downloaded.append(name)
        (Path(local_dir) / name).write_bytes((remote / name).read_bytes())

    monkeypatch.setattr(hub, "_info", info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    run("fineweb-10b-tokenized", "--out", tmp_path / "out", "--limit", "1500")
    assert downloaded == names[:3]
    manifest = read_manifest(tmp_path / "out")
    assert manifest.count("train") == (2002, 2)
    assert manifest.count("val") == (1001, 1)
    run("fineweb-10b-tokenized", "--out", tmp_path / "out")  # more of it
    assert downloaded == names
    path = tmp_path / "out" / names[2]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"fineweb_train_000002.bin is damaged: its SHA-256 is not the hub's"):
        run("fineweb-10b-tokenized", "--out", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    write_llmc(tmp_path / "mine" / "train_000000.bin", [1, 2])
    with pytest.raises(UserError, match=r"mine already has train_000000.bin; give another --out"):
        run("fineweb-10b-tokenized", "--out", tmp_path / "mine")


def test_shakespeare_is_downloaded_once_and_checked(in_process, tmp_path, monkeypatch, shared_data):
    content = (shared_data / "tinyshakespeare.txt").read_bytes()
    monkeypatch.setitem(hub.DOWNLOADS, hub.SHAKESPEARE, (shared_data / "tinyshakespeare.txt").as_uri())
    run("shakespeare", "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert bytes(token for token in tokens_of(tmp_path / "out", "train") if token < END) == content[:1_003_854]
    monkeypatch.setitem(hub.DOWNLOADS, hub.SHAKESPEARE, "file:///nowhere")
    run("shakespeare", "--out", tmp_path / "out", "--tokenizer", "bytes")
    with pytest.raises(UserError, match=r"cannot be downloaded .*; without network, copy it to"):
        run("shakespeare", "--out", tmp_path / "other", "--tokenizer", "bytes")
    monkeypatch.setitem(hub.DOWNLOADS, hub.SHAKESPEARE, Path(__file__).as_uri())
    with pytest.raises(UserError, match=r"is not the expected file: .*; copy the right file to"):
        run("shakespeare", "--out", tmp_path / "other", "--tokenizer", "bytes")
    assert not (tmp_path / "other").exists()


# --- python -m gpt2_jax.data ---------------------------------------------------------------------------


def test_a_prepared_directory_is_shown_and_checked(lines, in_process, tmp_path, capsys):
    out = tmp_path / "out"
    run(lines, "--out", out, "--tokenizer", "bytes", "--shard-tokens", "20000")
    capsys.readouterr()
    assert inspect([str(out), "--windows", "2", "--window-tokens", "10"]) == 0
    text = capsys.readouterr().out
    total = sum(len(read_llmc(path)) for path in out.glob("*.bin"))
    assert f"{total:,} tokens in {len(list(out.glob('*.bin')))} files, tokenizer bytes" in text
    assert "checksums agree" in text
    assert text.count(".bin, tokens") == 2
    path = out / "train_000000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:5000] + b"\1\0" + content[5002:])
    with pytest.raises(UserError, match=r"train_000000.bin is damaged: its SHA-256 is .*; copy or prepare it again"):
        inspect([str(out)])
    path.unlink()
    with pytest.raises(UserError, match=r"train_000000.bin is missing"):
        inspect([str(out)])


def test_directories_of_other_formats_are_shown(tmp_path, capsys, gpt2_vocabulary):
    write_nanogpt(tmp_path / "train.bin", [50256, 31373, 995] * 10)
    write_npy(tmp_path / "val.npy", [31373, 995])
    assert inspect([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "30 tokens, 10 documents, largest 50256" in text
    assert "nothing to compare with" in text
    assert "hello world" in text
    with pytest.raises(UserError, match=r"train.bin has the token 50256, beyond the 257 of the tokenizer 'bytes'"):
        inspect([str(tmp_path), "--tokenizer", "bytes"])
    for arguments, message in (
        ([str(tmp_path / "none")], "cannot be read: No such file"),
        ([str(Path(__file__).parent)], "has no token files"),
        ([str(tmp_path), "--windows", "-1"], "--windows and --seed must be 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            inspect(arguments)
