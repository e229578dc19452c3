"""The readers to fuzz, each with whole files to damage and the files that once did harm."""

import contextlib
import dataclasses
import functools
import gzip
import itertools
import json
import pickle
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

Files = dict[str, bytes]  # of one directory, by name


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader: `read` gets a directory with the files of one of `samples`, and raises only `UserError`."""

    samples: Callable[[], list[Files]]
    read: Callable[[Path], object]


# --- documents -----------------------------------------------------------------------------------------


LINES = b'{"text": "one"}\n{"text": "two \\ud83d", "id": [1, {"a": null}]}\n\n{"text": ""}\n' * 20


def compressed(kind: str) -> list[Files]:
    import zstandard

    compress = gzip.compress if kind == "gz" else zstandard.ZstdCompressor().compress
    frames = compress(LINES) + compress(LINES * 50)
    bomb = compress(b'{"text": "' + bytes(1 << 22))
    return [{f"a.jsonl.{kind}": frames}, {f"a.txt.{kind}": frames}, {f"a.jsonl.{kind}": bomb}, {f"b.txt.{kind}": bomb}]


def read_documents(folder: Path) -> None:
    from gpt2_jax.data import sources
    from gpt2_jax.data.sources import FileSource
    from gpt2_jax.data.tokenizer import get_tokenizer
    from gpt2_jax.data.workers import BlockTokenizer, TokenizeOptions

    sources.MAX_RECORD_BYTES = 1 << 21  # which small files reach
    for tokenizer in ("bytes", "gpt2"):  # of the second only the checks of the text
        source = FileSource([str(path) for path in folder.iterdir()], "text", 0.1, tokenizer, skip_errors=True)
        options = TokenizeOptions("bytes", "text", 0.1, skip_errors=True)
        tokenize = BlockTokenizer(options, get_tokenizer("bytes"))
        for block in itertools.islice(source.blocks(None), 50):
            tokenize(block)


# --- token files ---------------------------------------------------------------------------------------


NPY = b"\x93NUMPY\1\0v\0{'descr': '<u2', 'fortran_order': False, 'shape': (100,), }".ljust(127) + b"\n" + bytes(200)


def token_files() -> list[Files]:
    tokens = np.arange(1000, dtype="<u2").tobytes()
    return [
        {"a.bin": struct.pack("<3i", 20240520, 1, 1000) + bytes(1012) + tokens},
        {"a.bin": struct.pack("<3i", 20240801, 7, 500) + bytes(1012) + tokens},
        {"a.bin": tokens},
        {"a.bin": np.arange(1000, dtype="<u4").tobytes()},
        {"a.bin": np.arange(1000, dtype="<i8").tobytes()},
    ]


def arrays() -> list[Files]:
    return [
        {"a.npy": NPY},
        {"a.npy": NPY.replace(b"'<u2'", b"',u2'")},
        {"a.npy": NPY.replace(b"(100,)", b"(100,%s)" % (b"9" * 30))},
        {"a.npy": NPY.replace(b"hape", b"[" * 60 + b"hape")},
    ]


def read_tokens(folder: Path) -> None:
    from gpt2_jax.data.shards import open_tokens

    for path in folder.iterdir():
        tokens = open_tokens(path)
        assert len(tokens[:100]) == min(len(tokens), 100)
        assert len(tokens[-100:]) == min(len(tokens), 100)


# --- the directory of prepare --------------------------------------------------------------------------


SETTINGS = {
    "source": {"files": ["big.jsonl"], "count": 1, "bytes": 1996500, "listing": "f6" * 32, "field": "text"},
    "tokenizer": "bytes",
    "val_fraction": 0.1,
    "shard_tokens": 400000,
    "limit": 0,
}
SHARDS = [
    {"file": f"{split}_000000.bin", "tokens": 10, "documents": 898, "sha256": "6f" * 32} for split in ("train", "val")
]
MANIFEST = {"settings": SETTINGS, "text_bytes": 1944500, "skipped": 0, "shards": SHARDS}
OPEN = {"train": {"number": 0, "tokens": 10, "documents": 1}, "val": {"number": 0, "tokens": 0, "documents": 0}}
PROGRESS = {"settings": SETTINGS, "cursor": [0, 3, 2], "text_bytes": 5, "skipped": 0, "open": OPEN, "shards": []}
SHARD = struct.pack("<3i", 20240520, 1, 10) + bytes(1012 + 20)


def with_values(name: str, *tables: object) -> list[Files]:
    return [{name: json.dumps(table).encode()} for table in tables]


def manifests() -> list[Files]:
    odd = [
        {**MANIFEST, "shards": [{**SHARDS[0], key: value}]}
        for key, value in [("file", [1, 2]), ("file", False), ("file", "\ud800"), ("file", "\0"), ("documents", {})]
    ]
    return with_values("manifest.json", MANIFEST, *odd, {**MANIFEST, "settings": 1})


def progress_files() -> list[Files]:
    odd = [
        {**PROGRESS, "open": {**OPEN, "train": {**OPEN["train"], key: value}}}
        for key, value in [("tokens", "x"), ("tokens", 3.5), ("number", [[]]), ("number", "../../x")]
    ]
    files = with_values("progress.json", PROGRESS, *odd, {**PROGRESS, "cursor": [[]]}, {**PROGRESS, "cursor": [0, 1]})
    return [{**each, "train_000000.bin.partial": SHARD, "a.txt": b"some text"} for each in files]


def read_prepared(folder: Path) -> None:
    from gpt2_jax.data.manifest import read_manifest, saved_settings, verify
    from gpt2_jax.data.sources import FileSource
    from gpt2_jax.data.writer import ShardWriter
    from gpt2_jax.errors import UserError

    try:
        settings = saved_settings(folder)
        if manifest := read_manifest(folder):
            manifest.to_json()
            verify(folder, manifest)
    except UserError:
        settings = SETTINGS
    with ShardWriter(folder, settings, 400000, 256) as writer:
        if (folder / "a.txt").exists():
            for _ in FileSource([str(folder / "a.txt")], "text", 0, "bytes", False).blocks(writer.cursor):
                writer.append("train", np.arange(3, dtype=np.uint16))


# --- a run ---------------------------------------------------------------------------------------------


ROW = {"step": 1, "tokens": 256, "loss": 5.5, "grad_norm": 1.5, "learning_rate": 5e-4, "tokens_per_second": None}


def metrics() -> list[Files]:
    rows = [
        ROW,
        {**ROW, "step": 2, "tokens_per_second": 11597.3, "mfu": None},
        {"step": 2, "tokens": 9, "val_loss": 1.5},
    ]
    odd = [{**ROW, "tokens": "x"}, {"step": 1, "loss": 5.5}, {**ROW, "step": [[]]}]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    return [{"metrics.jsonl": b"".join(lines)}] + [
        {"metrics.jsonl": lines[0] + json.dumps(row).encode() + b"\n"} for row in odd
    ]


def read_metrics(folder: Path) -> None:
    from gpt2_jax.metrics import MetricsFile, loss_figure, read_rows

    loss_figure(list(read_rows(folder / "metrics.jsonl")), "run")
    MetricsFile(folder / "metrics.jsonl", 1)


def checkpoint_info() -> list[Files]:
    from gpt2_jax.checkpoint_info import seal

    info = {"data": "90 + 10 tokens, crc32 01234567", "layout": 2, "sha256": ["0" * 64, None]}
    odd = [{**info, key: value} for key, value in [("data", [1]), ("sha256", 5), ("sha256", [5]), ("sha256", {})]]
    sealed = seal(7, 2.5, {**info, "fingerprint": {"state": "0123abcd", "params": "4567abcd"}})
    return with_values("metadata", info, sealed, *odd)


def read_checkpoint_info(folder: Path) -> None:
    from gpt2_jax.checkpoint_info import COMPLETE, INFO, read_info

    (folder / "7" / INFO).parent.mkdir(parents=True, exist_ok=True)
    (folder / "7" / INFO).write_bytes((folder / "metadata").read_bytes())
    (folder / "7" / COMPLETE).touch()
    info = read_info(folder / "7")
    for digest in info.get("sha256", []):
        assert f"{info.get('data')} {(digest or '')[:12]}"


def configs() -> list[Files]:
    from gpt2_jax.config.toml import PRESETS, read_config, to_toml

    texts = [to_toml(read_config("quickstart")), (PRESETS / "gpt2-124m.toml").read_text(encoding="utf-8")]
    sources = "out='x'\nsteps=1_000\nbatch_size=1\n[data]\nval='''v'''\n[[data.sources]]\ntrain='a'\nweight=2\n"
    odd = ["a" + ".a" * 5000 + "=1", "a=" + "[" * 5000, "a=" + "{a=" * 5000, '[ """a"""", ' + "[" * 5000]
    return [{"a.toml": text.encode()} for text in [*texts, sources, *odd]] + [
        {"a.toml": b"\xef\xbb\xbf" + texts[0].encode()}
    ]


def read_configs(folder: Path) -> None:
    from gpt2_jax.config.toml import read_config, read_model_config
    from gpt2_jax.errors import UserError

    with contextlib.suppress(UserError):
        read_config(str(folder / "a.toml"))
    read_model_config(folder / "a.toml")


# --- compiled programs ---------------------------------------------------------------------------------


PROGRAM = bytes(range(256)) * 4


def programs() -> list[Files]:
    from gpt2_jax.compilation_cache import ProgramCache

    with tempfile.TemporaryDirectory() as temporary:
        ProgramCache(Path(temporary), 1 << 20).put("a", PROGRAM)
        return [{path.name: path.read_bytes() for path in Path(temporary).iterdir()}]


def read_program(folder: Path) -> None:
    from gpt2_jax.compilation_cache import ProgramCache

    assert ProgramCache(folder, 1 << 20).get("a") in (None, PROGRAM)


# --- models --------------------------------------------------------------------------------------------


LLMC = struct.pack("<8i", 20240326, 3, 4, 5, 2, 1, 2, 128) + bytes(992)
LLMC_PARAMETERS = (
    (128 + 4) * 2 + 2 * (2 + 2 + 12 + 6 + 4 + 2 + 2 + 2 + 16 + 8 + 16 + 2) + 4
)  # vocabulary, positions, layers
META = pickle.dumps({"itos": dict(enumerate("abcde")), "stoi": {"a": 0}, "vocab_size": 5})


def llmc() -> list[Files]:
    return [{"model_00000001.bin": LLMC + bytes(4 * LLMC_PARAMETERS), "meta.pkl": META}]


@functools.cache
def converted(to: str) -> list[Files]:
    """The model of `llmc` in another format, written by `convert`. nanoGPT has only the exact GELU."""
    from gpt2_jax.convert import convert

    with tempfile.TemporaryDirectory() as temporary:
        (folder := Path(temporary, "source")).mkdir()
        for name, content in (llmc() if to == "huggingface" else converted("huggingface"))[0].items():
            (folder / name).write_bytes(content.replace(b'"gelu_new"', b'"gelu"'))
        out = convert(str(folder), to, Path(temporary, to))
        return [{path.name: path.read_bytes() for path in out.iterdir()}]


def read_model(folder: Path) -> None:
    from gpt2_jax.interop import open_model

    model = open_model(str(folder))
    for _ in model.parameters():
        pass
    if tokenizer := model.tokenizer:
        tokenizer.decode_bytes(tokenizer.encode_ordinary("abc"))


def metas() -> list[Files]:
    return [{"meta.pkl": META}, {"meta.pkl": pickle.dumps({"itos": {0: "a", 1: "b"}}, protocol=0)}]


def read_meta(folder: Path) -> None:
    from gpt2_jax.data.tokenizer import read_characters

    read_characters(folder / "meta.pkl").encode_ordinary("")


TARGETS = {
    "zst": Target(functools.partial(compressed, "zst"), read_documents),
    "gz": Target(functools.partial(compressed, "gz"), read_documents),
    "lines": Target(
        lambda: [{"a.jsonl": LINES}, {"a.txt": LINES}, {"a.json": b"\xef\xbb\xbf" + LINES}], read_documents
    ),
    "tokens": Target(token_files, read_tokens),
    "npy": Target(arrays, read_tokens),
    "manifest": Target(manifests, read_prepared),
    "progress": Target(progress_files, read_prepared),
    "metrics": Target(metrics, read_metrics),
    "info": Target(checkpoint_info, read_checkpoint_info),
    "toml": Target(configs, read_configs),
    "programs": Target(programs, read_program),
    "llmc": Target(llmc, read_model),
    "huggingface": Target(functools.partial(converted, "huggingface"), read_model),
    "nanogpt": Target(functools.partial(converted, "nanogpt"), read_model),
    "meta": Target(metas, read_meta),
}
