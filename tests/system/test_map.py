"""CONTRIBUTING.md: the map has every file of the package, and each file, class and function that is named exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import torchfedrpc as tfr

PACKAGE = Path(tfr.__file__).parent
ROOT = PACKAGE.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

_FOLDER = re.compile(r"^### `torchfedrpc/(?P<folder>[a-z/]*)`$")
_ROW = re.compile(r"^\| `(?P<file>\w+\.py)` \| (?P<content>.+) \|$")
_FILE = re.compile(r"`(?P<path>[\w/]+\.py)(?::(?P<name>[\w.]+))?`")
_METHOD = re.compile(r"`(?P<kind>_?[A-Z]\w+[a-z])\.(?P<method>\w+)`")
_TOP_FOLDERS = ("tests", "scripts", "examples", "conf")


def mapped() -> dict[str, str]:
    """Return the files of the map, below the package, and what it says of each."""
    folder, contents = "", {}
    for line in TEXT[TEXT.index("## Map") : TEXT.index("## Rules")].splitlines():
        if (heading := _FOLDER.match(line)) is not None:
            folder = heading["folder"]
        elif (row := _ROW.match(line)) is not None:
            contents[f"{folder}{row['file']}"] = row["content"]
    return contents


@cache
def names_in(path: Path) -> frozenset[str]:
    """Return the classes, functions and constants of a module, and the members of its classes as ``Class.member``."""
    names: set[str] = set()

    def note(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                note(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    note(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(names)


def test_the_map_has_every_file_of_the_package_and_no_other() -> None:
    files = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    # The heading of a folder stands for its __init__.py.
    expected = {path.as_posix() for path in files if path.name != "__init__.py" or len(path.parts) == 1}
    assert set(mapped()) == expected


def test_files_and_names_of_the_text_exist() -> None:
    ways = TEXT[: TEXT.index("## Map")]
    missing = []
    for found in _FILE.finditer(ways):
        path, name = found["path"], found["name"]
        file = (ROOT if path.split("/")[0] in _TOP_FOLDERS else PACKAGE) / path
        if not file.is_file() or (name is not None and name not in names_in(file)):
            missing.append(found[0])
    known = {name for path in PACKAGE.rglob("*.py") for name in names_in(path)}
    missing += [found[0] for found in _METHOD.finditer(ways) if f"{found['kind']}.{found['method']}" not in known]
    assert not missing
