"""300 kinds of learners, each undisturbed and disturbed: the results agree, or the state is refused aloud."""

from __future__ import annotations

import asyncio

import pytest
import torch
from corpus import ways
from corpus.registry import DIFFERS, KINDS, NUM_ROUNDS, WAYS, Kind
from corpus.table import page
from corpus.ways import Outcome, Outcomes, Snapshots, Texts, surprises
from folders import ROOT

import torchfedrpc as tfr

NUM_KINDS = 250  # at least
STATE = ROOT / "docs" / "state.md"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def expected(runner: asyncio.Runner) -> Texts:
    """The results of each client in a run of its own."""
    return runner.run(ways.alone())


@pytest.fixture(scope="module")
def on_workers(runner: asyncio.Runner, expected: Texts) -> tuple[Outcomes, Outcomes, list[Snapshots]]:
    """What comes of all kinds on two workers that are killed before the last call of each client."""
    return runner.run(ways.on_workers(expected, [NUM_ROUNDS - 2]))


async def test_results_do_not_depend_on_other_clients_of_the_process(expected: Texts) -> None:
    assert not surprises("beside others", await ways.beside_others(expected))


async def test_evicted_learners_give_the_same_results_or_stay(expected: Texts) -> None:
    assert not surprises("evicted", await ways.evicted(expected))


def test_learners_on_two_workers_give_the_results_of_a_local_run(
    on_workers: tuple[Outcomes, Outcomes, list[Snapshots]],
) -> None:
    assert not surprises("two workers", on_workers[0])


def test_rebuilt_learners_give_the_same_results_or_are_refused(
    on_workers: tuple[Outcomes, Outcomes, list[Snapshots]],
) -> None:
    assert not surprises("killed", on_workers[1])


async def test_restored_learners_give_the_same_results_or_are_refused(
    expected: Texts, on_workers: tuple[Outcomes, Outcomes, list[Snapshots]]
) -> None:
    assert not surprises("restored", await ways.restored(expected, on_workers[2]))


@pytest.mark.slow
async def test_learners_rebuilt_after_each_call_give_the_same_results_or_are_refused(expected: Texts) -> None:
    _, outcomes, _ = await ways.on_workers(expected, range(NUM_ROUNDS - 1))
    assert not surprises("killed", outcomes)


# The corpus itself.


def test_corpus_has_many_kinds_of_each_topic() -> None:
    assert len(KINDS) >= NUM_KINDS
    topics = [entry.topic for entry in KINDS.values()]
    assert min(topics.count(topic) for topic in topics) >= 8


def test_differences_are_documented_for_hash_seeds_and_ids_alone() -> None:
    documented = {entry.name for entry in KINDS.values() if entry.documented is not None}
    assert documented == {"set-of-strings", "keyed-by-id"}


def test_sentences_of_kinds_are_unique() -> None:
    sentences = [entry.sentence for entry in KINDS.values()]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the page has a line on an optimiser of torch 2.9")
def test_state_page_says_what_the_corpus_says() -> None:
    command = "PYTHONPATH=tests/support .venv/bin/python -m corpus > docs/state.md"
    assert STATE.read_text(encoding="utf-8") == page(), f"docs/state.md is out of date: {command}"


@pytest.fixture
def some_kind() -> Kind:
    return KINDS["grad-kept"]


@pytest.mark.parametrize("way", WAYS)
def test_other_results_without_an_error_are_a_surprise_in_each_way(some_kind: Kind, way: str) -> None:
    assert surprises(way, {some_kind.name: Outcome(DIFFERS, "1 -> 2")})
    assert not surprises(way, {some_kind.name: Outcome(some_kind.expected[way])})


async def test_comparison_notices_one_bit_of_one_result(expected: Texts) -> None:
    run = ways.Run(texts={"grad-kept-1": list(expected["grad-kept-1"])})
    assert ways.compare(run, "grad-kept-1", expected).word == "same"
    run.texts["grad-kept-1"][-1] = expected["grad-kept-1"][-1].replace("float32", "float64")
    assert ways.compare(run, "grad-kept-1", expected).word == DIFFERS
    run.errors["grad-kept-1"] = AttributeError("x")
    run.texts["grad-kept-1"].pop()
    assert ways.compare(run, "grad-kept-1", expected).word == "FAILS"
    run.errors["grad-kept-1"] = tfr.SnapshotError("x")
    assert ways.compare(run, "grad-kept-1", expected).word == "refused"
