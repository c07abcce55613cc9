"""Code blocks of the documentation: found in the pages, and run as a reader would.

A block of ``python`` is a script, a block of ``sh`` goes to bash; the blocks of a page run in their order, in one
folder. A comment of HTML above a block, which no reader sees, says otherwise:

    <!-- snippet: file NAME -->           written to a file; of any language
    <!-- snippet: within NAME -->         python, in place of the line "# SNIPPET" of tests/support/snippets/NAME.py
    <!-- snippet: tested by TEST -->      not run here, but by a test: tests/system/test_x.py::test_y
    <!-- snippet: not run: REASON -->     not run at all
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from folders import ROOT, SUPPORT
from processes import environment

_LANGUAGES = ("python", "sh")
_DIRECTIVE = re.compile(r"<!-- snippet: (?P<verb>file|within|tested by|not run:) (?P<what>.+?) -->\s*")
_FENCE = re.compile(r"(?P<indent> *)```(?P<language>[a-z]*)(?P<options>.*)")
_HOLE = re.compile(r"^(?P<indent> *)# SNIPPET\n", re.MULTILINE)
_TIMEOUT_S = 240


@dataclass(frozen=True)
class Snippet:
    """Code block of a page.

    Attributes:
        page: The page.
        line: Number of its first line in the page, from 1.
        language: Language of the block, or empty.
        code: Its text.
        verb: Verb of the directive above it; empty without one.
        what: Object of the directive.
    """

    page: Path
    line: int
    language: str
    code: str
    verb: str = ""
    what: str = ""

    @property
    def place(self) -> str:
        """Where the block is, for messages."""
        return f"{self.page.name}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether the block is run by `run_page`."""
        return self.language in _LANGUAGES and self.verb in ("", "within")


def pages() -> list[Path]:
    """Return all pages of the documentation."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def snippets(page: Path) -> list[Snippet]:
    """Return the code blocks of a page, in their order.

    Raises:
        ValueError: If a directive is malformed, or a block has no end.
    """
    found: list[Snippet] = []
    block: tuple[int, str, str, list[str]] | None = None  # first line, language, indent, lines
    directive = ("", "")
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if block is not None:
            first, language, indent, lines = block
            if line.strip() == "```":
                code = textwrap.dedent("\n".join(lines)) + "\n"
                found.append(Snippet(page, first, language, code, *directive))
                block, directive = None, ("", "")
            else:
                lines.append(line.removeprefix(indent))
        elif (fence := _FENCE.fullmatch(line)) is not None:
            block = (number + 1, fence["language"], fence["indent"], [])
        elif "<!-- snippet" in line:
            if (given := _DIRECTIVE.fullmatch(line.strip())) is None:
                raise ValueError(f"{page.name}:{number}: no directive of a snippet: {line}")
            directive = (given["verb"], given["what"])
        elif line.strip():
            directive = ("", "")
    if block is not None:
        raise ValueError(f"{page.name}:{block[0]}: the block has no end")
    return found


def run_page(page: Path, folder: Path) -> None:
    """Run the blocks of a page in a folder, one after another.

    Raises:
        AssertionError: If a block fails; it shows the block and what it printed.
    """
    for snippet in snippets(page):
        if snippet.verb == "file":
            path = folder / snippet.what
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(snippet.code, encoding="utf-8")
        elif snippet.runs:
            run(snippet, folder)


def run(snippet: Snippet, folder: Path) -> None:
    """Run a block in a folder."""
    if snippet.language == "python":
        code = snippet.code
        if snippet.verb == "within":
            frame = (SUPPORT / "snippets" / f"{snippet.what}.py").read_text(encoding="utf-8")
            code = _HOLE.sub(lambda hole: textwrap.indent(snippet.code, hole["indent"]), frame)
        script = folder / f"snippet_{snippet.line}.py"
        script.write_text(code, encoding="utf-8")
        command = [sys.executable, script.name]
    else:
        command = ["bash", "-euo", "pipefail", "-c", snippet.code]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    variables = {**environment(), "PATH": path, "TMPDIR": str(folder)}
    variables.pop("PYTHONPATH")  # a reader has none
    done = subprocess.run(
        command,
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    shown = f"{snippet.place} ends with status {done.returncode}\n{snippet.code}\n{done.stdout[-4000:]}"
    assert done.returncode == 0, shown
