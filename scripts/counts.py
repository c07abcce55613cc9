"""Count what a reader of the code has to read: lines and files, Python calls in a call, bases, callbacks.

Calls are counted by `sys.setprofile`: each start or resumption of a function whose file lies in the package. Awaited
calls are counted on the driver's event loop and, by a learner's own method, on the thread that runs it in its worker.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torchfedrpc as tfr

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(tfr.__file__).resolve().parent
NUM_CALLS = 30
NUM_WARM = 5


# Lines.


KINDS = ("files", "total", "code", "docstrings", "comments", "blank")


def lines_of(path: Path) -> Counter[str]:
    """The lines of a Python file or a shell script, by kind; code that ends with a comment is code."""
    lines = path.read_text(encoding="utf-8").splitlines()
    kinds = {number: kind_of(line) for number, line in enumerate(lines, 1)}
    if path.suffix == ".py":
        tree = ast.parse("\n".join(lines))
        kinds |= dict.fromkeys(string_lines(tree), "code")
        kinds |= dict.fromkeys(docstring_lines(tree), "docstrings")
    return Counter(kinds.values()) + Counter(files=1, total=len(kinds))


def kind_of(line: str) -> str:
    """The kind of a line that is not a part of a string."""
    text = line.strip()
    return "blank" if not text else "comments" if text.startswith("#") else "code"


def string_lines(tree: ast.Module) -> Iterator[int]:
    """The numbers of the lines of strings that have several lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


def docstring_lines(tree: ast.Module) -> Iterator[int]:
    """The numbers of the lines of a module's docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            text = node.body[0]
            assert text.end_lineno is not None
            yield from range(text.lineno, text.end_lineno + 1)


def sources(folder: Path) -> Iterator[Path]:
    """The Python files and shell scripts of a folder."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and (path.suffix == ".py" or (not path.suffix and is_script(path))):
            yield path


def is_script(path: Path) -> bool:
    """Whether a file is a script of a shell."""
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def print_lines(depths: dict[str, int]) -> None:
    """Print the lines of some folders and of their folders, down to the depth of each."""
    rows: list[tuple[str, Counter[str]]] = []
    for top, depth in depths.items():
        of_folder: dict[str, Counter[str]] = defaultdict(Counter)
        for path in sources(ROOT / top):
            folder = "/".join((top, *path.relative_to(ROOT / top).parts[:-1][:depth]))
            of_folder[folder] += lines_of(path)
        rows += [(f"{top}, all", sum(of_folder.values(), Counter[str]()))]
        rows += [(f"  {folder}", lines) for folder, lines in sorted(of_folder.items())]
    print(f"{'folder':34}" + "".join(f"{kind:>12}" for kind in KINDS))
    for name, lines in rows:
        print(f"{name:34}" + "".join(f"{lines[kind]:12,}" for kind in KINDS))


# Calls.


class Profile:
    """Counts the calls of the package's functions on the thread that starts it.

    Attributes:
        num_calls: Calls so far, resumptions of coroutines and generators included.
        functions: The functions called so far.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self.functions: set[CodeType] = set()
        self._folder = f"{PACKAGE}/"

    def start(self) -> None:
        """Count from now on."""
        sys.setprofile(self._notice)

    def stop(self) -> None:
        """Count no further."""
        sys.setprofile(None)

    def _notice(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(self._folder):
            self.num_calls += 1
            self.functions.add(frame.f_code)


@dataclass(frozen=True)
class CallPath:
    """The calls of the package's functions that an awaited call passes.

    Attributes:
        num_calls: Calls of each of the awaited calls.
        num_functions: Different functions among them, of all the awaited calls.
        num_files: Files that these are in.
    """

    num_calls: list[int]
    num_functions: int
    num_files: int

    def __str__(self) -> str:
        median, least, most = round(statistics.median(self.num_calls)), min(self.num_calls), max(self.num_calls)
        return f"{median} calls ({least} to {most}) of {self.num_functions} functions in {self.num_files} files"


class CountedLearner:
    """A learner whose method profiles the thread that calls it.

    From the beginning of one call to that of the next, the thread passes the path of one whole call.
    """

    def __init__(self, client_id: str) -> None:
        self._profile = Profile()
        self._counts: list[int] = []
        self._thread = 0

    def train_epoch(self, local_epochs: int = 1) -> dict[str, Any]:
        """Note the calls so far.

        Raises:
            RuntimeError: If another thread runs this call than the one before.
        """
        self._counts.append(self._profile.num_calls)
        if not self._thread:
            self._thread = threading.get_ident()
            self._profile.start()
        elif threading.get_ident() != self._thread:
            raise RuntimeError("calls of one learner run on several threads, so their paths cannot be counted")
        return {"model_weights": {"bias": 1.0}, "num_samples": 1}

    def path(self) -> tuple[list[int], int, int]:
        """Calls from call to call, and the functions and files on the path; counting ends."""
        self._profile.stop()
        between = [later - earlier for earlier, later in zip(self._counts, self._counts[1:], strict=False)]
        functions = self._profile.functions
        return between, len(functions), len({code.co_filename for code in functions})


async def on_loop(awaited: Callable[[], Awaitable[object]]) -> CallPath:
    """The path of an awaited call on the thread of this event loop, what else the loop does meanwhile included."""
    counts, functions = [], set[CodeType]()
    for number in range(NUM_WARM + NUM_CALLS):
        profile = Profile()
        profile.start()
        await awaited()
        profile.stop()
        if number >= NUM_WARM:
            counts.append(profile.num_calls)
            functions |= profile.functions
    return CallPath(counts, len(functions), len({code.co_filename for code in functions}))


async def print_calls() -> None:
    """Print the calls in a call and in a reduce, in pseudo mode with two workers."""
    runtime = {"execution_mode": "pseudo", "num_processes": 2}
    async with tfr.LearnerProxy(CountedLearner, ["client_1", "client_2"], runtime=runtime) as proxy:
        driver = await on_loop(lambda: proxy.train_epoch(client_id="client_1", local_epochs=1))
        counts, num_functions, num_files = await proxy.custom_method("client_1", "path")
        learner = CallPath(counts[NUM_WARM:], num_functions, num_files)
        reduce = await on_loop(lambda: proxy.clients().reduce("train_epoch", tfr.WeightedMean(), local_epochs=1))
    print(f"a warm train_epoch, driver's loop:      {driver}")
    print(f"a warm train_epoch, learner's thread:   {learner}")
    print(f"a reduce of 2 clients, driver's loop:   {reduce}")


# Classes.


@dataclass(frozen=True)
class OwnClass:
    """A class of the package.

    Attributes:
        place: Its file and line.
        node: Its definition.
        bases: The names of its bases.
    """

    place: str
    node: ast.ClassDef
    bases: tuple[str, ...]


def read_classes(trees: dict[Path, ast.Module]) -> dict[str, list[OwnClass]]:
    """The classes by name; the package has few of one name, and then the longest of their chains counts."""
    classes: dict[str, list[OwnClass]] = defaultdict(list)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = tuple(last_name(base) for base in node.bases)
                classes[node.name].append(OwnClass(f"{path.relative_to(ROOT)}:{node.lineno}", node, bases))
    return classes


def last_name(node: ast.expr) -> str:
    """The name of a base, without its module and its parameters."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def chain(name: str, classes: dict[str, list[OwnClass]], seen: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The longest chain of own classes from one to its most distant base."""
    if name in seen:
        return ()
    chains = [chain(base, classes, (*seen, name)) for one in classes.get(name, []) for base in one.bases]
    return (name, *max(chains, key=len, default=())) if name in classes else ()


