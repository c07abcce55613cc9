"""Random streams: each call has its own, and the process's are as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scopes import process_state, scope

from torchfedrpc.host.call_scope import CallScope
from torchfedrpc.host.process_state import ProcessState
from torchfedrpc.host.randomness import Twister, call_seed

numpy_random: Any = np.random  # whose stubs lack the functions for bit generators

GPU = torch.device("cuda", 0)
DRAWS = {
    "torch": lambda: torch.rand(3).tolist(),
    "torch_normal": lambda: torch.randn(3).tolist(),
    "torch_permutation": lambda: torch.randperm(10).tolist(),
    "numpy": lambda: np.random.rand(3).tolist(),
    "numpy_gaussian": lambda: [np.random.randn() for _ in range(3)],  # an odd number: one is drawn ahead
    "numpy_integers": lambda: np.random.randint(0, 1 << 30, 3).tolist(),
    "random": lambda: [random.random() for _ in range(3)],
    "random_gaussian": lambda: [random.gauss() for _ in range(3)],
    "random_choice": lambda: random.sample(range(1000), 3),
}


@pytest.fixture(autouse=True)
def _global_streams() -> Iterator[None]:
    """Whatever a test does to the process's streams, the next test has them as they were."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])


PROCESS = process_state()


def streams(seed: int = 5, *, resumable: bool = False, process: ProcessState = PROCESS) -> CallScope:
    """The scope of a call with that seed, which gives the generators back after each step."""
    own = scope(process, seed, is_nested=True)
    own.is_resumable = resumable
    return own


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
class TestEveryGenerator:
    def test_is_seeded_by_the_call_alone(self, draw: Any) -> None:
        drawn = []
        for outside in (1, 2):
            torch.manual_seed(outside)
            np.random.seed(outside)
            random.seed(outside)
            draw()
            with streams(5):
                drawn.append(draw())
        assert drawn[0] == drawn[1]
        with streams(6):
            assert draw() != drawn[0]

    def test_goes_on_outside_as_if_the_call_had_not_been(self, draw: Any) -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        undisturbed = [draw(), draw()]
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        disturbed = [draw()]
        with streams():
            draw()
            torch.manual_seed(99)
            np.random.seed(99)
            random.seed(99)
            draw()
        disturbed.append(draw())
        assert disturbed == undisturbed

    def test_goes_on_in_a_later_step_where_the_one_before_ended(self, draw: Any) -> None:
        with streams():
            at_once = [draw(), draw(), draw()]
        own = streams(resumable=True)
        in_steps = []
        for _ in range(3):
            draw()
            with own:
                in_steps.append(draw())
            draw()
        assert in_steps == at_once

    def test_is_apart_from_that_of_another_call_in_between(self, draw: Any) -> None:
        first, second = streams(1, resumable=True), streams(2, resumable=True)
        woven: dict[str, list[Any]] = {"first": [], "second": []}
        for _ in range(3):
            with first:
                woven["first"].append(draw())
            with second:
                woven["second"].append(draw())
        for seed, name in ((1, "first"), (2, "second")):
            with streams(seed):
                assert woven[name] == [draw(), draw(), draw()]

    def test_is_restored_within_another_calls_step(self, draw: Any) -> None:
        with streams(1):
            undisturbed = [draw(), draw()]
        with streams(1):
            nested = [draw()]
            with streams(2):
                inner = draw()
            nested.append(draw())
        assert nested == undisturbed
        with streams(2):
            assert draw() == inner

    def test_is_restored_where_the_call_raises(self, draw: Any) -> None:
        random.seed(1)
        torch.manual_seed(1)
        np.random.seed(1)
        undisturbed = draw()
        random.seed(1)
        torch.manual_seed(1)
        np.random.seed(1)
        with pytest.raises(ZeroDivisionError), streams():
            _ = draw(), 1 / 0
        assert draw() == undisturbed


def numpy_state() -> str:
    return repr(np.random.get_state(legacy=False))


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize("drawn_ahead", [0, 1])
def test_numpys_whole_state_comes_back_with_the_gaussian_drawn_ahead(drawn_ahead: int, resumable: bool) -> None:
    np.random.seed(3)
    for _ in range(drawn_ahead):
        np.random.randn()
    before = numpy_state()
    assert f"'has_gauss': {drawn_ahead}" in before
    with streams(resumable=resumable):
        np.random.randn()
    assert numpy_state() == before


def test_a_calls_gaussian_drawn_ahead_does_not_leak_into_another() -> None:
    with streams(1):
        np.random.randn()
    with streams(2):
        inside = np.random.randn()
    with streams(2):
        assert np.random.randn() == inside


def test_the_processes_own_bit_generator_object_comes_back() -> None:
    before = numpy_random.get_bit_generator()
    with streams():
        assert numpy_random.get_bit_generator() is not before
    assert numpy_random.get_bit_generator() is before


