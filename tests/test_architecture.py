"""The floors of docs/architecture.md: imports go down, nothing imports a command, and there are no cycles."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
COMMANDS = {"train", "prepare", "generate", "convert", "plan", "data.__main__"}


def module_of(path: Path) -> str:
    """The name of a module below `gpt2_jax`, "" for the package itself."""
    return ".".join(path.relative_to(ROOT / "gpt2_jax").with_suffix("").parts).removesuffix("__init__").rstrip(".")


FILES = {module_of(path): path for path in sorted((ROOT / "gpt2_jax").rglob("*.py"))}


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import below a node that runs, in functions too; those for type checkers do not run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from statements(other)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from statements(child)


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    found: set[str] = set()
    for statement in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            assert statement.level == 0, f"{path} has a relative import"
            base = str(statement.module)
            submodules = {alias.name: f"{base}.{alias.name}" for alias in statement.names}
            names = [name if name.removeprefix("gpt2_jax.") in FILES else base for name in submodules.values()]
        found |= {name.partition(".")[2] for name in names if name.split(".")[0] == "gpt2_jax"}
    assert found <= FILES.keys(), path
    return found


IMPORTS = {module: imported(path) for module, path in FILES.items()}


def floors() -> dict[str, int]:
    """The floor of every file and folder at the top of the package, from the table."""
    table: dict[str, int] = {}
    for floor, names in re.findall(r"^\| (\d+) \| ([^|]+) \|", PAGE, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            assert name not in table, f"{name} is on two floors"
            table[name] = int(floor)
    return table


def test_every_top_level_file_and_folder_is_on_a_floor():
    assert floors().keys() == {module.split(".")[0] for module in FILES} - {""}


def test_no_import_goes_up():
    floor = floors()
    for module, targets in IMPORTS.items():
        for target in targets:
            assert target, f"{module} imports gpt2_jax itself"
            own, other = module.split(".")[0], target.split(".")[0]
            assert own in ("", other) or floor[own] > floor[other], f"{module} imports {target}"


def test_nothing_imports_a_command():
    for module, targets in IMPORTS.items():
        assert not targets & COMMANDS, module


@pytest.mark.parametrize(
    ("library", "files"),
    [
        ("orbax", {"checkpoint.py", "orbax_cleanup.py"}),
        ("grain", {"data/pipeline.py"}),
        ("lm_eval", {"evaluation/harness.py", "evaluation/lm_eval.py"}),
    ],
)
def test_only_these_files_import(library, files):
    found = {
        path.relative_to(ROOT / "gpt2_jax").as_posix()
        for path in FILES.values()
        if re.search(rf"^ *(import|from) {library}\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert found == files


def test_there_are_no_import_cycles():
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for target in sorted(IMPORTS[module]):
                visit(target, (*above, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_the_tree_names_every_file():
    (tree,) = re.findall(r"^```text\ngpt2_jax/\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    named: set[str] = set()
    folders: list[str] = []
    for line in filter(None, tree.split("\n")):
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            named.add("".join(folders) + name)
    assert named == {path.relative_to(ROOT / "gpt2_jax").as_posix() for path in FILES.values()}
