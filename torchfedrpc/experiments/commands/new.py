"""``torchfedrpc new``: writes a small project with a learner, a trainer, an experiment and tests."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from torchfedrpc.errors import ConfigError
from torchfedrpc.run import cancel_end_report

_TEMPLATE = "new-project"
_NO_MODULE = ".txt"  # suffix of files that are Python modules in a project, and none here


def main(arguments: Sequence[str]) -> int:
    """Write a project.

    Returns:
        The exit status.

    Raises:
        ConfigError: If the folder is not empty, or cannot be written.
    """
    cancel_end_report()
    parser = argparse.ArgumentParser(
        "torchfedrpc new", description="Write a small project: a learner, a trainer, an experiment and tests."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder")
    folder: Path = parser.parse_args(arguments).folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder: give another name, nothing is overwritten")
    try:
        for name, text in _files(files(__package__) / _TEMPLATE):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}") from error
    lines = f"cd {folder}", "torchfedrpc --config-dir conf experiment=quick", "python -m pytest"
    print("\n  ".join([f"wrote {folder}; run it with:", *lines]))
    return 0


def _files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and text of each file of the template."""
    for entry in folder.iterdir():
        name = f"{prefix}{entry.name}"
        if entry.is_dir():
            yield from _files(entry, f"{name}/")
        else:
            yield name.removesuffix(_NO_MODULE), entry.read_text(encoding="utf-8")
