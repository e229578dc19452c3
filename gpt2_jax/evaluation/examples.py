"""Finds the examples of a task: in files under the names that their authors gave them, or on the Hugging Face hub."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_jax.errors import UserError, import_optional, one_line
from gpt2_jax.evaluation.task import Example, Task
from gpt2_jax.files import check_hub_cache, check_regular, find_paths, user_path
from gpt2_jax.parsing import parse_json, read_text

MAX_LINE_BYTES = 1 << 22  # A page of WikiText has 0.1 MB. Parsing JSON takes up to 20 times its size.
MAX_TEXT_BYTES = 1 << 27  # enwik8 has 100 MB.


class HubDataset(NamedTuple):
    """A dataset on the Hugging Face hub: the one that lm-eval reads."""

    repository: str
    subset: str | None
    split: str


class RowTask(Task[Example]):
    """A task whose examples are rows: lines of JSON, or rows of a dataset on the hub.

    Attributes:
        hub: the dataset with the same examples.
    """

    hub: HubDataset

    def read(self, path: Path) -> Iterator[Example]:
        """See `Task.read`."""
        for row, where in json_rows(path):
            yield self.from_row(row, where)

    @abc.abstractmethod
    def from_row(self, row: dict[str, Any], where: str) -> Example:
        """Makes an example of a row.

        Raises:
            UserError: a field is missing or has a wrong type.
        """


class Found(NamedTuple):
    """Where the examples of a task are.

    Attributes:
        paths: the files, most often one; none for the hub.
        name: the paths, or the name on the hub.
        standard: True if published figures are over these examples.
        flag: what names the files, for errors.
    """

    paths: tuple[Path, ...]
    name: str
    standard: bool
    flag: str


def locate(task: Task[Any], data: Sequence[str | Path] | None, flag: str = "--data") -> Found:
    """Finds where the examples of a task are.

    Args:
        data: files and directories; None for the hub. A directory is searched for the names in `task.files`. A single
            file serves every task; of several, those with these names serve. A task without names reads all files.
        flag: the flag or key that `data` comes from, for errors.

    Raises:
        UserError: there is no such file, or the task has no dataset on the hub.
    """
    hub = task.hub if isinstance(task, RowTask) else None
    if data is None:
        if hub is None:
            wanted = f"DIR, with {_one_of(task.files)} in DIR" if task.files else "FILE ..., text or token files"
            raise UserError(f"{task.name} has no dataset on the hub; type {flag} {wanted}")
        return Found((), _hub_name(hub), True, flag)
    if not task.files:
        files = tuple(dict.fromkeys(file for pattern in data for file in _match(str(pattern), flag)))
        return Found(files, ", ".join(map(str, files[:3])) + ", …" * (len(files) > 3), False, flag)
    paths = [user_path(str(path), flag) for path in data]
    for path in paths:
        check_regular(path)
        if path.is_dir():
            for name in (*task.files, *task.other_files):
                if (path / name).is_file():
                    return Found((path / name,), str(path / name), name in task.files, flag)
        elif path.exists():
            basenames = {Path(name).name for name in task.files}
            known = basenames | {Path(name).name for name in task.other_files}
            if len(paths) == 1 or path.name in known:
                return Found((path,), str(path), path.name in basenames, flag)
        else:
            raise UserError(f"{flag} {path} does not exist; type a directory with {_one_of(task.files)}, or a file")
    where, names = ", ".join(map(str, paths)), _one_of((*task.files, *task.other_files))
    advice = f"download them to DIR/{names} and type {flag} DIR"
    if hub:
        advice += f"; or leave {flag} out and type pip install 'gpt2_jax[eval]' to read {_hub_name(hub)} from the hub"
    raise UserError(f"{where} has no examples of {task.name}: {advice}")


def load_examples(task: Task[Example], found: Found, limit: int | None = None) -> list[Example]:
    """Reads the first `limit` examples of a task, or all.

    Raises:
        UserError: they cannot be read, or there are none.
    """
    stop = None if task.limits_windows else limit
    rows: Iterator[Example]
    if found.paths:
        rows = itertools.chain.from_iterable(map(task.read, found.paths))
    else:
        assert isinstance(task, RowTask)
        rows = _from_hub(task, found.flag)
    try:
        examples = list(itertools.islice(rows, stop))
    except OSError as error:
        raise UserError(f"{found.name} cannot be read: {error.strerror}; copy it again") from error
    if not examples:
        raise UserError(f"{found.name} has no examples of {task.name}; copy it again")
    return examples


def text_lines(path: Path, expected: str) -> Iterator[tuple[str, str]]:
    """Yields the lines of a file without their ends, each with its place, "FILE, line 3".

    Args:
        expected: what a line is, for the error: "a sentence".

    Raises:
        UserError: a line is too long, or not UTF-8.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        for number in itertools.count(1):
            where, line = f"{path}, line {number}", file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{where} has more than {MAX_LINE_BYTES:,} bytes; expected {expected}")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n"), where
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 text (byte {error.start}); copy the file again") from error