def print_chains(classes: dict[str, list[OwnClass]]) -> None:
    """Print the longest chains of base classes: of all but errors, and of errors, whose tree is a part of the API."""
    chains = [chain(name, classes) for name in classes]
    errors = [one for one in chains if one[-1] == "TorchFedRpcError"]
    for title, some in (("errors aside", [one for one in chains if one not in errors]), ("errors", errors)):
        longest = max(some, key=len)
        deep = sorted((one for one in some if len(one) > 2), key=len, reverse=True)
        print(f"longest chain of own classes, {title}: {len(longest)} ({' < '.join(longest)}); over 2: {len(deep)}")


def callbacks(trees: dict[Path, ast.Module], classes: dict[str, list[OwnClass]]) -> Iterator[tuple[str, str]]:
    """The parameters of constructors that are annotated as callables: place, and class and parameter."""
    aliases = {"Callable"} | {name for tree in trees.values() for name in callable_aliases(tree)}
    for name, of_name in sorted(classes.items()):
        for one in of_name:
            for parameter in constructor_parameters(one.node):
                if parameter[1] is not None and aliases.intersection(names_in(parameter[1])):
                    yield one.place, f"{name}({parameter[0]})"


def callable_aliases(tree: ast.Module) -> Iterator[str]:
    """The names that a module gives to types of callables."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Subscript) and last_name(value) == "Callable":
            yield target.id


def constructor_parameters(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None]]:
    """The parameters of a class's ``__init__``, or the fields of a dataclass, each with its annotation."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            arguments = item.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                yield argument.arg, argument.annotation
    if any("dataclass" in set(names_in(decorator)) for decorator in node.decorator_list):
        for item in node.body:
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and "ClassVar" not in set(names_in(item.annotation))
                and not is_no_parameter(item.value)
            ):
                yield item.target.id, item.annotation


def is_no_parameter(value: ast.expr | None) -> bool:
    """Whether a dataclass's field is ``field(init=False)``."""
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return any(one.arg == "init" and isinstance(one.value, ast.Constant) and not one.value.value for one in keywords)


def names_in(node: ast.expr) -> Iterable[str]:
    """The names in an expression, those in strings of it too."""
    for one in ast.walk(node):
        if isinstance(one, ast.Name):
            yield one.id
        elif isinstance(one, ast.Attribute):
            yield one.attr
        elif isinstance(one, ast.Constant) and isinstance(one.value, str) and one.value.isidentifier():
            yield one.value


def main() -> None:
    """Print the counts."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    began = time.monotonic()
    print_lines({"torchfedrpc": 2, "tests": 2, "scripts": 2, "examples": 1})
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources(PACKAGE)}
    classes = read_classes(trees)
    print()
    asyncio.run(print_calls())
    print()
    print_chains(classes)
    found = sorted(callbacks(trees, classes))
    print(f"constructor parameters that are callables: {len(found)}")
    for place, parameter in found:
        print(f"  {place}: {parameter}")
    print(f"\nin {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
