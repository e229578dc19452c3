"""The pages of the documentation, their fenced blocks, and the commands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
}
# What stands after the fence, and the lines of the block.
FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """The fenced blocks of a page in a language."""
    return [block for found, block in FENCED.findall(PAGES[page]) if found == language]


def prose(page):
    """A page without its fenced blocks."""
    return FENCED.sub("", PAGES[page])


def shell_lines(page):
    """Every line for a shell in the blocks of a page."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]
