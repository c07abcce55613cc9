"""Datasets and their partitions."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.digits import digits
from torchfedrpc.experiments.data.partition import Indices, dirichlet, iid, natural, quantity, shards
from torchfedrpc.experiments.data.samples import Samples, TrainTest, stratified_split
from torchfedrpc.experiments.data.synthetic import synthetic

LABELS = np.arange(1000) % 10
PARTITIONS = [iid, dirichlet, shards, quantity]


def _is_equal(one: TrainTest, other: TrainTest) -> bool:
    return all(
        torch.equal(mine, others)
        for mine, others in (
            (one.train.inputs, other.train.inputs),
            (one.train.labels, other.train.labels),
            (one.test.inputs, other.test.inputs),
            (one.test.labels, other.test.labels),
        )
    )


def _num_classes(part: Indices) -> int:
    return len(np.unique(LABELS[part]))


def test_digits_are_1797_images_in_the_range_of_one() -> None:
    needs("sklearn")
    data = digits()
    assert len(data.train) + len(data.test) == 1797
    assert data.train.inputs.shape[1:] == (1, 8, 8)
    assert data.train.inputs.dtype == torch.float32
    assert data.train.labels.dtype == torch.int64
    assert (data.train.inputs.min().item(), data.train.inputs.max().item()) == (-1.0, 1.0)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r"dataset=synthetic.*pip install 'torchfedrpc\[experiments\]'"):
        digits()


def test_synthetic_images_fit_the_models_of_the_digits() -> None:
    data = synthetic()
    assert data.train.inputs.shape == (1600, 1, 8, 8)
    assert data.test.inputs.shape == (400, 1, 8, 8)
    assert data.train.labels.unique().tolist() == list(range(10))


def test_synthetic_images_follow_the_seed_and_nothing_else() -> None:
    first = synthetic(seed=5)
    torch.rand(1)
    assert _is_equal(first, synthetic(seed=5))
    assert not _is_equal(first, synthetic(seed=6))


def test_the_nearest_pattern_tells_the_class_of_a_synthetic_image() -> None:
    data = synthetic(noise=0.5)
    means = torch.stack([data.train.inputs[data.train.labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(data.test.inputs.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == data.test.labels).float().mean() > 0.99


def test_the_split_holds_out_a_share_of_every_class() -> None:
    samples = Samples(torch.arange(100.0).unsqueeze(1), torch.tensor([0] * 80 + [1] * 20))
    data = stratified_split(samples, test_fraction=0.25, seed=0)
    assert torch.bincount(data.test.labels).tolist() == [20, 5]
    seen = torch.cat([data.train.inputs, data.test.inputs]).flatten().sort().values
    assert torch.equal(seen, torch.arange(100.0))


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1e-6])
def test_a_split_with_an_empty_side_is_refused(fraction: float) -> None:
    samples = Samples(torch.zeros(20, 1), torch.zeros(20, dtype=torch.int64))
    with pytest.raises(ConfigError, match="test_fraction"):
        stratified_split(samples, test_fraction=fraction, seed=0)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_partition_names_every_sample_once(partition) -> None:  # type: ignore[no-untyped-def]
    parts = partition(LABELS, 10, seed=1)
    assert len(parts) == 10
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_partition_follows_the_seed(partition) -> None:  # type: ignore[no-untyped-def]
    def is_equal(seed: int, other: int) -> bool:
        pairs = zip(partition(LABELS, 10, seed=seed), partition(LABELS, 10, seed=other), strict=True)
        return all(np.array_equal(one, two) for one, two in pairs)

    assert is_equal(1, 1)
    assert not is_equal(1, 2)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_more_clients_than_samples_are_refused(partition) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="too few"):
        partition(LABELS, 1001)


@pytest.mark.parametrize(
    ("partition", "settings", "setting"),
    [
        (dirichlet, {"min_samples": 101}, "min_samples"),
        (quantity, {"min_samples": 101}, "min_samples"),
        (shards, {"shards_per_client": 101}, "shards_per_client"),
    ],
)
def test_too_large_a_minimum_is_named(partition: Any, settings: dict[str, int], setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"by runtime\.num_clients, or lower partition\.{setting}$"):
        partition(LABELS, 10, **settings)


def test_iid_clients_are_equally_large() -> None:
    assert {len(part) for part in iid(LABELS, 7)} == {142, 143}


def test_a_small_alpha_skews_more() -> None:
    def num_classes(alpha: float) -> float:
        parts = dirichlet(LABELS, 10, alpha=alpha, seed=0)
        return float(np.mean([_num_classes(part) for part in parts]))

    assert num_classes(0.05) < 5 < num_classes(0.5) < num_classes(100.0) == 10


@pytest.mark.parametrize("seed", range(5))
def test_dirichlet_leaves_no_client_below_the_minimum(seed: int) -> None:
    parts = dirichlet(LABELS, 50, alpha=0.01, min_samples=20, seed=seed)
    assert {len(part) for part in parts} == {20}


def test_dirichlet_refuses_an_alpha_of_zero() -> None:
    with pytest.raises(ConfigError, match="alpha"):
        dirichlet(LABELS, 10, alpha=0.0)


def test_shards_give_a_client_few_classes() -> None:
    assert max(_num_classes(part) for part in shards(LABELS, 50, shards_per_client=2)) <= 4


@st.composite
def divisions(draw: st.DrawFn) -> tuple[Indices, Indices, int, int]:
    """Labels, groups, number of clients (no more than groups), and seed."""
    num_samples = draw(st.integers(1, 300))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = generator.integers(draw(st.integers(1, 12)), size=num_samples)
    groups = generator.integers(draw(st.integers(1, 40)), size=num_samples)
    return labels, groups, draw(st.integers(1, len(np.unique(groups)))), draw(st.integers(0, 1000))


@settings(max_examples=100, deadline=None)
@given(divisions(), st.sampled_from([0.01, 0.5, 100.0]), st.sampled_from(["dirichlet", "power"]))
def test_partitions_deal_every_sample_once_with_the_minimum_and_by_the_seed(
    division: tuple[Indices, Indices, int, int], alpha: float, law: str
) -> None:
    labels, groups, num_clients, seed = division
    least = len(labels) // num_clients // 2 or 1
    num_shards = len(labels) // num_clients

    def divided() -> list[tuple[int, list[Indices]]]:
        return [
            (len(labels) // num_clients, iid(labels, num_clients, seed=seed)),
            (least, dirichlet(labels, num_clients, alpha=alpha, min_samples=least, seed=seed)),
            (num_shards, shards(labels, num_clients, shards_per_client=num_shards, seed=seed)),
            (least, quantity(labels, num_clients, law=law, alpha=alpha, exponent=4, min_samples=least, seed=seed)),
            (1, natural(labels, num_clients, groups, several_groups=True, seed=seed)),
        ]

    for (min_samples, parts), (_, again) in zip(divided(), divided(), strict=True):
        assert len(parts) == num_clients
        assert min(map(len, parts)) >= min_samples
        assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
        assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@settings(max_examples=100, deadline=None)
@given(divisions(), st.sampled_from(["dirichlet", "power"]))
def test_quantity_gives_all_clients_the_same_mixture(division: tuple[Indices, Indices, int, int], law: str) -> None:
    labels, _, num_clients, seed = division
    of_class = np.bincount(labels, minlength=12)
    num_classes = np.count_nonzero(of_class)
    for part in quantity(labels, num_clients, law=law, min_samples=1, seed=seed):
        expected = of_class * len(part) / len(labels)
        bound = 2 + 2 * num_classes * of_class / len(labels)
        assert np.all(np.abs(np.bincount(labels[part], minlength=12) - expected) <= bound)


def test_quantity_sizes_follow_their_law() -> None:
    labels = np.arange(10000) % 10

    def sizes(**settings: Any) -> list[int]:
        return sorted((len(part) for part in quantity(labels, 10, **settings)), reverse=True)

    assert max(sizes(alpha=0.1)) > 2 * max(sizes(alpha=100.0)) > 2 * 1000
    assert set(sizes(law="power", exponent=0.0)) == {1000}
    largest, second, *_ = sizes(law="power", exponent=1.0, min_samples=1)
    assert largest == pytest.approx(2 * second, abs=2)
    assert sizes(law="power", exponent=50.0, min_samples=100) == [9100, *[100] * 9]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"law": "pwoer"}, r"partition\.law=pwoer is unknown \(did you mean 'power'\?\)"),
        ({"alpha": float("nan")}, "partition.alpha must be above 0 and finite, it is nan"),
        ({"law": "power", "exponent": -1.0}, r"partition\.exponent must be 0 or above, it is -1\.0"),
        ({"min_samples": 101}, "too few for 10 clients with at least 101 each"),
    ],
)
def test_quantity_refuses_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantity(LABELS, 10, **settings)


GROUPS = np.arange(1000) * 7 % 20  # of 50 samples each


def test_a_natural_client_has_one_group_in_the_order_of_their_numbers() -> None:
    for client, part in enumerate(natural(LABELS, 20, GROUPS * 1000)):
        assert np.array_equal(part, np.flatnonzero(client == GROUPS))


def test_natural_clients_with_several_groups_have_whole_ones() -> None:
    parts = natural(LABELS, 6, GROUPS, several_groups=True, seed=3)
    held = [set(GROUPS[part]) for part in parts]
    assert sorted(map(len, held)) == [3, 3, 3, 3, 4, 4]
    assert sorted(group for groups in held for group in groups) == list(range(20))
    assert held != [set(GROUPS[part]) for part in natural(LABELS, 6, GROUPS, several_groups=True, seed=4)]


@pytest.mark.parametrize(
    ("num_clients", "groups", "message"),
    [
        (20, None, "this dataset has none: use one with groups"),
        (
            10,
            GROUPS,
            r"20 groups, and there are 10 clients: set runtime\.num_clients=20, or partition\.several",
        ),
        (30, GROUPS, r"20 groups, too few for 30 clients: set runtime\.num_clients=20, or fewer"),
        (20, GROUPS[1:], "there are 999 groups for 1000 labels"),
    ],
)
def test_groups_that_do_not_fit_the_clients_name_the_setting(
    num_clients: int, groups: Indices | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        natural(LABELS, num_clients, groups)


def test_samples_carry_their_groups() -> None:
    samples = Samples(torch.zeros(40, 2), torch.arange(40) % 4, torch.arange(40) % 10)
    taken = samples.take(torch.tensor([12, 3])).to(torch.device("cpu"))
    assert taken.groups is not None
    assert taken.groups.tolist() == [2, 3]
    split = stratified_split(samples, test_fraction=0.5, seed=0)
    assert split.test.groups is not None
    assert torch.equal(split.test.groups % 2, split.test.labels % 2)
    assert Samples(torch.zeros(4, 2), torch.zeros(4)).take(torch.tensor([1])).to(torch.device("cpu")).groups is None
