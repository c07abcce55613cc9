"""The tree of additions: the same brackets whoever adds what when, in little memory, and errors that name places."""

from __future__ import annotations

import itertools
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from torchfedrpc.reduce.reducers import Mean, Reducer, WeightedMean
from torchfedrpc.reduce.tree import Forest, MergeError, Node, covered, fold, merged, prototype_of


class Brackets:
    """A reducer whose value is how it came about."""

    def __init__(self) -> None:
        self.text = ""

    def add(self, result: str) -> None:
        assert not self.text, "a leaf is made of a fresh copy"
        self.text = result

    def merge(self, other: Brackets) -> None:
        assert other.text, "empty parts are not merged"
        self.text, other.text = f"({self.text}+{other.text})", ""

    def finish(self) -> str:
        return self.text


def expected(places: Iterable[int]) -> str:
    """The brackets by the definition of the tree."""

    def node(level: int, index: int, inside: list[int]) -> str:
        if len(inside) == 0:
            return ""
        if level == 0:
            return str(inside[0])
        middle = (2 * index + 1) << (level - 1)
        left = node(level - 1, 2 * index, [place for place in inside if place < middle])
        right = node(level - 1, 2 * index + 1, [place for place in inside if place >= middle])
        return f"({left}+{right})" if left and right else left + right

    inside = sorted(places)
    return node(20, 0, inside)


def run(
    num_places: int,
    order: Sequence[int],
    owner: Callable[[int], int],
    *,
    order_of_workers: Sequence[int] = (0, 1, 2, 3),
) -> str:
    """A reduce over workers: in that order of completion, then collected and put together on the driver."""
    workers = [Forest(Brackets(), num_places) for _ in order_of_workers]
    for place in order:
        workers[owner(place)].add(place, str(place))
    nodes: list[Node] = []
    for number in order_of_workers:
        nodes += workers[number].take()
        assert len(workers[number]) == 0
    counted = [place for level, index, _ in nodes for place in covered(level, index, num_places)]
    assert sorted(counted) == sorted(order)
    value: str = merged(nodes, num_places).finish()
    return value


# The same brackets.


@pytest.mark.parametrize("num_places", [1, 2, 3, 4, 5])
def test_the_brackets_are_the_same_for_each_order_and_each_owner(num_places: int) -> None:
    places = range(num_places)
    for order in itertools.permutations(places):
        for owners in itertools.product(range(2), repeat=num_places):
            assert run(num_places, order, owners.__getitem__) == expected(places)


@pytest.mark.parametrize("num_places", [2, 3, 4, 5, 7])
def test_the_brackets_are_the_same_with_clients_that_fail(num_places: int) -> None:
    places = range(num_places)
    for num_failed in range(1, num_places):
        for failed in itertools.combinations(places, num_failed):
            left = [place for place in places if place not in failed]
            for order in list(itertools.permutations(left))[:24]:
                for num_workers in (1, 2, 3):
                    assert run(num_places, order, lambda place: place % num_workers) == expected(left)  # noqa: B023


def test_brackets_of_small_trees_are_what_they_were() -> None:
    """Written out, since a change of the tree changes the bits of everybody's runs."""
    assert expected(range(5)) == "(((0+1)+(2+3))+4)"
    assert expected([1, 2, 3, 6]) == "((1+(2+3))+6)"
    assert run(7, [1, 2, 3, 6], lambda place: 0) == "((1+(2+3))+6)"
    assert run(7, range(7), lambda place: 0) == "(((0+1)+(2+3))+((4+5)+6))"


@pytest.mark.parametrize("seed", range(40))
def test_the_brackets_are_the_same_in_large_runs(seed: int) -> None:
    chance = random.Random(seed)
    num_all = chance.choice([50, 1000, 100_000])
    count = chance.choice([num_all, num_all - 1, chance.randint(1, num_all)]) if num_all <= 1000 else 300
    places = sorted(chance.sample(range(num_all), count))
    num_workers = chance.randint(1, 4)
    scattered = {place: chance.randrange(num_workers) for place in places}
    contiguous = {place: rank * num_workers // len(places) for rank, place in enumerate(places)}
    order = chance.sample(places, len(places))
    for owners in (scattered, contiguous):
        workers = list(range(4))
        chance.shuffle(workers)
        assert run(num_all, order, owners.__getitem__, order_of_workers=workers) == expected(places)


@pytest.mark.parametrize("num_threads", [2, 8])
def test_the_brackets_are_the_same_from_many_threads(num_threads: int) -> None:
    class Slow(Brackets):
        def merge(self, other: Brackets) -> None:
            time.sleep(0)
            super().merge(other)

    places = range(200)
    for seed in range(5):
        order = random.Random(seed).sample(places, len(places))
        forest = Forest(Slow(), 200)
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(forest.add, order, map(str, order)))
        assert merged(forest.take(), 200).finish() == expected(places)