def json_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the objects in a file of JSON lines, each with its place, "FILE, line 3". Blank lines are left out.

    Raises:
        UserError: a line is too long, not UTF-8, not JSON or not an object.
        OSError: the file cannot be read.
    """
    for text, where in text_lines(path, "a JSON object of a few thousand"):
        if not text.strip():
            continue
        try:
            row = parse_json(text)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({one_line(error, 100)}); copy the file again") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} has {one_line(ValueError(repr(row)[:60]))}; expected a JSON object")
        yield row, where


def is_json_lines(path: Path) -> bool:
    """True for a file whose first character is that of a JSON object. No public text file here begins with it."""
    with open(path, "rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """A field with a text.

    Raises:
        UserError: it is missing or has another type.
    """
    value = row.get(name)
    if isinstance(value, str):
        return value
    raise UserError(f"{where}: {name} is {_shown(row, name)}; expected a text")


def text_list(row: dict[str, Any], name: str, count: int, where: str) -> tuple[str, ...]:
    """A field with a list of `count` texts.

    Raises:
        UserError: it is missing or something else.
    """
    value = row.get(name)
    if isinstance(value, list) and len(value) == count and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise UserError(f"{where}: {name} is {_shown(row, name)}; expected a list of {count} texts")


def label_field(row: dict[str, Any], name: str, count: int, where: str) -> int:
    """A field with an index below `count`, as a number or, as on the hub, as a text.

    Raises:
        UserError: it is missing, something else, or out of range.
    """
    value = row.get(name)
    if isinstance(value, str) and len(value) < 3 and value.isascii() and value.isdigit():
        value = int(value)
    if type(value) is int and 0 <= value < count:
        return value
    raise UserError(f"{where}: {name} is {_shown(row, name)}; expected a number from 0 to {count - 1}")


def whole_text(path: Path) -> str:
    """The text of a file, with line feeds between lines whatever the file has.

    Raises:
        UserError: it cannot be read, is too large, not UTF-8 or empty.
    """
    try:
        text = read_text(path, MAX_TEXT_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; copy it again") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}; expected a text file, copy it again") from error
    if not text.strip():
        raise UserError(f"{path} is empty; copy it again")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _match(pattern: str, flag: str) -> list[Path]:
    files = find_paths(pattern, flag)
    if not files:
        raise UserError(f"{flag} {pattern!r} matches no file; give text files, or the .bin or .npy of tokens")
    for path in files:
        check_regular(path)
        if path.is_dir():
            raise UserError(f"{flag} {path} is a directory; type its files: {path}/*.bin")
    return files


def _from_hub(task: RowTask[Example], flag: str) -> Iterator[Example]:
    hub = task.hub
    load_dataset = _datasets(task, flag).load_dataset
    check_hub_cache(hub.repository)
    try:
        for number, row in enumerate(load_dataset(hub.repository, hub.subset, split=hub.split, streaming=True), 1):
            yield task.from_row(row, f"{_hub_name(hub)}, row {number}")
    except UserError:  # of a row
        raise
    except Exception as error:  # of the HTTP stack: `datasets` does not document its type
        raise UserError(
            f"{_hub_name(hub)} cannot be read from the hub ({type(error).__name__}: {one_line(error)}); without "
            f"network, download {_one_of(task.files)} to DIR elsewhere and type {flag} DIR"
        ) from error


def _datasets(task: RowTask[Any], flag: str) -> Any:
    hub = task.hub
    try:
        return import_optional("datasets", f"reading {_hub_name(hub)}")
    except UserError as error:
        raise UserError(
            f"{task.name} needs its examples: type {flag} DIR, with {_one_of(task.files)} in DIR; or type "
            f"pip install 'gpt2_jax[eval]' to read {_hub_name(hub)} from the hub"
        ) from error


def _hub_name(hub: HubDataset) -> str:
    return ", ".join(part for part in hub if part)


def _one_of(names: Sequence[str]) -> str:
    return " or ".join(names)


def _shown(row: dict[str, Any], name: str) -> str:
    return one_line(ValueError(f"{row[name]!r:.60}")) if name in row else "missing"
