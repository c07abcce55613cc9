"""Callbacks that watch a metric: early stopping, and the best model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.events import RoundEnded


def run_of(trainer: Any = None, output_dir: Path | None = None) -> tfr.Run:
    return tfr.Run({}, SimpleNamespace(), trainer, output_dir)  # type: ignore[arg-type]


def stopped_after(callback: tfr.EarlyStopping, values: Sequence[float | None], name: str = "test_loss") -> Any:
    """Return the number of rounds that it lets run, and the reason."""
    run = run_of()
    for round_num, value in enumerate(values):
        callback.on_round_end(run, RoundEnded(round_num, 100, {"other": 1.0} if value is None else {name: value}))
        if run.stop_reason is not None:
            return round_num + 1, run.stop_reason
    return None


@pytest.mark.parametrize(
    ("settings", "values", "num_rounds"),
    [
        ({"patience": 2}, [3, 2, 2, 1, 1, 1], 6),
        ({"patience": 2}, [3, 2, 1], None),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.9, 2.4, 2.4, 2.0], 5),
        ({"patience": 2, "mode": "max"}, [3, 2, 2, 1], 3),
        ({"patience": 2, "metric": "test_accuracy"}, [0.5, 0.4, 0.6, 0.6, 0.5], 5),
        ({"patience": 2, "metric": "client_accuracy_worst_decile"}, [0.5, 0.4, 0.6, 0.6, 0.5], 5),
        ({"patience": 2, "metric": "client_accuracy_weighted"}, [0.5, 0.4, 0.6, 0.6, 0.5], 5),
        ({"patience": 2, "metric": "client_loss_worst_decile"}, [3, 2, 2, 1, 1, 1], 6),
        ({"patience": 2, "metric": "client_accuracy_spread"}, [3, 2, 2, 1, 1, 1], 6),
        ({"patience": 2}, [3, math.nan, math.nan], 3),
        ({"patience": 2}, [math.nan, math.nan], 2),
        ({"patience": 2}, [math.nan, 5, math.inf, 4], None),
        ({"patience": 2}, [3, None, 3, None, None, 3], 6),
    ],
)
def test_early_stopping_waits_for_patience_rounds_without_a_better_metric(
    settings: dict[str, Any], values: list[float | None], num_rounds: int | None
) -> None:
    stopped = stopped_after(tfr.EarlyStopping(**settings), values, settings.get("metric", "test_loss"))
    assert (stopped and stopped[0]) == num_rounds


def test_early_stopping_tells_the_best_round() -> None:
    _, reason = stopped_after(tfr.EarlyStopping(patience=2), [3, 0.25, 2, 1])
    assert reason == "test_loss has not improved for 2 rounds; the best was 0.25 in round 2"
    _, reason = stopped_after(tfr.EarlyStopping(patience=1), [math.nan])
    assert reason == "test_loss has not improved for a round; it was NaN"


@pytest.mark.parametrize(
    ("settings", "values", "num_rounds"),
    [
        ({"metric": "test_accuracy", "target": 0.5}, [0.4, math.nan, None, 0.5, 0.6], 4),
        ({"metric": "test_accuracy", "target": 0.5}, [0.4, 0.3, 0.2], None),
        ({"metric": "test_accuracy", "target": 0.5, "patience": 1}, [0.4, 0.3, 0.5], 2),
        ({"metric": "test_accuracy", "target": 0.5, "min_delta": 0.2}, [0.4, 0.5], 2),
        ({"metric": "test_loss", "target": 2}, [3, 2.5, 2, 1], 3),
        ({"metric": "client_accuracy_spread", "target": 0.5}, [0.6, 0.4], 2),
    ],
)
def test_early_stopping_ends_the_run_once_the_target_is_reached(
    settings: dict[str, Any], values: list[float | None], num_rounds: int | None
) -> None:
    callback = tfr.EarlyStopping(**{"patience": None, **settings})
    stopped = stopped_after(callback, values, settings["metric"])
    assert (stopped and stopped[0]) == num_rounds
    is_reached = "patience" not in settings and num_rounds is not None
    assert callback.num_rounds_to_target == (num_rounds if is_reached else None)
    again = tfr.EarlyStopping(**{"patience": None, **settings})
    again.load_state_dict(callback.state_dict())
    assert again.num_rounds_to_target == callback.num_rounds_to_target


def test_early_stopping_tells_its_target() -> None:
    callback = tfr.EarlyStopping("test_accuracy", target=0.5)
    _, reason = stopped_after(callback, [0.75], "test_accuracy")
    assert reason == "test_accuracy has reached its target 0.5: it is 0.75"


def test_early_stopping_counts_on_after_a_resume() -> None:
    values = [3.0, 2, 4, 4, 4, 4]
    for num_before in range(1, 4):
        first, second = tfr.EarlyStopping(patience=3), tfr.EarlyStopping(patience=3)
        assert stopped_after(first, values[:num_before]) is None
        second.load_state_dict(first.state_dict())
        num_rounds, _ = stopped_after(second, values[num_before:])
        assert num_before + num_rounds == 5


@pytest.mark.parametrize("make", [tfr.EarlyStopping, tfr.BestModel])
def test_unknown_metric_is_an_error_with_the_nearest(make: Any, tmp_path: Path) -> None:
    callback, run = make("test_los", mode="min"), run_of(SimpleNamespace(weights={}), tmp_path)
    callback.on_run_start(run)
    message = r"the trainer published no metric 'test_los' in round 0 \(did you mean 'test_loss'"
    with pytest.raises(tfr.ConfigError, match=message):
        _finish(callback.on_round_end(run, RoundEnded(0, 2, {"test_loss": 1.0, "train_loss": 2.0})))
    with pytest.raises(tfr.ConfigError, match=r"in round 0: publish tfr\.RoundEnded with metrics"):
        _finish(callback.on_round_end(run, RoundEnded(0, 2, {})))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 0}, "patience must be a whole number of at least 1, not 0"),
        ({"patience": 1.5}, "patience must be a whole number"),
        ({"patience": None}, "without patience and target never stops: set one of them"),
        ({"target": "high"}, "target must be a finite number, not 'high'"),
        ({"target": True}, "target must be a finite number, not True"),
        ({"target": math.nan}, "target must be a finite number, not nan"),
        ({"target": 90, "metric": "test_accuracy"}, "the target of test_accuracy is above 0, up to 1, not 90"),
        ({"target": 0, "metric": "client_accuracy_worst_decile"}, "_decile is above 0, up to 1, not 0"),
        ({"min_delta": -1.0}, r"min_delta must be at least 0, not -1\.0"),
        ({"mode": "maximum"}, "mode must be min or max, not 'maximum'"),
        ({"metric": "f1"}, "set mode to min or max, which the name of the metric f1 does not tell"),
    ],
)
def test_invalid_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(tfr.ConfigError, match=message):
        tfr.EarlyStopping(**settings)


class BestTrainer(tfr.AbstractFederationTrainer):
    """Adds one to its weights in place in each round."""

    def __init__(self, config: Any, proxy: tfr.LearnerProxy) -> None:
        super().__init__(config, proxy)
        self.weights = {"w": torch.zeros(3)}

    async def train(self) -> None:
        async for round_num in self.rounds():
            self.weights["w"] += 1
            self.learner_proxy.publish(
                RoundEnded(round_num, self.num_rounds, {"loss": self.config.losses[round_num]})
            )


async def train(folder: Path, losses: list[float], num_rounds: int, resume: str = "auto") -> None:
    async with tfr.LearnerProxy(dict, ["a"], runtime="local") as proxy:
        trainer = BestTrainer({"num_rounds": num_rounds, "losses": losses}, proxy)
        trainer.callbacks, trainer.output_dir = [tfr.BestModel("loss")], folder
        trainer.checkpoints = tfr.Checkpoints(folder / "checkpoints", resume=resume)
        await trainer.train()


async def test_best_model_is_that_of_the_best_round_also_after_a_resume_elsewhere(tmp_path: Path) -> None:
    losses = [4.0, 1.0, 2.0, 3.0]
    await train(tmp_path / "first", losses, 3)
    await train(tmp_path / "second", losses, 4, resume=str(tmp_path / "first"))
    for folder in ("first", "second"):
        best = torch.load(tmp_path / folder / "best.pt", weights_only=True)
        assert torch.equal(best.pop("weights")["w"], torch.full((3,), 2.0))
        assert best == {"metric": "loss", "value": 1.0, "round": 1, "metrics": {"loss": 1.0}}


async def test_best_model_of_another_run_is_removed(tmp_path: Path) -> None:
    (tmp_path / "best.pt").touch()
    await train(tmp_path, [math.nan], 1)
    assert not (tmp_path / "best.pt").exists()


async def test_best_model_saves_a_module(tmp_path: Path) -> None:
    trainer = SimpleNamespace(net=torch.nn.Linear(1, 1))
    callback, run = tfr.BestModel("accuracy", path=tmp_path / "deep" / "net.pt", weights="net"), run_of(trainer)
    callback.on_run_start(run)
    await callback.on_round_end(run, RoundEnded(0, 1, {"accuracy": 0.5}))
    assert set(torch.load(tmp_path / "deep" / "net.pt", weights_only=True)["weights"]) == {"weight", "bias"}


def test_best_model_needs_a_folder_and_weights(tmp_path: Path) -> None:
    with pytest.raises(tfr.ConfigError, match=r"BestModel has no folder: give it path=\.\.\., or set"):
        tfr.BestModel().on_run_start(run_of(SimpleNamespace(weights={})))
    with pytest.raises(tfr.ConfigError, match=r"has no attribute 'weights' \(did you mean 'weight'\?\)"):
        tfr.BestModel().on_run_start(run_of(SimpleNamespace(weight={}), tmp_path))


def _finish(result: Any) -> None:
    """Run a coroutine that does not wait; do nothing for None."""
    if result is not None:
        result.send(None)


@pytest.mark.parametrize("make", [tfr.EarlyStopping, tfr.BestModel])
def test_a_resume_with_another_metric_is_refused(make: Any) -> None:
    state = make("train_loss").state_dict()
    with pytest.raises(tfr.ConfigError, match=r"watches num_clients \(mode=min\), and watched train_loss"):
        make("num_clients", mode="min").load_state_dict(state)
    with pytest.raises(tfr.ConfigError, match=r"watches train_loss \(mode=max\), and watched train_loss"):
        make("train_loss", mode="max").load_state_dict(state)