def test_nodes_are_merged_outside_of_the_lock() -> None:
    """Two merges are under way at once, and a leaf comes in meanwhile."""
    both = threading.Barrier(3, timeout=10)
    go_on = threading.Event()

    class Meeting(Brackets):
        def merge(self, other: Brackets) -> None:
            if len(self.text) == 1:
                both.wait()
                assert go_on.wait(10)
            super().merge(other)

    forest = Forest(Meeting(), 5)
    forest.add(0, "0")
    forest.add(2, "2")
    with ThreadPoolExecutor(3) as pool:
        adding = [pool.submit(forest.add, place, str(place)) for place in (1, 3)]
        both.wait()
        forest.add(4, "4")
        taking = pool.submit(forest.take)
        assert not taking.done()
        go_on.set()
        for future in adding:
            future.result(10)
        [(level, index, reducer)] = taking.result(10)
    assert (level, index) == (3, 0)
    assert reducer.finish() == expected(range(5))


def test_a_learner_that_moved_is_added_where_it_is_rebuilt() -> None:
    """Worker 1 is lost with what it had; its clients run again on worker 0, which was collected from before."""
    workers = [Forest(Brackets(), 8) for _ in range(2)]
    for place in (0, 1, 2, 5):
        workers[0].add(place, str(place))
    for place in (3, 4):
        workers[1].add(place, str(place))
    first = workers[0].take()
    for place in (7, 4, 6, 3):
        workers[0].add(place, str(place))
    nodes = workers[0].take()
    assert [(level, index) for level, index, _ in nodes] == [(0, 3), (0, 4), (1, 3)]
    assert merged([*reversed(nodes), *first], 8).finish() == expected(range(8))


def test_a_forest_that_was_taken_from_begins_anew() -> None:
    forest = Forest(Brackets(), 2)
    for _ in range(2):
        forest.add(0, "0")
        forest.add(1, "1")
        assert [reducer.finish() for _, _, reducer in forest.take()] == ["(0+1)"]
        assert forest.take() == []


# Memory and time.


@pytest.mark.parametrize("num_places", [64, 100, 1000])
def test_neighbours_in_order_hold_few_reducers(num_places: int) -> None:
    forest = Forest(Brackets(), num_places)
    most = 0
    for place in range(num_places):
        forest.add(place, "x")
        most = max(most, len(forest))
    assert most <= num_places.bit_length()
    assert len(forest) == 1


