"""Manifests and progress files with anything in them: one line, and nothing outside their directory is touched."""

import copy
import json

import pytest
from token_files import write_llmc

from gpt2_jax.data.__main__ import main as inspect
from gpt2_jax.data.contents import Contents
from gpt2_jax.data.manifest import read_manifest, saved_settings
from gpt2_jax.data.sources import FileSource
from gpt2_jax.data.writer import ShardWriter
from gpt2_jax.errors import UserError

SHARD = {"file": "train_000000.bin", "tokens": 10, "documents": 1, "sha256": "6f" * 32}
SETTINGS = {"source": {"files": ["a.jsonl"], "count": 1}, "tokenizer": "bytes", "shard_tokens": 400}
MANIFEST = {"settings": SETTINGS, "text_bytes": 1944, "skipped": 0, "shards": [SHARD]}
OPEN = {"train": {"number": 0, "tokens": 10, "documents": 1}, "val": {"number": 0, "tokens": 0, "documents": 0}}
PROGRESS = {"settings": SETTINGS, "cursor": [0, 100, 2], "text_bytes": 5, "skipped": 0, "open": OPEN, "shards": []}
WRONG = [None, False, 3.5, -1, 10**30, "", "x", "../../x", "\0", "\ud800", [], [1, 2], [[]], {}, {"a": 1}]


def changed(table, path, value):
    """A copy with another value at a path of keys; the missing key for the value `changed`."""
    table = copy.deepcopy(table)
    *parents, last = path
    inner = table
    for key in parents:
        inner = inner[key]
    if value is changed:
        del inner[last]
    else:
        inner[last] = value
    return table


def right(path, value):
    """True for values that are as good as the original ones."""
    return (
        (path[-1] == "shards" and value == [])
        or (path[-1] == "file" and value == "x")
        or (path[-1] == "source" and value in ({}, {"a": 1}))
    )


def one_line(error):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    str(error.value).encode()  # no surrogates


MANIFEST_PATHS = [
    ("settings",),
    ("settings", "source"),
    ("settings", "tokenizer"),
    ("text_bytes",),
    ("skipped",),
    ("shards",),
    *(("shards", 0, key) for key in SHARD),
]


@pytest.mark.parametrize("path", MANIFEST_PATHS, ids=lambda path: path[-1])
def test_a_manifest_with_a_wrong_value_is_damaged(path, tmp_path):
    for value in [*WRONG, changed]:
        if right(path, value) or (path[0] == "settings" and (value is changed or isinstance(value, dict))):
            continue  # settings have defaults
        (tmp_path / "manifest.json").write_text(json.dumps(changed(MANIFEST, path, value)))
        if value is changed and path == ("shards",):  # the manifest of another program
            assert read_manifest(tmp_path) is None
            continue
        for read in (read_manifest, lambda path: inspect([str(path), "--tokenizer", "bytes"])):
            with pytest.raises(UserError, match=r"manifest.json is damaged \(.*; prepare the directory again") as error:
                read(tmp_path)
            one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


PROGRESS_PATHS = [
    ("settings",),
    ("text_bytes",),
    ("skipped",),
    ("shards",),
    ("open",),
    ("open", "train"),
    *(("open", split, key) for split in OPEN for key in OPEN[split]),
]


def writer_of(directory):
    return ShardWriter(directory, SETTINGS, 400, 256)


@pytest.mark.parametrize("path", PROGRESS_PATHS, ids=lambda path: ".".join(path))
def test_a_progress_file_with_a_wrong_value_is_damaged(path, tmp_path):
    write_llmc(tmp_path / "train_000000.bin.partial", range(10))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for value in [*WRONG, changed]:
        if right(path, value) or (path == ("settings",) and isinstance(value, dict)):
            continue
        (tmp_path / "progress.json").write_text(json.dumps(changed(PROGRESS, path, value)))
        with pytest.raises(UserError, match=r"progress.json is damaged \(.*; prepare the directory again") as error:
            writer_of(tmp_path)
        one_line(error)
    (tmp_path / "progress.json").write_text(json.dumps(PROGRESS))
    assert writer_of(tmp_path).tokens() == 10
    (tmp_path / "progress.json").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_settings_of_any_kind_are_compared_in_one_line(tmp_path):
    for value in [*WRONG, "y" * 100_000, {"tokenizer": "bytes", "shard_tokens": ["z" * 1000] * 1000}]:
        settings = value if isinstance(value, dict) else {**SETTINGS, "shard_tokens": value}
        (tmp_path / "progress.json").write_text(json.dumps({**PROGRESS, "settings": settings}))
        with pytest.raises(UserError, match="was made with another source or other options") as error:
            writer_of(tmp_path)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 2000


@pytest.mark.parametrize("cursor", [value for value in WRONG if value is not None] + [[0, 1], [0, 1, "x"], [0, -1, 0]])
def test_a_damaged_position_is_one_line(cursor, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    source = FileSource([str(tmp_path / "a.txt")], "text", 0, "bytes", False)
    with pytest.raises(UserError, match=r"the position to resume from is damaged \(.*; give another --out") as error:
        next(source.blocks(cursor))
    one_line(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"[]", "it holds list"),
        (b"\xff", "not UTF-8 text"),
        (b"[" * 100_000, "it is nested more than 64 deep"),
        (b'{"a":' * 100_000, "it is nested more than 64 deep"),
        (b"[" + b"1," * 10_000_000, "it has more than 16,777,216 bytes"),
        (b'{"settings": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_json_beyond_every_limit_is_one_line(content, message, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    for read in (read_manifest, saved_settings, writer_of):
        with pytest.raises(UserError, match=rf"manifest.json is damaged \({message}") as error:
            read(tmp_path)
        one_line(error)


def test_brackets_in_strings_are_not_nested(tmp_path):
    source = {"files": ['\\" [{' * 100], "count": 1}
    (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, "settings": {**SETTINGS, "source": source}}))
    assert read_manifest(tmp_path).settings["source"] == source


def test_what_a_run_kept_about_its_files_may_be_anything(tmp_path):
    """The digests are then computed again."""
    write_llmc(path := tmp_path / "a.bin", range(10))
    row = {"path": "a", "size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns, "inode": path.stat().st_ino}
    good = {**row, "sha256": "6f" * 32}
    for value in WRONG:
        for table in [
            value,
            {"files": value},
            {"files": [value]},
            *({"files": [{**good, key: value}]} for key in good),
        ]:
            (tmp_path / "data.json").write_text(json.dumps(table))
            known = Contents([path], tmp_path, 0).sha256
            assert known in ([None], ["6f" * 32])
            assert known == [None] or table["files"][0]["path"] == value
    (tmp_path / "data.json").write_text(json.dumps({"files": [good]}))
    assert Contents([path], tmp_path, 0).sha256 == ["6f" * 32]
