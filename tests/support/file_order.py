"""The order of the test files, the longest first: what starts last then ends soon, and no worker of xdist idles.

``tests/seconds.json`` has the seconds of each file; ``scripts/test --write-seconds`` writes it anew.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
from folders import TESTS

_TABLE = TESTS / "seconds.json"
_UNKNOWN_S = 60.0  # of a new file


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-seconds", action="store_true", help=f"write {_TABLE.name}, by which files are ordered")


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    if config.getoption("--write-seconds") and not is_worker:
        config.pluginmanager.register(_Writer())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seconds: dict[str, float] = json.loads(_TABLE.read_text())

    def order(item: pytest.Item) -> tuple[float, str]:
        name = item.path.relative_to(TESTS).as_posix()
        return -seconds.get(name, _UNKNOWN_S), name

    items.sort(key=order)  # which keeps the order inside a file


class _Writer:
    """Adds up what each file takes, and writes the table at the end."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid.partition("::")[0].removeprefix("tests/")] += report.duration  # type: ignore[assignment]

    def pytest_sessionfinish(self) -> None:
        table: dict[str, float] = json.loads(_TABLE.read_text()) if _TABLE.exists() else {}
        table |= {name: round(took_s, 1) for name, took_s in self._seconds.items()}
        there = {name: table[name] for name in sorted(table) if (TESTS / name).exists()}
        _TABLE.write_text(json.dumps(there, indent=1) + "\n")
