"""Options of calls: what holds for them beside their arguments."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, Literal, SupportsIndex

from torchfedrpc.errors import ConfigError, suggest

CALL_OPTIONS = ("timeout_s", "retries")
GROUP_OPTIONS = (*CALL_OPTIONS, "on_error", "min_results")

OnError = Literal["raise", "collect"]


class Unchanged(Enum):
    """The default of each keyword of ``options(...)``: the option stays as it is, since None has a meaning."""

    UNCHANGED = "unchanged"

    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED: Final = Unchanged.UNCHANGED


@dataclass(frozen=True)
class CallOptions:
    """What holds for calls beside their arguments.

    Attributes:
        timeout_s: seconds for queue, wire and run together; None leaves ``runtime.call_timeout_s``, for the run.
        retries: how often a call is sent again where its method was not begun (its constructor failed, say).
        on_error: of groups: ``raise`` a GroupCallError, or ``collect`` the failures beside the results.
        min_results: of groups: be content with so many results, and cancel the other calls.

    Raises:
        ConfigError: a value is out of range.
    """

    timeout_s: float | None = None
    retries: int = 0
    on_error: str = "raise"
    min_results: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "timeout_s": (
                self.timeout_s is None or (_is_number(self.timeout_s) and self.timeout_s > 0),
                "seconds above 0",
            ),
            "retries": (_is_count(self.retries, 0), "an int of at least 0"),
            "on_error": (self.on_error in ("raise", "collect"), "'raise' or 'collect'"),
            "min_results": (self.min_results is None or _is_count(self.min_results, 1), "an int of at least 1"),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise ConfigError(f"options({name}=...) must be {expected}, not {getattr(self, name)!r}")

    def updated(self, changes: Mapping[str, Any], known: tuple[str, ...] = GROUP_OPTIONS) -> CallOptions:
        """These options with some changed.

        Args:
            changes: option -> value; one that is `UNCHANGED` stays as it is.
            known: the options that have a meaning where this is asked.

        Raises:
            ConfigError: no such option there.
        """
        for name in changes:
            if name not in known:
                where = "; it is for groups: proxy.clients(...).options(...)" if name in GROUP_OPTIONS else ""
                raise ConfigError(f"no option {name!r} here{where or suggest(name, known)}")
        return replace(self, **{name: value for name, value in changes.items() if value is not UNCHANGED})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value <= sys.float_info.max


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, SupportsIndex) and not isinstance(value, bool) and value.__index__() >= least