def test_another_kind_of_bit_generator_of_the_process_comes_back() -> None:
    before = numpy_random.get_bit_generator()
    numpy_random.set_bit_generator(np.random.PCG64(7))
    try:
        expected = np.random.Generator(np.random.PCG64(7)).bit_generator.random_raw(2).tolist()
        drawn = [numpy_random.get_bit_generator().random_raw()]
        with streams():
            assert numpy_random.get_state()[0] == "MT19937"
            np.random.rand()
        drawn.append(numpy_random.get_bit_generator().random_raw())
        assert drawn == expected
    finally:
        numpy_random.set_bit_generator(before)


def test_a_call_may_swap_the_bit_generator_and_the_next_is_seeded_all_the_same() -> None:
    process = process_state()
    with streams(4, process=process):
        expected = np.random.rand()
    with streams(3, process=process):
        numpy_random.set_bit_generator(np.random.PCG64(1))
    with streams(4, process=process):
        assert np.random.rand() == expected


def test_a_call_may_seed_numpy_as_a_script_does() -> None:
    np.random.seed(3)
    expected = np.random.rand()
    with streams():
        np.random.seed(3)
        assert np.random.rand() == expected
        np.random.randn()
        assert np.random.get_state(legacy=False)["has_gauss"] == 1


def test_seeding_of_numpy_refuses_a_build_that_lays_out_its_state_in_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(np.random.MT19937):
        state = property(lambda self: {"state": {"key": np.zeros(624, np.uint32), "pos": 624}})

    monkeypatch.setattr(np.random, "MT19937", Other)
    with pytest.raises(RuntimeError, match="install another version of numpy"):
        Twister()


def test_process_streams_are_set_aside_once_and_given_back() -> None:
    process = process_state()
    random.seed(1)
    expected = random.Random(1).random()
    for seed in (5, 6):
        with scope(process, seed):
            random.random()
    process.streams.give_back()
    assert random.random() == expected
    assert process.streams.aside is None


def test_streams_of_two_open_calls_do_not_share_a_bit_generator() -> None:
    with streams(1):
        pass
    first, second = streams(1, resumable=True), streams(2, resumable=True)
    with first:
        one = numpy_random.get_bit_generator()
    with second:
        other = numpy_random.get_bit_generator()
    assert one is not other
    with first:
        assert numpy_random.get_bit_generator() is one


def test_a_generator_of_the_modern_kind_is_left_alone() -> None:
    generator = np.random.default_rng(3)
    expected = np.random.default_rng(3).random(2).tolist()
    drawn = [generator.random()]
    with streams():
        drawn.append(generator.random())
    assert drawn == expected


def test_generators_within_a_call_differ_from_each_other() -> None:
    with streams():
        drawn = [torch.rand(1, dtype=torch.float64).item(), np.random.rand(), random.random()]
    assert len(set(drawn)) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_calls_gpu_has_separate_random_streams() -> None:
    torch.cuda.manual_seed(1)
    undisturbed = torch.rand(2, device=GPU).tolist()
    torch.cuda.manual_seed(1)
    drawn = torch.rand(1, device=GPU).tolist()
    of_gpu = process_state(GPU)
    own = streams(process=of_gpu, resumable=True)
    inside = []
    for _ in range(2):
        with own:
            inside += torch.rand(1, device=GPU).tolist()
    drawn += torch.rand(1, device=GPU).tolist()
    assert drawn == undisturbed
    again = streams(process=of_gpu, resumable=True)
    repeated = []
    for _ in range(2):
        with again:
            repeated += torch.rand(1, device=GPU).tolist()
    assert inside == repeated
    assert inside[0] != inside[1]


# Seeds.


@pytest.mark.parametrize(
    ("name", "uses_all_bits"), [("torch", False), ("numpy", True), ("numpy_gaussian", True), ("random", True)]
)
def test_all_bits_of_a_seed_count_for_all_generators_but_torchs_own(name: str, uses_all_bits: bool) -> None:
    drawn = []
    for seed in (5, 5 + (7 << 32), 5 + (1 << 62)):
        with streams(seed):
            drawn.append(str(DRAWS[name]()))
    assert len(set(drawn)) == (3 if uses_all_bits else 1)


def test_a_seed_depends_on_everything_that_is_named() -> None:
    names = [
        (1, "client_1", "train", 0),
        (2, "client_1", "train", 0),
        (1, "client_2", "train", 0),
        (1, "client_1", "evaluate", 0),
        (1, "client_1", "train", 1),
        (1, "client_1", "__init__", 0),
        (1, "client_1train", "", 0),
        (1, "client_", "1train", 0),
        (11, "client_1", "train", 0),
    ]
    assert len({call_seed(*name) for name in names}) == len(names)


def test_a_seed_is_the_same_in_every_process_and_fits_every_generator() -> None:
    assert call_seed(0, "client_1", "train_epoch", 0) == 8312596232624596158
    assert all(0 <= call_seed(seed, "x") < 1 << 63 for seed in range(200))
