"""Datasets and their partitions."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from conftest import needs

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.digits import digits
from torchfedrpc.experiments.data.partition import Indices, dirichlet, iid, shards
from torchfedrpc.experiments.data.samples import Samples, TrainTest, stratified_split
from torchfedrpc.experiments.data.synthetic import synthetic

LABELS = np.arange(1000) % 10
PARTITIONS = [iid, dirichlet, shards]


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
