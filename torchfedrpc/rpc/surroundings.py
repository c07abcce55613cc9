"""What a worker process takes over from its driver: flags, folder, environment, rights, and the user's script."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import linecache
import logging
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchfedrpc.errors import ConfigError
from torchfedrpc.interactive import is_interactive

logger = logging.getLogger(__name__)

FORKS = hasattr(os, "memfd_create")  # on Linux; elsewhere system libraries do not work after a fork
_MAIN = "__mp_main__"  # as multiprocessing calls it, so that guards of other libraries know it
_OF_SESSION = (
    "classes that are defined in an interactive session reach only the worker processes that the session itself "
    "starts (pseudo mode), and no worker that listens or joins, nor a rank of a launch: move them to a module that "
    "the workers can import, or use local or pseudo mode"
)
_HASH_SEED = "PYTHONHASHSEED"
_FIXED_HASHES = "1"  # with 0, Python's flags differ from those of the driver
# Variables that no import reads. The first changes all the time, the second is set for `deterministic` runs, and
# torch sets the third at the first step of an optimiser.
_READ_LATE = {"PYTEST_CURRENT_TEST", "CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_CACHE_DIR"}


@dataclass(frozen=True)
class Preload:
    """A call that a process makes before it forks workers.

    Attributes:
        function: ``module:name``. The function must not start threads, keep files open, or use a GPU. It returns
            whether it has loaded anything; it need not where an earlier call has.
        kwargs: Its arguments, as plain data that JSON can carry.
        group: Calls of one group may follow each other in one process.
    """

    function: str
    kwargs: dict[str, Any]
    group: str

    def to_message(self) -> dict[str, Any]:
        """Return the call as plain data."""
        return {"function": self.function, **self.kwargs}


_preload: Preload | None = None


@contextmanager
def preloading(preload: Preload) -> Iterator[None]:
    """Have worker processes of this machine forked from one that has made a call, while the block lasts.

    Each worker then has what the call has imported and loaded, in memory that is its own once it changes it. The
    process is kept for later runs. Workers that start in another way, or for which the call fails, begin without.
    """
    global _preload
    before, _preload = _preload, preload
    try:
        yield
    finally:
        _preload = before


@dataclass(frozen=True)
class Surroundings:
    """State that a worker process takes over from the process that starts it.

    Attributes:
        flags: Command line flags of the interpreter.
        path: ``sys.path``.
        arguments: ``sys.argv``.
        folder: Working directory; None if that of the starting process was deleted.
        variables: Environment variables.
        rights: User and groups, resource limits, CPUs and priority.
        preload: See `preloading`; None for none.
    """

    flags: list[str]
    path: list[str]
    arguments: list[str]
    folder: str | None
    variables: dict[str, str]
    rights: tuple[Any, ...] = ()
    preload: Preload | None = None

    @classmethod
    def of_this_process(cls, *, fixed_hashes: bool = False) -> Surroundings:
        """Return the surroundings of this process as it is now.

        Args:
            fixed_hashes: Whether string hashes of Python are the same in all processes if the environment does not
                set PYTHONHASHSEED; otherwise they are random.
        """
        variables = dict(os.environ)
        if fixed_hashes and variables.get(_HASH_SEED, "random") in ("", "random"):
            variables[_HASH_SEED] = _FIXED_HASHES
            if sys.flags.ignore_environment:
                logger.warning(
                    "python -E and -I hide %s from workers: the order of a set of strings will differ between them",
                    _HASH_SEED,
                )
        try:
            folder = os.getcwd()
        except FileNotFoundError:
            folder = None
        return cls(interpreter_flags(), list(sys.path), list(sys.argv), folder, variables, _rights(), _preload)

    def needs_same_server(self, other: Surroundings) -> bool:
        """Return whether one server can fork processes of both: the state that it read at its start is equal."""
        return self._server_key() == other._server_key()

    def _server_key(self) -> tuple[Any, ...]:
        variables = {name: value for name, value in self.variables.items() if name not in _READ_LATE}
        return self.flags, variables, self.folder is None, self.rights

    def to_message(self) -> dict[str, Any]:
        """Return the state that a forked process sets itself, as plain data."""
        return {
            "path": self.path,
            "arguments": self.arguments,
            "folder": self.folder,
            "variables": {name: self.variables.get(name) for name in _READ_LATE},
            "interactive": is_interactive(),
        }

    def template_key(self) -> tuple[Any, ...]:
        """Return a value that is equal for surroundings whose workers one template can fork."""
        what = None if self.preload is None else (self.preload.function, self.preload.group)
        return what, tuple(self.path), tuple(self.arguments), self.folder


def interpreter_flags() -> list[str]:
    """Return the command line flags of this interpreter for another one: ``-O``, ``-W``, ``-X`` and so on."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing
    for name, value in sys._xoptions.items():  # it leaves some out
        option = name if value is True else f"{name}={value}"
        if option not in flags:
            flags += ["-X", option]
    return flags


