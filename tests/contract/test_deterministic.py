"""``deterministic``: torch's deterministic algorithms where learners run, in every mode."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import torchfedrpc as tfr


class Flags:
    """A learner that reads the flags of its process."""

    def __init__(self, client_id: str) -> None:
        pass

    def read(self) -> dict[str, Any]:
        cudnn: Any = torch.backends.cudnn
        return {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
            "cudnn deterministic": cudnn.deterministic,
            "cudnn benchmark": cudnn.benchmark,
            "cuBLAS": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        }


@pytest.mark.timeout(240)  # to use them imports torch's compiler, which takes seconds in each process
@pytest.mark.parametrize("deterministic", [False, True])
async def test_learners_and_driver_use_deterministic_algorithms_while_the_proxy_is_open(
    lone_runtime: dict[str, Any], deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)  # learners have what the driver has
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not deterministic)
    expected = {
        "deterministic": deterministic,
        "warns only": False,
        "cudnn deterministic": deterministic,
        "cudnn benchmark": not deterministic,
        "cuBLAS": ":4096:8" if deterministic else None,
    }
    before = Flags("driver").read()
    async with tfr.LearnerProxy(Flags, ["a"], runtime=lone_runtime | {"deterministic": deterministic}) as proxy:
        assert await proxy.client("a").read() == expected
        assert Flags("driver").read() == expected
    assert Flags("driver").read() == before | {"cuBLAS": expected["cuBLAS"]}  # cuBLAS has read it by now
