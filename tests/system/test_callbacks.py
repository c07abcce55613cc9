"""Callbacks of a run: when they are called, what their exceptions do, stops, and their state in checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import torchfedrpc as tfr

NUM_ROUNDS = 4


class BrokenError(Exception):
    """What a trainer or a callback raises here."""


class CountingLearner:
    """Counts its steps."""

    def __init__(self, client_id: str) -> None:
        self.num_steps = 0

    def step(self) -> int:
        self.num_steps += 1
        return self.num_steps


class CountingTrainer(tfr.AbstractFederationTrainer):
    """Calls all clients in each round; raises in round ``crash_at``, and publishes metrics unless it is ``quiet``."""

    async def train(self) -> int:
        async for round_num in self.rounds():
            steps = await self.learner_proxy.clients().call("step")
            if round_num == getattr(self.config, "crash_at", None):
                raise BrokenError
            if not getattr(self.config, "quiet", False):
                metrics = {"steps": float(sum(steps.values()))}
                self.learner_proxy.publish(tfr.RoundEnded(round_num, self.num_rounds, metrics))
        return 7


class DerivedTrainer(CountingTrainer):
    """Extends the training of its base."""

    async def train(self) -> int:
        return await super().train() + 1


class Recorder(tfr.Callback):
    """Records its calls; ``act`` maps a method's name to what it does then."""

    def __init__(self, **act: Callable[..., object]) -> None:
        self.calls: list[Any] = []
        self.act = act

    def on_run_start(self, run: tfr.Run) -> None:
        self._note("start", run)

    def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
        self._note(f"round {ended.round_num} {ended.metrics}", run, ended)

    def on_event(self, run: tfr.Run, event: tfr.Event) -> None:
        if not isinstance(event, tfr.CallStarted | tfr.CallEnded):
            self._note(type(event).__name__, run)

    def on_run_end(self, run: tfr.Run, error: BaseException | None) -> None:
        self._note(f"end {type(error).__name__}", run)

    def _note(self, text: str, *args: Any) -> None:
        self.calls.append(text)
        for name, do in self.act.items():
            if text.startswith(name):
                do(*args)


def fail(*args: Any) -> None:
    raise BrokenError("no space left")


async def train(
    *callbacks: Any,
    runtime: Any = "local",
    folder: Path | None = None,
    every: int = 1,
    kind: type[tfr.AbstractFederationTrainer] = CountingTrainer,
    **config: Any,
) -> Any:
    async with tfr.LearnerProxy(CountingLearner, ["a", "b"], runtime=runtime) as proxy:
        trainer = kind({"num_rounds": NUM_ROUNDS, **config}, proxy)
        trainer.callbacks = list(callbacks)
        if folder is not None:
            trainer.checkpoints = tfr.Checkpoints(folder, every=every, resume="auto")
        return await trainer.train()


@pytest.mark.parametrize("runtime", ["local", {"execution_mode": "pseudo", "num_processes": 1}])
async def test_callbacks_are_called_at_start_rounds_events_and_end(runtime: Any) -> None:
    recorder = Recorder()
    assert await train(recorder, runtime=runtime, num_rounds=2) == 7
    rounds = [
        ["RoundStarted", "RoundEnded", f"round {number} {{'steps': {2.0 * (number + 1)}}}"] for number in range(2)
    ]
    assert recorder.calls == ["start", "RunStarted", *rounds[0], *rounds[1], "RunEnded", "end NoneType"]


async def test_round_without_published_metrics_has_none() -> None:
    recorder = Recorder()
    await train(recorder, quiet=True, num_rounds=1)
    assert "round 0 {}" in recorder.calls


class Publishing(tfr.AbstractFederationTrainer):
    """Publishes metrics of each round in two parts, as of a round ``shift`` later."""

    async def train(self) -> None:
        async for round_num in self.rounds():
            for metrics in ({"loss": 1.0}, {"extra": 2.0}):
                number = round_num + getattr(self.config, "shift", 0)
                self.learner_proxy.publish(tfr.RoundEnded(number, self.num_rounds, metrics))


async def test_metrics_that_are_published_apart_are_those_of_one_round() -> None:
    seen: list[dict[str, float]] = []

    class Reader(tfr.Callback):
        def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
            seen.append(dict(ended.metrics))

    await train(Reader(), kind=Publishing)
    assert seen == [{"loss": 1.0, "extra": 2.0}] * NUM_ROUNDS


async def test_the_end_of_another_round_is_refused() -> None:
    words = "Publishing has published the end of round 1 in round 0: give"
    with pytest.raises(tfr.ConfigError, match=words):
        await train(Recorder(), kind=Publishing, shift=1)


