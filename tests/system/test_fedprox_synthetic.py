"""FedAvg on Synthetic(1, 1) of the FedProx paper reaches what independent implementations reach."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from own_project import shell


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("seed", "accuracy"), [(0, 0.850), (1, 0.827), (2, 0.884)])
def test_synthetic_accuracy_is_that_of_an_independent_loop_in_numpy(
    seed: int, accuracy: float, tmp_path: Path
) -> None:
    settings = ["experiment=fedprox_synthetic", f"seed={seed}", "trace=false", "report=false", "client_scores=false"]
    printed = shell(tmp_path, sys.executable, "-m", "torchfedrpc", *settings, timeout_s=500)
    found = re.search(r"final test accuracy: (\S+)", printed)
    assert found is not None
    assert float(found[1]) == pytest.approx(accuracy, abs=0.03)
