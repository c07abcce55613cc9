"""The user's script as a module in worker processes, so that learners can be defined in it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

from torchfedrpc.errors import ConfigError

_NAME = "__mp_main__"  # as multiprocessing calls it, so that guards of other libraries know it


def describe_main(*, by_name: bool = False) -> dict[str, str]:
    """Describe the running script, so that another process can import it.

    Args:
        by_name: Whether the other process may be on another machine, and imports a module of the script's name.

    Raises:
        ConfigError: If the script is no file, as in an interactive session.
    """
    main = sys.modules["__main__"]
    if main.__spec__ is not None:
        return {"module": main.__spec__.name}
    path = getattr(main, "__file__", None)
    if path is None or not Path(path).is_file():
        raise ConfigError(
            "a learner that is defined in an interactive session lives in local mode alone: move its class to a "
            "module for worker processes to import, or set runtime.execution_mode=local"
        )
    return {"module": Path(path).stem} if by_name else {"path": str(Path(path).resolve())}


def adopt_main(description: dict[str, str]) -> None:
    """Import the driver's script. The code under its ``if __name__ == "__main__"`` does not run."""
    package = None
    if name := description.get("module"):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise ImportError(
                f"cannot find {name}, the script that the driver runs: start this worker in the folder that has it, "
                f"or move the learner to a module that is installed on all machines"
            )
        path, package = found.origin, name.rpartition(".")[0]
    else:
        path = description["path"]
    loader = importlib.machinery.SourceFileLoader(_NAME, path)
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    if package is not None:
        module.__package__ = package
    sys.modules["__main__"] = sys.modules[_NAME] = module
    loader.exec_module(module)