async def test_train_that_calls_its_bases_is_one_run() -> None:
    recorder = Recorder()
    assert await train(recorder, kind=DerivedTrainer) == 8
    assert [recorder.calls.count(name) for name in ("start", "RunStarted", "RunEnded", "end NoneType")] == [1] * 4


async def test_async_callback_calls_learners() -> None:
    class Evaluator(tfr.Callback):
        seen: list[Any] = []

        async def on_run_start(self, run: tfr.Run) -> None:
            self.seen.append(dict(run.config))

        async def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
            self.seen.append(await run.proxy.client("a").step())

    await train(evaluator := Evaluator(), num_rounds=2)
    assert evaluator.seen == [{"num_rounds": 2}, 2, 4]


async def test_failure_at_the_start_ends_the_run_before_a_round() -> None:
    first, broken, last = Recorder(), Recorder(start=fail), Recorder()
    broken.may_fail = True  # type: ignore[misc]
    with pytest.raises(BrokenError) as raised:
        await train(first, broken, last)
    assert raised.value.__notes__ == ["in Recorder_2.on_run_start, a callback of the run"]
    assert [first.calls, broken.calls, last.calls] == [["start", "RunEnded", "end BrokenError"][::2], ["start"], []]


async def test_run_that_did_not_start_publishes_no_end() -> None:
    events: list[tfr.Event] = []

    class Subscriber(tfr.Callback):
        def on_run_start(self, run: tfr.Run) -> None:
            run.proxy.subscribe(events.append)

    with pytest.raises(BrokenError):
        await train(Subscriber(), Recorder(start=fail))
    assert not [event for event in events if isinstance(event, tfr.RunStarted | tfr.RunEnded)]


@pytest.mark.parametrize("method", ["round 1", "RoundStarted"])
async def test_failure_of_a_callback_ends_the_run_with_its_name(method: str) -> None:
    broken, other = Recorder(**{method: fail}), Recorder()
    with pytest.raises(BrokenError) as raised:
        await train(broken, other)
    name = "on_round_end" if method == "round 1" else "on_event"
    assert raised.value.__notes__[0] == f"in Recorder.{name}, a callback of the run"
    assert other.calls[-1] == "end BrokenError"
    assert not any(call.startswith("round 2") for call in other.calls)


async def test_failure_at_the_end_is_raised_after_all_callbacks_have_ended() -> None:
    broken, other = Recorder(end=fail), Recorder()
    with pytest.raises(BrokenError):
        await train(broken, other)
    assert other.calls[-1] == "end NoneType"


async def test_failure_at_the_end_does_not_hide_the_error_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    class Other(Recorder):
        def on_run_end(self, run: tfr.Run, error: BaseException | None) -> None:
            raise OSError("disk full")

    with pytest.raises(BrokenError):
        await train(Other(), crash_at=1)
    assert "Other.on_run_end failed" in caplog.text


@pytest.mark.parametrize("method", ["round", "RoundStarted", "end"])
async def test_failure_of_a_logger_is_logged_with_its_name_and_the_run_goes_on(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Logger(Recorder):
        may_fail = True

    broken = Logger(**{method: fail})
    assert await train(broken) == 7
    name, count = {"round": ("on_round_end", 4), "RoundStarted": ("on_event", 4), "end": ("on_run_end", 1)}[method]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"the callback Logger.{name} failed, and the run goes on",
        f"the callback Logger.{name} failed {count} times in this run",
    ]
    assert "no space left" in caplog.text


async def test_error_of_the_run_reaches_on_run_end_once() -> None:
    recorder = Recorder()
    with pytest.raises(BrokenError):
        await train(recorder, crash_at=1)
    assert recorder.calls[-2:] == ["RunEnded", "end BrokenError"]
    assert sum(call.startswith("end") for call in recorder.calls) == 1


async def test_cancellation_reaches_on_run_end() -> None:
    reached = asyncio.Event()
    recorder = Recorder(round=lambda *args: reached.set())
    task = asyncio.create_task(train(recorder, num_rounds=1_000_000))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert recorder.calls[-1] == "end CancelledError"


