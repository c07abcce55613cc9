"""Code blocks of the documentation: found in the pages, and run as a reader would.

A block of ``python`` is a script, a block of ``sh`` goes to bash; the blocks of a page run in their order, in one
folder. A comment of HTML above a block, which no reader sees, says otherwise:

    <!-- snippet: file NAME -->           written to a file; of any language
    <!-- snippet: within NAME -->         python, in place of the line "# SNIPPET" of tests/support/snippets/NAME.py
    <!-- snippet: peer NAME -->           python, in the environment that scripts/bench/setup-peers makes for NAME
    <!-- snippet: tested by TEST -->      not run here, but by a test: tests/system/test_x.py::test_y
    <!-- snippet: not run: REASON -->     not run at all
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

from folders import ROOT, SUPPORT
from processes import environment

_LANGUAGES = ("python", "sh")
_DIRECTIVE = re.compile(r"<!-- snippet: (?P<verb>file|within|peer|tested by|not run:) (?P<what>.+?) -->\s*")
_FENCE = re.compile(r"(?P<indent> *)```(?P<language>[a-z]*)(?P<options>.*)")
_HOLE = re.compile(r"^(?P<indent> *)# SNIPPET\n", re.MULTILINE)
_TIMEOUT_S = 240
_PEERS = ROOT / "scripts" / "bench" / ".peers"


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
        return self.language in _LANGUAGES and (self.verb in ("", "within") or self.runs_at_peer)

    @property
    def runs_at_peer(self) -> bool:
        """Whether the block runs in the environment of a peer, which is there."""
        return self.verb == "peer" and self.python.exists()

    @property
    def python(self) -> Path:
        """The interpreter that runs the block."""
        return _PEERS / self.what / "bin" / "python" if self.verb == "peer" else Path(sys.executable)


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


def run_page(page: Path, folder: Path) -> list[str]:
    """Run the blocks of a page in a folder, one after another; returns what each of them printed.

    Raises:
        AssertionError: If a block fails; it shows the block and what it printed.
    """
    printed = []
    for snippet in snippets(page):
        if snippet.verb == "file":
            path = folder / snippet.what
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(snippet.code, encoding="utf-8")
        elif snippet.runs:
            printed.append(run(snippet, folder))
    return printed


def run(snippet: Snippet, folder: Path) -> str:
    """Run a block in a folder; returns what it printed."""
    if snippet.language == "python":
        code = snippet.code
        if snippet.verb == "within":
            frame = (SUPPORT / "snippets" / f"{snippet.what}.py").read_text(encoding="utf-8")
            code = _HOLE.sub(lambda hole: textwrap.indent(snippet.code, hole["indent"]), frame)
        script = folder / f"snippet_{snippet.line}.py"
        script.write_text(code, encoding="utf-8")
        command = [str(snippet.python), script.name]
    else:
        command = ["bash", "-euo", "pipefail", "-c", snippet.code]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    variables = {**environment(), "PATH": path}
    variables.pop("PYTHONPATH")  # a reader has none
    output = folder / f"output_{snippet.line}.txt"  # a pipe would wait for all that the block has started
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary, output.open("wb") as file:  # short, for Ray's sockets
        done = subprocess.run(
            command,
            cwd=folder,
            env={**variables, "TMPDIR": temporary, "RAY_TMPDIR": temporary},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
            check=False,
        )
    printed = output.read_text(encoding="utf-8", errors="replace")
    shown = f"{snippet.place} ends with status {done.returncode}\n{snippet.code}\n{printed[-4000:]}"
    assert done.returncode == 0, shown
    return printed