def describe_main(*, by_name: bool = False) -> dict[str, str]:
    """Describe the running script, so that another process can import it.

    Args:
        by_name: Whether the other process may be on another machine, and imports a module of the script's name.

    Raises:
        ConfigError: If the script is no file, as in an interactive session.
    """
    main = sys.modules["__main__"]
    if is_interactive():
        raise ConfigError(_OF_SESSION)
    if main.__spec__ is not None:
        return {"module": main.__spec__.name}
    path = Path(str(main.__file__))
    return {"module": path.stem} if by_name else {"path": str(path.resolve())}


def pack_main(learner: object) -> bytes | None:
    """Pickle the classes of an interactive session as they are now; return None if the driver runs a script.

    Args:
        learner: The learner's class or factory, which has to be among them if the session defines it.

    Raises:
        ConfigError: If cloudpickle is missing, or the learner uses something that cannot be pickled.
    """
    if not is_interactive():
        return None
    try:
        from torchfedrpc.rpc.cells import pack_session  # noqa: PLC0415 - cloudpickle is optional
    except ImportError:
        raise ConfigError(
            "classes that are defined in an interactive session reach worker processes by cloudpickle, which is not "
            "installed: pip install 'torchfedrpc[notebook]', or move them to a module, or set "
            "runtime.execution_mode=local"
        ) from None
    return pack_session(learner)


class Session:
    """The classes of the driver's interactive session, as a worker receives them.

    Unpickling runs code of the sender's choice, so a worker accepts it from the process that started it alone.

    Args:
        is_own: Whether the driver started this process.
    """

    def __init__(self, *, is_own: bool) -> None:
        self._is_own = is_own
        self._data = bytearray()

    def take(self, data: bytes) -> None:
        """Take a part of the pickle.

        Raises:
            ConfigError: If the driver did not start this process.
        """
        if not self._is_own:
            raise ConfigError(_OF_SESSION)
        self._data += data

    def adopt(self) -> None:
        """Replace the module ``__main__`` by one with the names that were received, if there were any."""
        data, self._data = self._data, bytearray()
        if data:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            sources, names = pickle.loads(data)
            vars(main).update(names)
            for file, lines in sources.items():  # for tracebacks, and for inspect.getsource
                linecache.cache[file] = (sum(map(len, lines)), None, lines, file)


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
    loader = importlib.machinery.SourceFileLoader(_MAIN, path)
    spec = importlib.util.spec_from_file_location(_MAIN, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    if package is not None:
        module.__package__ = package
    sys.modules["__main__"] = sys.modules[_MAIN] = module
    loader.exec_module(module)


def _rights() -> tuple[Any, ...]:
    if not FORKS:  # each worker is started by this process, and inherits them
        return ()
    import resource  # noqa: PLC0415 - Windows has none

    limits = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return os.getresuid(), os.getresgid(), os.getgroups(), limits, affinity, os.getpriority(os.PRIO_PROCESS, 0)
