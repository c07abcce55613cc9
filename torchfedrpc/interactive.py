"""Interactive sessions: notebooks, IPython, ``python -i`` and ``python -m asyncio``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def is_interactive() -> bool:
    """Return whether ``__main__`` is typed in by a user, or read from stdin or ``-c``, so that no file defines it."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    return hasattr(sys, "ps1") or (main.__spec__ is None and (file is None or not Path(file).is_file()))


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def session_names() -> dict[str, Any]:
    """Return the names that the session has defined.

    ``python -m asyncio`` keeps them apart from its module ``__main__``, by which classes are found.
    """
    main = sys.modules["__main__"]
    names: dict[str, Any] = getattr(vars(main).get("console"), "locals", None) or vars(main)
    return names


def show_names() -> None:
    """Let ``__main__`` have the names of the session, if it is ``python -m asyncio``."""
    main = sys.modules["__main__"]
    if hasattr(sys, "ps1") and (names := session_names()) is not vars(main):

        def look_up(name: str) -> Any:
            try:
                return names[name]
            except KeyError:
                raise AttributeError(f"module '__main__' has no attribute {name!r}") from None

        vars(main)["__getattr__"] = look_up
