"""The ways in which the corpus is run, and what comes of each kind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from internals import sessions_of

import torchfedrpc as tfr
from corpus.bits import bits
from corpus.learner import make, num_made
from corpus.registry import (
    DIFFERS,
    FAILS,
    KINDS,
    NUM_ROUNDS,
    REFUSED,
    SAME,
    STAYS,
    UNDISTURBED,
    Ask,
    Kind,
    clients,
    kind_of,
    present,
)
from torchfedrpc.testing import Faults

SEED = 5
TRUSTED = ["transformers", "tokenizers", "torchvision", "lightning"]
_POLL_S = 0.01
Texts = dict[str, list[str]]  # client -> the results of its calls


@dataclass(frozen=True)
class Outcome:
    """What came of a kind in a way of running it.

    Attributes:
        word: one of the words of `corpus.registry`.
        detail: what it shows by.
    """

    word: str
    detail: str = ""


Outcomes = dict[str, Outcome]  # by kind
Snapshots = dict[str, bytes | Exception]  # by client; an exception where none could be taken


@dataclass
class Run:
    """The results of clients as they come, and what ended them.

    Attributes:
        texts: client -> the text of each result so far, None for one that this run has not asked for.
        errors: client -> the error that ended its calls.
        messages: what was logged or warned of meanwhile.
    """

    texts: dict[str, list[str | None]] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    async def round(self, proxy: tfr.LearnerProxy, number: int) -> None:
        """Make a call of each client at once; those with a deadline afterwards, one by one.

        All clients make their last call in the last round.
        """
        asks = {}
        for one in proxy.client_ids:
            calls = kind_of(one).calls
            place = number + len(calls) - NUM_ROUNDS
            if one not in self.errors and place >= 0:
                asks[one] = calls[place]
        groups: dict[Ask, list[str]] = {}
        for one, ask in asks.items():
            groups.setdefault(ask, []).append(one)
        await asyncio.gather(*(self._call_group(proxy, ask, ids) for ask, ids in groups.items() if not ask.is_alone))
        for one, ask in asks.items():
            if ask.is_alone:  # a deadline would pass in the queue
                await self._call(proxy, one, ask)

    async def attempt(self, client_id: str, action: Awaitable[Any]) -> Any:
        """Await what may be refused, and end the client's calls where it is."""
        try:
            return await action
        except Exception as error:
            self.errors.setdefault(client_id, error)
            return None

    async def _call_group(self, proxy: tfr.LearnerProxy, ask: Ask, ids: list[str]) -> None:
        if ask.streams:
            await asyncio.gather(*(self._call(proxy, one, ask) for one in ids))
            return
        results = await proxy.clients(ids).options(on_error="collect").call(ask.method, *ask.args)
        for one in ids:
            if one in results:
                self._add(one, results[one])
            else:
                self._failed(one, results.failures[one])

    async def _call(self, proxy: tfr.LearnerProxy, client_id: str, ask: Ask) -> None:
        try:
            if ask.streams:
                try:
                    items = [item async for item in proxy.stream(client_id, ask.method, *ask.args)]
                except tfr.WorkerLostError:  # the learner is as it was before the stream: another one gives the same
                    items = [item async for item in proxy.stream(client_id, ask.method, *ask.args)]
                self._add(client_id, items)
            else:
                caller = proxy if ask.timeout_s is None else proxy.options(timeout_s=ask.timeout_s)
                self._add(client_id, await caller.custom_method(client_id, ask.method, *ask.args))
        except Exception as error:
            self._failed(client_id, error)

    def _add(self, client_id: str, value: Any) -> None:
        self.texts.setdefault(client_id, []).append(value if isinstance(value, str) else bits(value))

    def _failed(self, client_id: str, error: Exception) -> None:
        if isinstance(error, tfr.CallTimeoutError):
            self._add(client_id, "CallTimeoutError")
        elif type(error) is ValueError:  # which a kind raises on purpose
            self._add(client_id, f"ValueError{error.args}")
        else:
            self.errors[client_id] = error


# The runs.


async def alone() -> Texts:
    """Each client in a local run of its own: what all others are compared with."""
    texts: Texts = {}
    for client_id in clients():
        run = Run()
        async with _opened([client_id], run) as proxy:
            for number in range(NUM_ROUNDS):
                await run.round(proxy, number)
        assert client_id not in run.errors, f"{client_id}: {run.errors[client_id]!r}"
        texts[client_id] = [str(text) for text in run.texts[client_id]]
    _collect()
    return texts


async def beside_others(expected: Texts) -> Outcomes:
    """All clients in one local run."""
    run = Run()
    async with _opened(clients(), run) as proxy:
        for number in range(NUM_ROUNDS):
            await run.round(proxy, number)
    return _outcomes(lambda client_id: compare(run, client_id, expected))


async def evicted(expected: Texts) -> Outcomes:
    """All clients in one local run that keeps one learner in memory."""
    run = Run()
    num_made.clear()
    async with _opened(clients(), run, max_resident_learners=1) as proxy:
        for number in range(NUM_ROUNDS):
            await run.round(proxy, number)
    made = dict(num_made)

    def judge(client_id: str) -> Outcome:
        outcome = compare(run, client_id, expected)
        if outcome.word != SAME or made[client_id] > 1:
            return outcome
        told = [message for message in run.messages if re.search(rf"(?<![\w-]){client_id}\b", message)]
        return Outcome(STAYS, told[0]) if told else Outcome(UNDISTURBED, "was neither evicted nor named")

    return _outcomes(judge)