@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_workers_of_neighbours_send_few_nodes(num_workers: int) -> None:
    for worker in range(num_workers):
        own = range(worker * 1000 // num_workers, (worker + 1) * 1000 // num_workers)
        forest = Forest(Brackets(), 1000)
        for place in own:
            forest.add(place, "x")
        nodes = forest.take()
        assert sum(len(covered(level, index, 1000)) for level, index, _ in nodes) == len(own)
        assert len(nodes) <= 2 * (1000).bit_length()


def test_a_thousand_of_a_hundred_thousand_places_are_quick() -> None:
    places = random.Random(0).sample(range(100_000), 1000)
    forest = Forest(Mean(), 100_000)
    began = time.perf_counter()
    for place in places:
        forest.add(place, 1.0)
    assert merged(forest.take(), 100_000).finish() == 1.0
    assert time.perf_counter() - began < 2  # 0.05 s here


# What reducers are given.


def test_the_last_merge_leaves_its_sums_to_the_end_of_the_reduction() -> None:
    """Sums in float64 then exist one at a time."""
    forests = [Forest(Mean(), 4) for _ in range(3)]
    for place in range(4):
        forests[max(place - 1, 0)].add(place, torch.full((2,), float(place)))
    nodes = [node for forest in forests for node in forest.take()]
    root: Any = merged(nodes, 4)
    assert root._entries.last is not None
    assert root._entries.last[0].last is None  # that of places 2 and 3
    assert root.finish().tolist() == [1.5, 1.5]


def test_the_prototype_is_left_alone() -> None:
    prototype = WeightedMean()
    forest = Forest(prototype, 2)
    for place in range(2):
        forest.add(place, {"model_weights": torch.ones(1), "num_samples": 2})
    merged(forest.take(), 2).finish()
    with pytest.raises(ValueError, match="no mean"):
        prototype.finish()


def test_tensors_come_to_the_same_bits_on_any_workers() -> None:
    generator = torch.Generator().manual_seed(0)
    places = sorted(random.Random(0).sample(range(500), 40))
    results = {
        place: {
            "model_weights": {
                "w": torch.randn(100, generator=generator) * 10.0 ** (place % 7) * (-1) ** place,
                "half": torch.randn(10, generator=generator).bfloat16(),
                "num_batches_tracked": torch.tensor(place),
            },
            "num_samples": place + 1,
        }
        for place in places
    }
    values = []
    for num_workers in (1, 2, 3, 4):
        workers = [Forest(WeightedMean(), 500) for _ in range(num_workers)]
        for place in random.Random(num_workers).sample(places, len(places)):
            workers[place % num_workers].add(place, results[place])
        nodes = [node for worker in workers[::-1] for node in pickle.loads(pickle.dumps(worker.take()))]
        values.append(merged(nodes, 500).finish())
    for value in values[1:]:
        assert all(torch.equal(value[name], values[0][name]) for name in values[0])


# Errors.


def test_a_result_that_cannot_be_added_may_be_added_later() -> None:
    forest = Forest(Mean("loss"), 2)
    with pytest.raises(ValueError, match="no 'loss'"):
        forest.add(0, {})
    assert forest.take() == []
    forest.add(0, {"loss": 1.0})
    assert merged(forest.take(), 2).finish() == 1.0


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_parts_that_do_not_match_name_a_client_of_each(order: Sequence[int]) -> None:
    results = [torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(3)]
    forest = Forest(Mean(), 4)

    def add_all() -> None:
        for place in order:
            forest.add(place, results[place])

    with pytest.raises(MergeError, match="do not go together: the result is a tensor of float32") as caught:
        add_all()
    assert caught.value.places == (2, 3)
    assert isinstance(caught.value.__cause__, ValueError)
    for step in (lambda: forest.add(3, torch.ones(2)), forest.take):
        with pytest.raises(MergeError):
            step()


def test_a_node_that_does_not_match_names_clients_that_count() -> None:
    workers = [Forest(Mean(), 8) for _ in range(2)]
    for place in (1, 2, 3, 5, 6, 7):
        workers[place // 4].add(place, torch.ones(2 if place < 4 else 3))
    with pytest.raises(MergeError) as caught:
        merged([*workers[1].take(), *workers[0].take()], 8)
    assert caught.value.places == (1, 5)
    assert isinstance(caught.value.__cause__, ValueError)
    assert pickle.loads(pickle.dumps(caught.value)).places == (1, 5)


def test_a_merge_that_is_interrupted_is_no_silent_loss() -> None:
    class Interrupted(Brackets):
        def merge(self, other: Brackets) -> None:
            raise KeyboardInterrupt

    forest = Forest(Interrupted(), 2)
    forest.add(0, "0")
    with pytest.raises(KeyboardInterrupt):
        forest.add(1, "1")
    with pytest.raises(MergeError):
        forest.take()


def test_places_are_added_once() -> None:
    forest = Forest(Brackets(), 4)
    for place in (1, 2, 3):
        forest.add(place, str(place))
        for other in range(1, place + 1):
            with pytest.raises(ValueError, match=f"the client at {other} was added before"):
                forest.add(other, "again")
    assert merged(forest.take(), 4).finish() == "(1+(2+3))"


def test_a_node_covers_the_places_that_there_are() -> None:
    assert [*covered(0, 2, 5)] == [2]
    assert [*covered(1, 1, 5)] == [2, 3]
    assert [*covered(2, 1, 5)] == [4]
    assert [*covered(3, 0, 5)] == [0, 1, 2, 3, 4]
    for level, index in ((4, 0), (-1, 0), (0, 5), (0, -1), (1, 3)):
        assert not covered(level, index, 5)


# Over what is at hand.


@pytest.mark.parametrize("num_parts", range(1, 40))
def test_a_fold_has_the_same_brackets(num_parts: int) -> None:
    chance = random.Random(num_parts)
    counted = [place for place in range(num_parts) if chance.random() < 0.8]
    parts = [str(place) if place in counted else None for place in range(num_parts)]
    assert fold(parts, lambda left, right: f"({left}+{right})") == (expected(counted) or None)


def test_a_fold_of_nothing_is_none() -> None:
    assert fold([], max) is None


# Which reducers will do.


def test_a_class_stands_for_an_object_of_it() -> None:
    reducer: Reducer = prototype_of(Brackets)
    assert isinstance(reducer, Brackets)
    ready = Mean()
    assert prototype_of(ready) is ready


def test_a_reducer_that_lacks_methods_is_refused() -> None:
    class Half:
        def add(self, result: Any) -> None: ...

    with pytest.raises(TypeError, match="lacks merge, finish"):
        prototype_of(Half())
