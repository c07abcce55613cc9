"""Options of calls: typed keywords on proxy, handle and group, which editors complete and type checkers check."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import torchfedrpc as tfr
from torchfedrpc.options import CALL_OPTIONS, GROUP_OPTIONS, UNCHANGED, CallOptions, OnError, Unchanged

ROOT = Path(tfr.__file__).parent.parent  # type checkers do not follow editable installs
OWNERS = [(tfr.LearnerProxy, GROUP_OPTIONS), (tfr.LearnerHandle, CALL_OPTIONS), (tfr.LearnerGroup, GROUP_OPTIONS)]
TYPES = {
    "timeout_s": float | Unchanged | None,
    "retries": int | Unchanged,
    "on_error": OnError | Unchanged,
    "min_results": int | Unchanged | None,
}
USES = """
import torchfedrpc as tfr

def use(proxy: tfr.LearnerProxy) -> None:
    proxy.options(timeout_s=3, retries=1, on_error="collect", min_results=2)
    proxy.client("a").options(timeout_s=None, retries=2)
    proxy.clients().options(timeout_s=0.5, on_error="raise", min_results=None)
    proxy.options(timeout=3)  # wrong
    proxy.options(retries="2")  # wrong
    proxy.client("a").options(on_error="collect")  # wrong
    proxy.clients().options(on_error="ignore")  # wrong
"""


@pytest.mark.parametrize(("owner", "names"), OWNERS)
def test_options_are_typed_keywords_that_leave_the_others_unchanged(owner: type, names: tuple[str, ...]) -> None:
    method: Any = owner.options  # type: ignore[attr-defined]
    hints = typing.get_type_hints(method)
    keywords = [one for one in inspect.signature(method).parameters.values() if one.kind == one.KEYWORD_ONLY]
    assert tuple(one.name for one in keywords) == names
    assert all(one.default is UNCHANGED for one in keywords)
    assert {name: hints[name] for name in names} == {name: TYPES[name] for name in names}
    assert hints["return"] is owner
    assert hints["unknown"] is typing.Never


@pytest.mark.parametrize(("owner", "names"), OWNERS)
def test_each_option_is_described(owner: Any, names: tuple[str, ...]) -> None:
    text = inspect.getdoc(owner.options) or ""
    for name in names:
        assert re.search(rf"^    {name}: \S", text, re.MULTILINE), name
    assert "timeout_s: seconds" in text


@pytest.mark.slow
def test_a_type_checker_finds_wrong_options_and_no_others(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = tmp_path / "uses.py"
    script.write_text(USES)
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path / 'cache'}", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    wrong = [number for number, line in enumerate(USES.splitlines(), 1) if line.endswith("# wrong")]
    assert [int(number) for number in re.findall(r"uses\.py:(\d+): error", done.stdout)] == wrong, done.stdout


def test_counts_may_be_any_whole_number_and_seconds_have_to_be_finite() -> None:
    counts: dict[str, Any] = {"retries": np.int64(2), "min_results": np.int32(1)}
    assert CallOptions(**counts).retries == 2
    for timeout_s in (10**400, math.inf, math.nan):
        with pytest.raises(tfr.ConfigError, match="must be seconds above 0"):
            CallOptions(timeout_s=timeout_s)
