"""Optional packages: whether they are installed, and which extra brings them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from torchfedrpc.errors import ConfigError

INSTALL_COMMAND = "pip install 'torchfedrpc[experiments]'"


def available(module: str) -> bool:
    """Whether a top-level module can be imported, found out without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules holds None in its place, or a module without a spec
        return False


def require(module: str, purpose: str) -> None:
    """Insist on an optional module.

    Args:
        module: its top-level name.
        purpose: what needs it, as the start of the error's sentence.

    Raises:
        ConfigError: it is not installed; the message gives the command that installs it.
    """
    if not available(module):
        raise ConfigError(f"{purpose} needs {module}, which is not installed: {INSTALL_COMMAND}")


def missing_line(features: Iterable[tuple[str, str]]) -> str | None:
    """One line on what a run goes without, or None where nothing is missing.

    Args:
        features: pairs of a feature and the module that it needs.
    """
    absent = [feature for feature, module in features if not available(module)]
    return f"without {' and '.join(absent)}: {INSTALL_COMMAND} brings them" if absent else None
