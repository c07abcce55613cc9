"""Checkpoints of a run: it goes on from them to the bits of an undisturbed one."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import enum
import errno
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from learners import Mortal

import torchfedrpc as tfr
from torchfedrpc.events import CheckpointSaved, RoundEnded
from torchfedrpc.federation.checkpoint_store import Checkpoint, CheckpointStore
from torchfedrpc.federation.checkpoints import plain
from torchfedrpc.host.snapshot import load
from torchfedrpc.storage import BlobStore
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.fingerprint import fingerprint

CLIENTS = [f"client_{number}" for number in range(6)]
NUM_ROUNDS = 6
PSEUDO = {"execution_mode": "pseudo", "num_processes": 2}


class CrashError(Exception):
    """What ends a run in the middle."""


class Trainer(tfr.AbstractFederationTrainer):
    """Keeps all kinds of state: values, a server's optimiser, draws from the process's own streams."""

    not_state = tfr.AbstractFederationTrainer.not_state | {"crash_at"}

    def __init__(self, config: Any, proxy: tfr.LearnerProxy, crash_at: int | None = None) -> None:
        super().__init__(config, proxy)
        self.crash_at = crash_at
        self.log: list[Any] = []
        self.server = torch.nn.Linear(3, 1)
        self.optimiser = torch.optim.Adam(self.server.parameters(), lr=0.1)
        self.moments = {"mean": np.zeros(3)}

    async def train(self) -> list[Any]:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        with torch.no_grad():
            self.server.weight.fill_(1.0)
            self.server.bias.zero_()
        async for round_num in self.rounds():
            results = await self.learner_proxy.clients(self.select_clients(round_num)).call("step")
            if round_num == self.crash_at:
                raise CrashError
            inputs = torch.tensor(
                [sum(result[number % len(result)] for result in results.values()) for number in range(3)]
            )
            loss = (self.server(inputs.float()) - random.random()).square().sum() + torch.rand(())
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.moments["mean"] += np.random.rand(3)
            self.log.append([dict(results), loss.item(), self.moments["mean"].tolist(), self.server.weight.tolist()])
            self.learner_proxy.publish(RoundEnded(round_num, self.num_rounds, {"loss": loss.item()}))
        return self.log


async def run(
    folder: Path | None,
    runtime: Any = "local",
    *,
    num_rounds: int = NUM_ROUNDS,
    crash_at: int | None = None,
    seed: int = 3,
    config: dict[str, Any] | None = None,
    watch: Callable[[Any], object] = lambda event: None,
    clients: list[str] = CLIENTS,
    **settings: Any,
) -> tuple[list[Any], dict[str, bytes]]:
    """A run: what it gave, and the state of all its learners at the end."""
    async with tfr.LearnerProxy(Mortal, clients, runtime=runtime, seed=seed) as proxy:
        proxy.subscribe(watch)
        given = {"num_rounds": num_rounds, "clients_per_round": 4, **(config or {})}
        trainer = Trainer(given, proxy, crash_at)
        if folder is not None:
            trainer.checkpoints = tfr.Checkpoints(folder, **{"resume": "auto", **settings})
        log = await trainer.train()
        allow = AllowList(proxy.trusted_modules)
        return log, {client: fingerprint(load(data, allow)) async for client, data in proxy.snapshots()}


@pytest.fixture(scope="module")
def undisturbed(runner: asyncio.Runner) -> tuple[list[Any], dict[str, bytes]]:
    return runner.run(run(None))


async def crash(folder: Path, crash_at: int, runtime: Any = "local", **settings: Any) -> None:
    with pytest.raises(CrashError):
        await run(folder, runtime, crash_at=crash_at, **settings)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Checkpoint]:
    """The newest checkpoint in a folder that no run has."""
    store = CheckpointStore(folder)
    try:
        found = store.load()
        assert found is not None
        yield found
    finally:
        store.unlock()


def rounds_in(folder: Path) -> list[int]:
    with contextlib.closing(BlobStore(folder / "checkpoints.sqlite")) as store:
        return sorted(int(key.split()[1]) for key in store if isinstance(key, str))


@pytest.mark.parametrize("every", [1, 2, 4])
async def test_a_run_goes_on_to_the_bits_of_an_undisturbed_one(
    tmp_path: Path, undisturbed: tuple[list[Any], dict[str, bytes]], every: int
) -> None:
    await crash(tmp_path, 4, every=every)
    rounds: list[int] = []

    def note(event: Any) -> None:
        if isinstance(event, RoundEnded):
            rounds.append(event.round_num)

    result = await run(tmp_path, every=every, watch=note)
    assert rounds == list(range(4 - 4 % every, NUM_ROUNDS))
    assert result == undisturbed


async def test_a_checkpoint_of_one_mode_and_number_of_workers_resumes_in_another(
    tmp_path: Path, undisturbed: tuple[list[Any], dict[str, bytes]]
) -> None:
    await crash(tmp_path, 2, {**PSEUDO, "num_processes": 1})
    await crash(tmp_path, 4, "local")
    assert await run(tmp_path, PSEUDO) == undisturbed


async def test_a_crash_in_the_first_round_begins_anew_with_a_warning(
    tmp_path: Path, undisturbed: tuple[list[Any], dict[str, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    await crash(tmp_path, 0)
    assert await run(tmp_path) == undisturbed
    assert "has no checkpoint, though a run was here: starting at round 0" in caplog.text


async def test_num_rounds_may_grow_and_not_shrink_below_what_is_done(
    tmp_path: Path, undisturbed: tuple[list[Any], dict[str, bytes]]
) -> None:
    await run(tmp_path, num_rounds=3)
    with pytest.raises(tfr.ConfigError, match=r"has done 3 rounds, and num_rounds is 2"):
        await run(tmp_path, num_rounds=2)
    assert await run(tmp_path) == undisturbed
    assert await run(tmp_path) == undisturbed  # nothing is left to do


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config": {"clients_per_round": 3}}, r"clients_per_round was 4 and is 3"),
        ({"config": {"optimizer": {"lr": 0.1}}}, r"optimizer\.lr was not set and is 0\.1"),
        ({"config": {"clip": np.float32(2.0)}}, r"clip was not set and is 'numpy\.float32 "),
        ({"seed": 4}, r"proxy\.seed was 3 and is 4"),
        ({"clients": CLIENTS[:5]}, r"proxy\.clients was '6 "),
        ({"runtime": {"execution_mode": "local", "torch_threads": 2}}, r"proxy\.torch_threads was 1 and is 2"),
    ],
)
async def test_another_configuration_is_refused_with_the_keys(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    await crash(tmp_path, 2)
    with pytest.raises(tfr.ConfigError, match=named):
        await run(tmp_path, **changes)


async def test_other_constructor_arguments_are_refused(tmp_path: Path) -> None:
    async def once(kept: float) -> None:
        async with tfr.LearnerProxy(Mortal, {"a": {"kept": kept}}, runtime="local") as proxy:
            trainer = Trainer({"num_rounds": 2}, proxy)
            trainer.checkpoints = tfr.Checkpoints(tmp_path, resume="auto")
            await trainer.train()

    await once(1.0)
    with pytest.raises(tfr.ConfigError, match=r"proxy\.constructor_arguments was"):
        await once(2.0)


async def test_resume_never_begins_anew_and_sets_aside_what_is_there(
    tmp_path: Path, undisturbed: tuple[list[Any], dict[str, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    await crash(tmp_path, 3, seed=9)
    assert await run(tmp_path, resume="never") == undisturbed
    assert f"the checkpoints of an earlier run have been moved to {tmp_path / 'earlier_1'}" in caplog.text
    assert await run(tmp_path) == undisturbed


async def test_run_resumes_from_another_folder_and_prefers_its_own(
    tmp_path: Path, undisturbed: tuple[list[Any], dict[str, bytes]]
) -> None:
    await crash(tmp_path / "first" / "checkpoints", 3)
    rounds: list[int] = []

    def note(event: Any) -> None:
        if isinstance(event, RoundEnded):
            rounds.append(event.round_num)

    with pytest.raises(CrashError):
        await run(tmp_path / "second", crash_at=4, resume=tmp_path / "first", watch=note)
    assert rounds == [3]
    assert await run(tmp_path / "second", resume=str(tmp_path / "first"), watch=note) == undisturbed
    assert rounds == [3, 4, 5]
    with pytest.raises(tfr.ConfigError, match="there is no checkpoint"):
        await run(tmp_path / "third", resume=tmp_path / "nowhere")


async def test_a_setting_may_have_the_name_of_what_is_known_of_the_proxy(
    tmp_path: Path, undisturbed: tuple[list[Any], dict[str, bytes]]
) -> None:
    config = {"proxy": {"learner": "of the user's own"}}
    await crash(tmp_path, 3, config=config)
    with tfr.Checkpoints(tmp_path, resume="auto", config={"num_rounds": 6, "clients_per_round": 4, **config}):
        pass
    assert await run(tmp_path, config=config) == undisturbed


async def test_a_second_run_of_the_same_folder_is_refused(tmp_path: Path) -> None:
    with tfr.Checkpoints(tmp_path), pytest.raises(tfr.ConfigError, match=r"belong to a run that goes on"):
        await run(tmp_path)
    await run(tmp_path)


async def test_only_learners_that_were_called_are_written_and_the_number_kept_holds(tmp_path: Path) -> None:
    saved: list[CheckpointSaved] = []

    def note(event: Any) -> None:
        if isinstance(event, CheckpointSaved):
            saved.append(event)

    await run(tmp_path, num_kept=2, watch=note)
    assert [event.round_num for event in saved] == list(range(NUM_ROUNDS))
    assert [event.num_learners for event in saved] == [4] * NUM_ROUNDS
    assert rounds_in(tmp_path) == [5, 6]


async def test_a_second_trainer_of_the_proxy_saves_learners_that_only_the_first_has_called(tmp_path: Path) -> None:
    runs = {}
    async with tfr.LearnerProxy(Mortal, CLIENTS, seed=3) as proxy:
        for name, num_clients in (("first", 6), ("second", 2)):
            trainer = Trainer({"num_rounds": 1, "clients_per_round": num_clients}, proxy)
            trainer.checkpoints = runs[name] = tfr.Checkpoints(tmp_path / name)
            await trainer.train()
        expected = {client: data async for client, data in proxy.snapshots()}
    with opened(tmp_path / "second") as found:
        assert dict(found.snapshots()) == expected


async def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, undisturbed: tuple[list[Any], dict[str, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    await crash(tmp_path, 4)
    path = tmp_path / "checkpoints.sqlite"
    with contextlib.closing(BlobStore(path)) as store:
        head = store.get("round 4")
    content = bytearray(path.read_bytes())
    content[content.index(head[-16:])] ^= 1
    path.write_bytes(content)
    assert await run(tmp_path) == undisturbed
    assert f"{path} is damaged, and round 3 is used: " in caplog.text


async def test_a_full_disk_is_logged_and_the_run_goes_on(
    tmp_path: Path,
    undisturbed: tuple[list[Any], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    put = BlobStore.put
    saved: list[Any] = []

    def put_until_full(store: BlobStore, key: Any, pieces: Any) -> None:
        if saved:
            raise OSError(errno.ENOSPC, "database or disk is full")
        put(store, key, pieces)

    def note(event: Any) -> None:
        if isinstance(event, CheckpointSaved):
            saved.append(event)

    monkeypatch.setattr(BlobStore, "put", put_until_full)
    assert await run(tmp_path, watch=note) == undisturbed
    assert "database or disk is full; the run goes on, and the last one is of round 1" in caplog.text
    monkeypatch.undo()
    assert await run(tmp_path) == undisturbed


async def test_attributes_that_cannot_be_saved_are_warned_of_once_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Careless(Trainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.callback = lambda: None

    async with tfr.LearnerProxy(Mortal, CLIENTS, runtime="local") as proxy:
        trainer = Careless({"num_rounds": 3}, proxy)
        trainer.checkpoints = tfr.Checkpoints(tmp_path)
        await trainer.train()
    assert caplog.text.count("Careless.callback is no part of checkpoints") == 1


async def test_saving_goes_on_beside_the_next_round_and_has_the_state_before_it(tmp_path: Path) -> None:
    saved = asyncio.Event()

    def note(event: Any) -> None:
        if isinstance(event, CheckpointSaved) and event.round_num == 0:
            saved.set()

    class Waiting(tfr.AbstractFederationTrainer):
        async def train(self) -> None:
            async for round_num in self.rounds():
                await self.learner_proxy.clients().call("append", round_num)
                if round_num == 1:
                    await saved.wait()  # in the middle of the round
                    raise CrashError

    async def once(num_rounds: int) -> Any:
        async with tfr.LearnerProxy(Mortal, CLIENTS) as proxy:
            proxy.subscribe(note)
            trainer = Waiting({"num_rounds": num_rounds}, proxy)
            trainer.checkpoints = tfr.Checkpoints(tmp_path, resume="auto")
            await trainer.train()
            return await proxy.clients().call("what_happened")

    with pytest.raises(CrashError):
        await once(num_rounds=3)
    assert await once(num_rounds=1) == {client: [0] for client in CLIENTS}


async def test_an_open_stream_at_the_end_of_a_round_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Reading(tfr.AbstractFederationTrainer):
        async def train(self) -> None:
            stream = self.learner_proxy.stream(CLIENTS[0], "count", 5)
            async for round_num in self.rounds():
                await anext(stream)
                if round_num == 1:
                    await stream.aclose()

    async with tfr.LearnerProxy(Mortal, CLIENTS, runtime="local") as proxy:
        trainer = Reading({"num_rounds": 2}, proxy)
        trainer.checkpoints = tfr.Checkpoints(tmp_path)
        await trainer.train()
    assert f"a stream of {CLIENTS[0]} is open" in caplog.text
    assert rounds_in(tmp_path) == [2]


@pytest.mark.parametrize(("setting", "value"), [("every", 0), ("every", 1.5), ("num_kept", 0), ("num_kept", True)])
def test_a_wrong_setting_is_refused(tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(tfr.ConfigError, match=rf"{setting}.* must be a whole number of at least 1"):
        tfr.Checkpoints(tmp_path, **{setting: value})


async def test_a_call_that_waits_over_the_end_of_a_round_is_in_a_later_checkpoint(tmp_path: Path) -> None:
    """Its learner changes after the snapshot for this round was asked for."""
    large = torch.zeros(1000)

    class Late(tfr.AbstractFederationTrainer):
        async def train(self) -> None:
            waiting: list[asyncio.Task[Any]] = []
            async for round_num in self.rounds():
                if round_num == 0:
                    first = asyncio.ensure_future(self.learner_proxy.custom_method("a", "append", large))
                    waiting.append(asyncio.ensure_future(self.learner_proxy.custom_method("b", "append", large)))
                    await first  # the other has no room before
                else:
                    await asyncio.gather(*waiting)

    async def once(num_rounds: int) -> list[int]:
        runtime = {"execution_mode": "local", "max_inflight_bytes": 10}
        async with tfr.LearnerProxy(Mortal, ["a", "b"], runtime=runtime) as proxy:
            trainer = Late({"num_rounds": num_rounds}, proxy)
            trainer.checkpoints = tfr.Checkpoints(tmp_path, resume="auto")
            await trainer.train()
            return [len(await proxy.custom_method(client, "what_happened")) for client in ("a", "b")]

    assert await once(2) == [1, 1]
    assert await once(2) == [1, 1]


async def test_a_reduce_beside_a_checkpoint_has_partial_results_made_on_the_workers(tmp_path: Path) -> None:
    class Reducing(tfr.AbstractFederationTrainer):
        async def train(self) -> list[int]:
            received = []
            async for round_num in self.rounds():
                before = self.learner_proxy.stats()["bytes_received"]
                model = torch.full((10_000,), float(round_num))
                result = await self.learner_proxy.clients().reduce("same", tfr.Sum(), model)
                assert result.value.unique().tolist() == [len(CLIENTS) * round_num]
                received.append(self.learner_proxy.stats()["bytes_received"] - before)
            return received

    async def received(folder: Path | None) -> list[int]:
        async with tfr.LearnerProxy(Mortal, CLIENTS, runtime=PSEUDO) as proxy:
            trainer = Reducing({"num_rounds": 4}, proxy)
            if folder is not None:
                trainer.checkpoints = tfr.Checkpoints(folder)
            return await trainer.train()

    assert sum(await received(tmp_path)) < 1.1 * sum(await received(None))


async def test_a_snapshot_comes_behind_calls_that_wait_for_a_cut() -> None:
    async with tfr.LearnerProxy(Mortal, CLIENTS, runtime="local") as proxy:
        await proxy.clients().call("append", 0)
        cut = proxy.cut(CLIENTS)
        calls = [asyncio.ensure_future(proxy.custom_method(client, "append", 1)) for client in CLIENTS]
        await asyncio.sleep(0)
        reading = asyncio.ensure_future(anext(proxy.snapshots([CLIENTS[-1]])))
        before = {client: load(data, AllowList(proxy.trusted_modules)) async for client, data in cut}
        await asyncio.gather(*calls)
        _, data = await reading
        assert load(data, AllowList(proxy.trusted_modules)).counts["append"] == 2
        assert {snapshot.counts["append"] for snapshot in before.values()} == {1}


async def test_an_optimiser_that_is_made_too_late_is_named(tmp_path: Path) -> None:
    class Lazy(Trainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.optimiser = None  # type: ignore[assignment]

        async def train(self) -> list[Any]:
            async for _ in self.rounds():
                self.optimiser = torch.optim.Adam(self.server.parameters())
            return []

    for expectation in (
        contextlib.nullcontext(),
        pytest.raises(tfr.ConfigError, match=r"Lazy\.optimiser has a state"),
    ):
        async with tfr.LearnerProxy(Mortal, CLIENTS, runtime="local") as proxy:
            trainer = Lazy({"num_rounds": 1}, proxy)
            trainer.checkpoints = tfr.Checkpoints(tmp_path, resume="auto")
            with expectation:
                await trainer.train()


class Speed(enum.StrEnum):
    """A setting that is a text, and more than that."""

    SLOW = "slow"
    FAST = "fast"


class Text(str):
    """A text of a user's class."""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SimpleNamespace(lr=SimpleNamespace(start=1.0)), SimpleNamespace(lr=SimpleNamespace(start=2.0))),
        ({"path": Path("a")}, {"path": Path("b")}),
        ({"weights": torch.zeros(2)}, {"weights": torch.ones(2)}),
        ({"names": {"a", "b"}}, {"names": {"a", "c"}}),
        ({"scale": np.float32(1)}, {"scale": np.float32(2)}),
        ({"speed": Speed.SLOW}, {"speed": Speed.FAST}),
        ({"name": Text("a")}, {"name": Text("b")}),
        ({"eps": math.nan}, {"eps": math.inf}),
    ],
)
def test_settings_of_all_kinds_are_told_apart(one: Any, other: Any) -> None:
    assert plain(one) != plain(other)
    assert plain(one) == plain(copy.deepcopy(one))


