"""A job: one run of the command, with a file ``job.json`` that tells how it ended."""

from __future__ import annotations

import json
import platform
import random
import re
import socket
import sysconfig
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from torchfedrpc.host.torch_settings import adopt_settings, read_settings
from torchfedrpc.private_files import replaced
from torchfedrpc.version import __version__
from torchfedrpc.wire.exceptions import RemoteTraceback

FILE = "job.json"
"""Name of the file in an output folder.

``status`` is ``running``, ``done``, ``failed``, ``interrupted`` or ``killed``; ``error`` is one line; ``accuracy`` is
the final test accuracy; ``seconds`` is the duration; ``begun`` is the local time of the start; ``machine`` is the
driver's; ``versions`` are those of this package, Python and torch.
"""

TRACEBACK_FILE = "error.txt"

_INSTALLED = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_LIBRARIES = (*_INSTALLED, str(Path(__file__).parents[1]), "<")  # the last one for code without a file


def read_job(folder: Path) -> dict[str, Any]:
    """Return the content of ``job.json``; empty if a folder has none."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_overrides(folder: Path) -> list[str]:
    """Return the settings of a run's command line, ``key=value``, without those of hydra itself."""
    try:
        found = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    return [str(one) for one in found or [] if not is_of_hydra(str(one))]


def is_of_hydra(override: str) -> bool:
    """Return whether a setting of the command line, or its key, is one of hydra itself."""
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


def mark_killed(folder: Path) -> None:
    """Mark jobs in subfolders that are still ``running`` as ``killed``: their processes have ended."""
    for path in folder.glob(f"**/{FILE}"):
        if (found := read_job(path.parent)).get("status") == "running":
            _write(path, {**found, "status": "killed"})


class Job:
    """Writes ``job.json`` at the beginning and at the end of a block. An error of the block is recorded and raised.

    Args:
        folder: The output folder.

    Attributes:
        accuracy: The final test accuracy, to be set in the block.
    """

    def __init__(self, folder: Path) -> None:
        self.accuracy: float | None = None
        self._folder = folder
        self._facts = {
            "begun": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "machine": socket.gethostname(),
            "versions": {
                "torchfedrpc": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
        }

    @contextmanager
    def recorded(self) -> Iterator[Job]:
        """Record what the block does."""
        begin = time.monotonic()
        (self._folder / TRACEBACK_FILE).unlink(missing_ok=True)
        self._note("running", "", 0.0)
        status, line = "failed", ""
        try:
            yield self
            status = "done"
        except Exception as error:
            line = one_line(error)
            with replaced(self._folder / TRACEBACK_FILE) as file:
                file.write("".join(traceback.format_exception(error)).encode(errors="backslashreplace"))
            raise
        except BaseException:  # Ctrl-C and SIGTERM
            status = "interrupted"
            raise
        finally:
            self._note(status, line, time.monotonic() - begin)

    def _note(self, status: str, error: str, seconds: float) -> None:
        content = {"status": status, "error": error, "accuracy": self.accuracy, "seconds": round(seconds, 3)}
        _write(self._folder / FILE, content | self._facts)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with replaced(path) as file:
        file.write(json.dumps(content).encode())


def one_line(error: BaseException) -> str:
    """Return an error and its notes as one line; with its type and place in user code, if not of this library."""
    name = type(error).__name__
    text = " ".join(str(error).split())
    if not type(error).__module__.startswith("torchfedrpc."):
        text = (f"{name}: {text}" if text else name) + _place(error)
    return " ".join([text or name, *(f"({' '.join(note.split())})" for note in getattr(error, "__notes__", []))])


def _place(error: BaseException) -> str:
    """Return the innermost line of user code that an error has passed, on a worker if it comes from there."""
    remote = isinstance(error.__cause__, RemoteTraceback)
    lines = [str(error.__cause__)] if remote else traceback.format_tb(error.__traceback__)
    frames = re.findall(r'File "(.+)", line (\d+)', "".join(lines))
    own = [f"{Path(file).name}:{line}" for file, line in frames if not file.startswith(_LIBRARIES)]
    return f" at {own[-1]}" if own else ""


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Restore torch's global settings and random streams after a job, for the next one in this process.

    Random streams of GPUs are restored if CUDA was in use before the job.
    """
    settings, python, numpy = read_settings(), random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus), torch.enable_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        adopt_settings(settings)
