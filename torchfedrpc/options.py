"""Options of calls, beside their arguments."""

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
    """Sentinel default of each keyword of ``options(...)``: the option keeps its value. None has a meaning."""

    UNCHANGED = "unchanged"

    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED: Final = Unchanged.UNCHANGED


@dataclass(frozen=True)
class CallOptions:
    """Options of calls, beside their arguments.

    Attributes:
        timeout_s: Seconds for queue, transfer and run of a call together. None: No such deadline;
            ``runtime.call_timeout_s`` limits the run.
        retries: Number of times a call is sent again if its method has not begun, for example because the learner's
            constructor failed.
        on_error: For groups: ``raise`` raises a GroupCallError, ``collect`` returns the failures beside the results.
        min_results: For groups: Return after this number of results and cancel the other calls. None: Wait for all
            clients.

    Raises:
        ConfigError: If a value has the wrong type or is out of range.
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

    @property
    def may_end_early(self) -> bool:
        """Whether a group call may end before all of its calls have: it has a deadline or a quorum."""
        return self.timeout_s is not None or self.min_results is not None

    def updated(self, changes: Mapping[str, Any], known: tuple[str, ...] = GROUP_OPTIONS) -> CallOptions:
        """Return these options with some changed.

        Args:
            changes: Option -> value. An option with the value `UNCHANGED` keeps its value.
            known: The options that the caller supports.

        Raises:
            ConfigError: If an option is not among ``known``, or a value has the wrong type or is out of range.
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
