"""Takes the pictures of README.md and docs/: the quickstart on a terminal of 80 columns, its losses and its report.

`python docs/pictures.py` trains the quickstart, in a temporary directory, and writes terminal.png, quickstart.png and
report.png beside this file. It needs the extra `test`, Chromium and the font DejaVu Sans Mono.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pyte
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
FONT = "/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf"
COLUMNS, LINES = 80, 200
SHOWN_AT = 5000  # the update whose screen is kept
WINDOW = {"width": 1040, "height": 800}  # pixels
BACKGROUND, TEXT = "#1e1e1e", "#d4d4d4"
COLORS = {"green": "#6fc276", "brown": "#d7ba7d", "red": "#f14c4c", "cyan": "#4ec9b0", "blue": "#569cd6",
          "magenta": "#c586c0", "brightblack": "#808080"}  # fmt: skip


def train(directory: Path) -> pyte.Screen:
    """Trains the quickstart on a terminal, and returns what the terminal shows at the update `SHOWN_AT`."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR", "COLUMNS", "LINES")}
    command = [sys.executable, "-m", "gpt2_jax.train", "--config", "quickstart"]
    process = subprocess.Popen(
        command, cwd=directory, env=environment | {"TERM": "xterm-256color"}, stdin=subprocess.DEVNULL, stdout=writer,
        stderr=writer,
    )  # fmt: skip
    os.close(writer)
    screen, kept = pyte.Screen(COLUMNS, LINES), None
    stream = pyte.ByteStream(screen)
    while True:
        if select.select([reader], [], [], 1.0)[0]:
            try:
                stream.feed(os.read(reader, 1 << 16))
            except OSError:  # the process has closed the terminal
                break
        done = re.search(r" ([\d,]+)/8,?000 ", "\n".join(screen.display))
        if kept is None and done and int(done[1].replace(",", "")) >= SHOWN_AT and "left" in "".join(screen.display):
            kept = pyte.Screen(COLUMNS, LINES)
            for row, cells in screen.buffer.items():
                kept.buffer[row].update(cells)
    if process.wait() or kept is None:
        raise SystemExit("\n".join(line for line in screen.display if line.strip()))
    return kept


def draw(screen: pyte.Screen, path: Path) -> None:
    """Draws the lines of a terminal that are in use."""
    font = ImageFont.truetype(FONT, 15)
    width, height = int(font.getlength("x")), 19
    rows = [row for row, line in enumerate(screen.display) if line.strip()]
    image = Image.new("RGB", (COLUMNS * width + 20, (rows[-1] + 1) * height + 20), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    for row in rows:
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            color = COLORS.get(cell.fg, TEXT if cell.fg == "default" else f"#{cell.fg}")
            canvas.text((10 + column * width, 10 + row * height), cell.data, color, font)
    image.save(path, optimize=True)


def main() -> None:
    """Takes all pictures."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        draw(train(directory), DOCS / "terminal.png")
        shutil.copy(directory / "runs/quickstart/loss.png", DOCS / "quickstart.png")
        page = directory / "report.html"
        report = [sys.executable, "-m", "gpt2_jax.report", "runs/quickstart", "--out", str(page)]
        subprocess.run(report, cwd=directory, check=True)
        with sync_playwright() as library:
            executable = shutil.which("chromium") or shutil.which("google-chrome")
            browser = library.chromium.launch(executable_path=executable, args=["--no-sandbox"])
            tab = browser.new_page(viewport=WINDOW)
            tab.goto(page.as_uri())
            tab.wait_for_timeout(1000)
            tab.screenshot(path=DOCS / "report.png")
            browser.close()


if __name__ == "__main__":
    main()
