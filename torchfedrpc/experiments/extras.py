"""Optional packages: checks whether they are installed, and the extra that installs them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from torchfedrpc.errors import ConfigError

INSTALL_COMMAND = "pip install 'torchfedrpc[experiments]'"


def available(module: str) -> bool:
    """Return whether a module can be imported, without importing it; the packages that it is in are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # no such package; sys.modules maps the name to None, or to one without a spec
        return False


def require(module: str, purpose: str, *, extra: str = "experiments") -> None:
    """Check that an optional module is installed.

    Args:
        module: Top-level name of the module.
        purpose: The feature that needs the module, as the start of the error message.
        extra: The extra that installs it.

    Raises:
        ConfigError: If the module is not installed; the message gives the install command.
    """
    if not available(module):
        raise ConfigError(f"{purpose} needs {module}, which is not installed: pip install 'torchfedrpc[{extra}]'")


def missing_line(features: Iterable[tuple[str, str]]) -> str | None:
    """Return one line that names the missing features of a run; None if no feature is missing.

    Args:
        features: Pairs of a feature and the module that it needs.
    """
    absent = [feature for feature, module in features if not available(module)]
    return f"without {' and '.join(absent)}: {INSTALL_COMMAND} brings them" if absent else None