@pytest.mark.parametrize("value", [Speed.SLOW, Text("a"), math.nan, [math.nan, Speed.FAST], np.float64(1)])
async def test_a_setting_of_any_type_is_the_same_after_a_resume(tmp_path: Path, value: Any) -> None:
    for num_rounds in (1, 2):
        await run(tmp_path, num_rounds=num_rounds, config={"setting": value})
        with opened(tmp_path) as found:
            assert found.round_num == num_rounds


async def test_a_learner_that_was_given_up_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved: list[CheckpointSaved] = []

    def note(event: Any) -> None:
        if isinstance(event, CheckpointSaved):
            saved.append(event)

    class Losing(tfr.AbstractFederationTrainer):
        async def train(self) -> None:
            async for round_num in self.rounds():
                group = self.learner_proxy.clients().options(on_error="collect")
                await group.call("step")
                if round_num == 0:
                    with pytest.raises(tfr.WorkerLostError):
                        await self.learner_proxy.custom_method("a", "die")

    runtime = {**PSEUDO, "max_recoveries": 0}
    async with tfr.LearnerProxy(Mortal, ["a", "b"], runtime=runtime) as proxy:
        proxy.subscribe(note)
        trainer = Losing({"num_rounds": 3}, proxy)
        trainer.checkpoints = tfr.Checkpoints(tmp_path)
        await trainer.train()
    assert [event.round_num for event in saved] == [0, 1, 2]
    assert caplog.text.count("a was given up, so checkpoints no longer have it") == 1
    with opened(tmp_path) as found:
        assert list(found.digests) == ["b"]  # not what an earlier one has of the other
