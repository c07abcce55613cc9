"""Pictures of the documentation, by a headless Chromium: see scripts/screenshots."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from browser import Browser, opened
from PIL import Image
from run_notebook import NOTEBOOK, page_of

from torchfedrpc.experiments.report.page import write_report

DOCS = Path(__file__).resolve().parent.parent / "docs"
MAX_BYTES = 300_000
_NUM_COLORS = 128


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser("scripts/screenshots", description="Make the pictures in docs anew.")
    parser.add_argument("--run", type=Path, help="output folder of a run (default: the experiment is run)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = given.run or run_experiment(Path(folder) / "digits")
        for name in ("metrics.png", "partition.png"):
            shutil.copyfile(run / name, DOCS / name)
        page = write_report(run)
        notebook = Path(folder) / "notebook.html"
        notebook.write_text(page_of(nbformat.read(NOTEBOOK, as_version=4)), encoding="utf-8")
        with opened(width=1200, height=1000) as browser:
            browser.show(page, scheme="light")
            picture(browser, DOCS / "report-light.png")
            browser.show(page, scheme="dark")
            browser.run("document.querySelector('#partition').scrollIntoView()")
            picture(browser, DOCS / "report-dark.png")
            browser.show(notebook)
            browser.run("document.querySelector('progress').closest('div').scrollIntoView({block: 'center'})")
            picture(browser, DOCS / "notebook.png")


def run_experiment(folder: Path) -> Path:
    """Run the default experiment on two workers, with a picture of the terminal; return its output folder."""
    settings = ["runtime=pseudo", "runtime.num_processes=2", f"hydra.run.dir={folder}", "imports=[terminal_picture]"]
    settings.append(
        "+callbacks.picture={_target_: terminal_picture.TerminalPicture, path: " + f"{DOCS / 'terminal.png'}" + "}"
    )
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-m", "torchfedrpc", *settings], env=variables, check=True)
    save(Image.open(DOCS / "terminal.png"), DOCS / "terminal.png")
    return folder


def picture(browser: Browser, path: Path) -> None:
    """Save what the browser shows."""
    save(Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())), path)


def save(shown: Image.Image, path: Path) -> None:
    """Save a picture with few colours, as a page or a terminal has not many."""
    shown.convert("RGB").quantize(_NUM_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < MAX_BYTES, f"{path} has {path.stat().st_size} bytes"


if __name__ == "__main__":
    main()