async def on_workers(expected: Texts, kill_after: Collection[int] = ()) -> tuple[Outcomes, Outcomes, list[Snapshots]]:
    """All clients on two workers, both of which are killed after some rounds, once all snapshots are stored.

    Returns:
        What came before the first kill, what came in all, and the snapshots after each round up to the first kill.
    """
    run, taken = Run(), list[Snapshots]()
    last_round = min(kill_after, default=NUM_ROUNDS - 1)
    before: Outcomes = {}
    async with _opened(clients(), run, num_processes=2, journal_max_calls=1) as proxy:
        for number in range(NUM_ROUNDS):
            faults = Faults().kill("worker1", at_call=1).kill("worker2", at_call=1)
            async with (faults if number - 1 in kill_after else Faults()).injected(proxy):
                await run.round(proxy, number)
            going_on = [one for one in proxy.client_ids if one not in run.errors]
            await asyncio.gather(*(run.attempt(one, proxy.custom_method(one, "ready")) for one in going_on))
            if number <= last_round and number + 1 < NUM_ROUNDS:
                taken.append({one: await _snapshot(proxy, one) for one in proxy.client_ids if one not in run.errors})
            if number == last_round:
                before = _outcomes(lambda client_id: compare(run, client_id, expected, is_whole=False))
            if number in kill_after:
                await _snapshots_are_stored(proxy)
    return before, _outcomes(lambda client_id: compare(run, client_id, expected)), taken


async def restored(expected: Texts, taken: list[Snapshots]) -> Outcomes:
    """Clients of two workers, restored from the snapshots after each round into a local run that goes on."""
    found: dict[str, list[Outcome]] = {client_id: [] for client_id in clients()}
    for after, snapshots in enumerate(taken):
        run = Run(errors={one: data for one, data in snapshots.items() if isinstance(data, Exception)})
        taken_of = {one: data for one, data in snapshots.items() if isinstance(data, bytes)}
        async with _opened(snapshots, run) as proxy:
            for one in taken_of:
                num_calls = len(kind_of(one).calls) - NUM_ROUNDS + after + 1
                run.texts[one] = [None] * max(0, num_calls)
                await run.attempt(one, proxy.restore({one: taken_of[one]}))
            for number in range(after + 1, NUM_ROUNDS):
                await run.round(proxy, number)
        for one in snapshots:
            found[one].append(compare(run, one, expected))
    return _outcomes(lambda client_id: _worst(found[client_id]))


async def _snapshot(proxy: tfr.LearnerProxy, client_id: str) -> bytes | Exception:
    try:
        async for _, data in proxy.snapshots([client_id]):
            return data
        raise AssertionError(f"no snapshot of {client_id} came")
    except Exception as error:
        return error


@contextlib.asynccontextmanager
async def _opened(client_ids: Iterable[str], run: Run, **settings: Any) -> AsyncIterator[tfr.LearnerProxy]:
    mode = "pseudo" if "num_processes" in settings else "local"
    runtime = {"execution_mode": mode, "trusted_modules": TRUSTED, **settings}
    with _heard(run.messages):
        async with tfr.LearnerProxy(make, list(client_ids), runtime=runtime, seed=SEED) as proxy:
            yield proxy
    if len(proxy.client_ids) > 1:
        _collect()


def _collect() -> None:
    """Let go of the learners, of which some have open files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


async def _snapshots_are_stored(proxy: tfr.LearnerProxy) -> None:
    """Wait until each journal has given way to a snapshot, where one can be taken."""
    journals = [session._journal for session in sessions_of(proxy).values() if session.given_up is None]
    async with asyncio.timeout(60):
        while any(one.awaits_snapshot or (one.is_due and one.unrecoverable is None) for one in journals):
            await asyncio.sleep(_POLL_S)


@contextlib.contextmanager
def _heard(messages: list[str]) -> Iterator[None]:
    """Take what is logged and warned of."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, listener = logging.getLogger("torchfedrpc"), Listener()
    level, propagates = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        messages.extend(str(one.message) for one in caught)
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagates


# What came of it.


def _outcomes(judge: Callable[[str], Outcome]) -> Outcomes:
    """Kind -> the worst that came of its clients."""
    return {entry.name: _worst([judge(client_id) for client_id in entry.clients]) for entry in present()}


def _worst(outcomes: list[Outcome]) -> Outcome:
    for word in (DIFFERS, FAILS, UNDISTURBED, REFUSED, STAYS):
        if found := [outcome for outcome in outcomes if outcome.word == word]:
            return found[0]
    return Outcome(SAME)


def compare(run: Run, client_id: str, expected: Texts, *, is_whole: bool = True) -> Outcome:
    texts = run.texts.get(client_id, [])
    for number, (text, right) in enumerate(zip(texts, expected[client_id], strict=False)):
        if text is not None and text != right:
            return Outcome(DIFFERS, f"{client_id}, call {number + 1}: {right[:300]} -> {text[:300]}")
    error = run.errors.get(client_id)
    if error is None:
        is_complete = len(texts) == len(expected[client_id]) or not is_whole
        return Outcome(SAME) if is_complete else Outcome(UNDISTURBED, "calls are missing")
    is_ours = isinstance(error, tfr.TorchFedRpcError) and not isinstance(error, tfr.RemoteError)
    return Outcome(REFUSED if is_ours else FAILS, f"{client_id}: {type(error).__name__}: {error}")


def surprises(way: str, outcomes: Mapping[str, Outcome]) -> list[str]:
    """What came otherwise than the corpus says, in lines."""
    return [
        f"{name} ({entry.topic}) {way}: {outcome.word} instead of {entry.expected[way]}: {outcome.detail}"
        for name, outcome in outcomes.items()
        if not _is_as_expected(entry := KINDS[name], way, outcome)
    ]


def _is_as_expected(entry: Kind, way: str, outcome: Outcome) -> bool:
    return outcome.word == entry.expected[way] or (entry.documented is not None and outcome.word == DIFFERS)
