"""torch's settings as plain data: settings that are read can be set again; a failure to set one is logged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from torchfedrpc.host.torch_settings import adopt_settings, glance, read_settings

_backends: Any = torch.backends


@pytest.fixture(autouse=True)
def _settings_as_before() -> Iterator[None]:
    before = read_settings()
    yield
    assert adopt_settings(before) == []
    assert read_settings() == before


def legacy_then_new() -> None:
    torch.set_float32_matmul_precision("medium")
    _backends.cuda.matmul.fp32_precision = "ieee"


def new_everywhere() -> None:
    _backends.fp32_precision = "tf32"
    _backends.mkldnn.rnn.fp32_precision = "bf16"


needs_new = pytest.mark.skipif(not hasattr(_backends, "fp32_precision"), reason="needs the new fp32_precision")
CHANGES: list[Any] = [
    lambda: torch.set_default_dtype(torch.bfloat16),
    lambda: torch._C._set_deterministic_algorithms(True, warn_only=True),  # without an import of torch's compiler
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: setattr(_backends.cuda.matmul, "allow_tf32", True),
    lambda: setattr(_backends.cudnn, "allow_tf32", False),
    lambda: setattr(_backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    lambda: torch.set_flush_denormal(True),
    pytest.param(legacy_then_new, marks=needs_new),
    pytest.param(new_everywhere, marks=needs_new),
]


@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_were_told_are_set_again(change: Callable[[], object]) -> None:
    before = read_settings()
    change()
    told = json.loads(json.dumps(read_settings()))
    assert told != before
    assert adopt_settings(before) == []
    assert read_settings() == before
    assert adopt_settings(told) == []
    found = read_settings()
    readable = {name for name, value in told.items() if value is not None}
    assert {name: found[name] for name in readable} == {name: told[name] for name in readable}


def test_flushed_denormals_are_seen_at_a_glance_also_while_they_are_flushed() -> None:
    before = glance()
    torch.set_flush_denormal(True)
    try:
        assert glance() != before
    finally:
        torch.set_flush_denormal(False)
    assert glance() == before


def test_setting_that_cannot_be_set_is_logged_and_an_unknown_one_is_left() -> None:
    wanted = {"python -O": 2, "torch.backends.quantized.engine": "qnnpacked", "torch.of_another_version": 1}
    problems = adopt_settings(wanted)
    assert [problem.split(" is ")[0] for problem in problems] == ["python -O", "torch.backends.quantized.engine"]
    assert "start this worker's Python with the same -O" in problems[0]
    assert "qnnpacked is not a valid value" in problems[1]
