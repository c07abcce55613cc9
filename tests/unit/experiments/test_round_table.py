"""What a run leaves at its end: a table and a picture."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs

from torchfedrpc.experiments.history import RoundRecord
from torchfedrpc.experiments.round_table import print_table


def _record(round_num: int, num_bytes: int = 1_000_000, /, **more: float) -> RoundRecord:
    return RoundRecord(round_num, 0.01 * round_num, 1.0, 2.0, 10, 0.5, num_bytes, 2 * num_bytes, more)


def _table(records: list[RoundRecord]) -> str:
    stream = io.StringIO()
    print_table(records, stream)
    return stream.getvalue()


@pytest.fixture(params=["rich", "plain"])
def _drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "rich":
        needs("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)


@pytest.mark.usefixtures("_drawn")
class TestTable:
    """With rich and without."""

    def test_the_last_round_is_shown_with_the_sums_so_far(self) -> None:
        last = [line for line in _table([_record(number) for number in range(20)]).splitlines() if "0.190" in line]
        assert len(last) == 1
        for cell in ("20", "1.000", "2.000", "10.0", "40.0"):
            assert cell in last[0]

    @pytest.mark.parametrize("num_rounds", [1, 7, 10, 11, 99, 1000])
    def test_the_table_has_ten_rows_at_most(self, num_rounds: int) -> None:
        rows = _table([_record(number) for number in range(num_rounds)]).count("2.000")
        assert min(num_rounds, 5) <= rows <= 10

    def test_traffic_is_left_out_where_there_was_none(self) -> None:
        assert "MB" in _table([_record(0)])
        assert "MB" not in _table([_record(0, 0)])

    def test_clients_that_drop_out_their_accuracies_and_epsilon_have_columns_where_a_run_has_them(self) -> None:
        evaluated = {"client_accuracy": 0.751, "client_accuracy_worst_decile": 0.531}
        text = _table([_record(0, **evaluated, num_dropped=4.0), _record(1, num_dropped=3.0, staleness=0.123)])
        for word in ("client", "worst", "dropped"):
            assert word in text
        (last,) = [line for line in text.splitlines() if "0.010" in line]
        for cell in ("0.751", "0.531", " 3 "):  # the accuracies are those of the round before
            assert cell in last
        assert "epsilon" not in text
        assert "0.123" not in text
        assert "3.142" in _table([_record(0, epsilon=3.14159)])
        assert "worst" not in _table([_record(0)])

    @pytest.mark.parametrize("other", ["epsilon", "num_dropped"])  # epsilon covers no rounds with dropouts
    def test_the_table_fits_100_columns(self, other: str) -> None:
        metrics = {"client_accuracy": 0.75, "client_accuracy_worst_decile": 0.5, other: 12.5}
        text = _table([_record(number, 1_000_000_000, **metrics) for number in range(10)])
        assert max(map(len, text.splitlines())) <= 100

    def test_a_run_of_no_rounds_has_a_table(self) -> None:
        assert "rounds" in _table([])

    def test_measure_that_is_missing_is_a_dash(self) -> None:
        assert "-" in _table([RoundRecord(0, None, None, None, None, 0.5, 0, 0)])


def test_the_plain_table_is_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert _table([_record(9, 0)]) == (
        "rounds  test accuracy  test loss  train loss  clients  seconds\n"
        "    10          0.090      1.000       2.000       10      0.5\n"
    )
    assert _table([_record(9, num_dropped=2.0)]) == (
        "            test   test  train                                \n"
        "rounds  accuracy   loss   loss  clients  dropped  seconds   MB\n"
        "    10     0.090  1.000  2.000       10        2      0.5  3.0\n"
    )


DRAW = """
from pathlib import Path
from torchfedrpc.experiments.history import RoundRecord
from torchfedrpc.experiments.metrics_plot import draw_metrics

measured = [RoundRecord(number, 0.1 * number, 1.0, 2.0, 10, 0.5, 0, 0) for number in range(5)]
draw_metrics(measured, Path("full.png"), baseline_accuracy=[0.9] * 5, baseline_loss=[0.1] * 5)
draw_metrics(measured[:1], Path("one.png"))
draw_metrics([RoundRecord(0, None, None, None, None, 0.5, 0, 0)], Path("unmeasured.png"))
draw_metrics([], Path("empty.png"))
"""


def test_a_picture_is_drawn_of_whatever_was_measured(tmp_path: Path) -> None:
    needs("matplotlib")
    # In a process of its own, because matplotlib keeps its fonts open.
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning"]  # which matplotlib 3.9 gets from newer libraries
    subprocess.run([sys.executable, *warnings, "-c", DRAW], cwd=tmp_path, check=True, timeout=60)
    for name in ("full", "one", "unmeasured", "empty"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