@pytest.mark.parametrize("method", ["start", "RoundStarted", "round"])
async def test_stop_ends_the_run_after_the_round(method: str, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(**{method: lambda run, *args: run.stop("good enough")})
    assert await train(recorder) == 7
    rounds = [call for call in recorder.calls if call.startswith("round")]
    assert len(rounds) == (0 if method == "start" else 1)
    assert recorder.calls[-1] == "end NoneType"
    assert ("stopping after round 1 of 4: good enough" in caplog.text) == (method != "start")


async def test_stopped_run_stays_stopped_unless_the_callback_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(run: tfr.Run, ended: tfr.RoundEnded) -> None:
        if ended.round_num == 1:
            run.stop("good enough")

    await train(Recorder(round=stop), folder=tmp_path, every=3)
    again = Recorder()
    await train(again, folder=tmp_path)
    assert again.calls == ["start", "RunStarted", "RunEnded", "end NoneType"]
    assert "the run has stopped before, by Recorder: good enough" in caplog.text

    class OtherRecorder(Recorder):
        pass

    await train(other := OtherRecorder(), folder=tmp_path)
    assert [call for call in other.calls if call.startswith("round")] == [
        "round 2 {'steps': 6.0}",
        "round 3 {'steps': 8.0}",
    ]


class Summing(tfr.Callback):
    """Has a state: the sum of a metric."""

    def __init__(self) -> None:
        self.total: Any = 0.0

    def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
        self.total += ended.metrics["steps"]

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total = state["total"]


async def test_state_of_a_callback_is_restored_by_a_resume(tmp_path: Path) -> None:
    with pytest.raises(BrokenError):
        await train(Summing(), Recorder(**{"round 2": fail}), Summing(), folder=tmp_path)
    resumed = [Summing(), Summing(), Summing()]
    await train(*resumed, folder=tmp_path)
    assert [callback.total for callback in resumed] == [20.0, 20.0, 14.0]


async def test_state_that_is_not_plain_data_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Summing):
        def state_dict(self) -> dict[str, Any]:
            return {"self": self}

    await train(Odd(), folder=tmp_path, num_rounds=1)
    assert "no checkpoint of round 1" in caplog.text
    assert "Odd.state_dict() must return plain data and tensors" in caplog.text


@pytest.mark.parametrize(
    ("present", "lacking"), [("state_dict", "load_state_dict"), ("load_state_dict", "state_dict")]
)
async def test_a_half_of_the_methods_that_keep_a_state_is_refused(present: str, lacking: str) -> None:
    half = type("Half", (tfr.Callback,), {present: lambda self, *state: {}})
    with pytest.raises(tfr.ConfigError, match=rf"Half has {present}\(\) and no {lacking}\(\)"):
        await train(half())


async def test_object_that_is_no_callback_is_refused() -> None:
    with pytest.raises(tfr.ConfigError, match=r"instances of tfr.Callback, and <class .*Recorder'> is none"):
        await train(Recorder)


async def test_train_without_rounds_tells_that_callbacks_were_not_called(caplog: pytest.LogCaptureFixture) -> None:
    class Loop(tfr.AbstractFederationTrainer):
        async def train(self) -> None:
            pass

    await train(recorder := Recorder(), kind=Loop)
    assert recorder.calls == []
    assert "no callback of" in caplog.text
    assert "must loop over self.rounds()" in caplog.text


async def test_rounds_outside_train_refuse_callbacks() -> None:
    class Other(CountingTrainer):
        async def fit(self) -> list[int]:
            return [round_num async for round_num in self.rounds()]

    async with tfr.LearnerProxy(CountingLearner, ["a"], runtime="local") as proxy:
        trainer = Other({"num_rounds": 2}, proxy)
        assert await trainer.fit() == [0, 1]
        trainer.callbacks = [Recorder()]
        with pytest.raises(tfr.ConfigError, match="inside its train"):
            await trainer.fit()


async def test_running_extends_the_run_to_what_follows_train(tmp_path: Path) -> None:
    recorder = Recorder()
    async with tfr.LearnerProxy(CountingLearner, ["a"], runtime="local") as proxy:
        trainer = CountingTrainer({"num_rounds": 1}, proxy)
        trainer.callbacks, trainer.output_dir = [recorder], str(tmp_path / "runs" / "first")
        async with trainer.running({"seed": 3}) as run:
            await trainer.train()
            assert recorder.calls[-1] == "round 0 {'steps': 1.0}"
            assert run.config == {"seed": 3}
            assert run.output_dir is not None
            assert run.output_dir.is_dir()
        assert recorder.calls[-2:] == ["RunEnded", "end NoneType"]


class Doubling(tfr.Callback):
    """Returns a further metric of each round."""

    def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> dict[str, float]:
        return {"doubled": 2 * ended.metrics["steps"]}


async def test_metrics_that_a_callback_returns_are_in_the_round_of_those_after_it() -> None:
    before, after = Recorder(), Recorder()
    async with tfr.LearnerProxy(CountingLearner, ["a"], runtime="local") as proxy:
        trainer = CountingTrainer({"num_rounds": 2}, proxy)
        trainer.callbacks = [before, Doubling(), after]
        await trainer.train()
    assert [call for call in before.calls if call.startswith("round")] == [
        "round 0 {'steps': 1.0}",
        "round 1 {'steps': 2.0}",
    ]
    assert [call for call in after.calls if call.startswith("round")] == [
        "round 0 {'steps': 1.0, 'doubled': 2.0}",
        "round 1 {'steps': 2.0, 'doubled': 4.0}",
    ]
