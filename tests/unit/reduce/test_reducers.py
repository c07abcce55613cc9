"""Reducers: their values, dtypes and errors, how exact they are, and that learners' tensors stay their own."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchfedrpc.reduce.reducers import BuiltinReducer, Mean, Sum, WeightedMean, is_builtin
from torchfedrpc.reduce.tree import Forest, merged


def reduced(make: Callable[[], BuiltinReducer], results: Sequence[Any]) -> Any:
    """The value by the tree that a group uses."""
    forest = Forest(make(), len(results))
    for place, result in enumerate(results):
        forest.add(place, result)
    return merged(forest.take(), len(results)).finish()


def update(value: Any, num_samples: Any = 1) -> dict[str, Any]:
    return {"model_weights": value, "num_samples": num_samples}


class Pair(NamedTuple):
    weights: Tensor
    num_samples: int


# Values.


def test_a_weighted_mean_is_that_of_model_weights_by_samples() -> None:
    results = [update({"w": torch.tensor([0.0])}, 30), update({"w": torch.tensor([4.0])}, 10)]
    value = reduced(WeightedMean, results)
    assert torch.equal(value["w"], torch.tensor([1.0]))


def test_a_mean_counts_clients_alike() -> None:
    assert reduced(Mean, [{"loss": 1.0, "accuracy": 0.5}, {"loss": 3.0, "accuracy": 1}]) == {
        "loss": 2.0,
        "accuracy": 0.75,
    }


def test_a_sum_takes_the_whole_result() -> None:
    assert reduced(Sum, [1, 2, 3]) == 6
    assert torch.equal(reduced(Sum, [torch.ones(2), torch.ones(2)]), torch.tensor([2.0, 2.0]))


def test_several_results_may_be_added_to_one_reducer() -> None:
    mean = WeightedMean()
    for value, weight in ((1.0, 1), (2.0, 2), (4.0, 1)):
        mean.add(update(torch.tensor([value]), weight))
    assert mean.finish().item() == 2.25


@pytest.mark.parametrize(
    ("result", "value", "weight"),
    [
        ({"a": torch.tensor([3.0]), "n": 5}, "a", "n"),
        ((torch.tensor([3.0]), 5), 0, 1),
        (Pair(torch.tensor([3.0]), 5), "weights", "num_samples"),
        (SimpleNamespace(a=torch.tensor([3.0]), n=5), "a", "n"),
    ],
)
def test_value_and_weight_are_keys_indices_or_attributes(result: Any, value: Any, weight: Any) -> None:
    assert reduced(lambda: WeightedMean(value, weight), [result, result]).item() == 3.0


def test_structures_are_kept() -> None:
    result = {"state": OrderedDict(a=[torch.ones(2), (1, 2.5)], b={}), 3: np.ones((2, 1), dtype=np.float32)}
    value = reduced(Mean, [result, result, result])
    assert list(value) == ["state", 3]
    assert type(value["state"]["a"]) is list
    assert value["state"]["a"][1] == (1.0, 2.5)
    assert value["state"]["b"] == {}
    assert isinstance(value[3], np.ndarray)
    assert value[3].dtype == np.float32
    assert value[3].shape == (2, 1)


def test_keys_may_come_in_another_order() -> None:
    value = reduced(Sum, [{"a": 1, "b": 10}, {"b": 20, "a": 2}])
    assert list(value.items()) == [("a", 3), ("b", 30)]


@pytest.mark.parametrize(
    "weight", [2, 2.0, np.int64(2), np.float32(2), torch.tensor(2), torch.tensor([2.0]), np.ones(1) * 2]
)
def test_weights_are_numbers_of_any_make(weight: Any) -> None:
    assert reduced(WeightedMean, [update(1.0, weight), update(4.0, 1)]) == 2.0


def test_weights_that_are_ints_stay_exact() -> None:
    huge = 2**60 + 1
    assert reduced(WeightedMean, [update(1, huge), update(0, huge)]) == 0.5
    mean = WeightedMean()
    mean.add(update(1, huge))
    mean.add(update(1, huge))
    assert mean._weight == 2 * huge


def test_a_client_of_weight_zero_does_not_count_whatever_it_returned() -> None:
    nan = torch.tensor([float("nan")])
    assert reduced(WeightedMean, [update(nan, 0), update(torch.ones(1), 2), update(nan, 0)]).item() == 1.0


def test_a_finished_reducer_is_empty() -> None:
    total = Sum()
    total.add(1)
    assert total.finish() == 1
    with pytest.raises(ValueError, match="no result was added"):
        total.finish()


# Dtypes.

FLOATS = [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.complex32, torch.complex64, torch.complex128])
@pytest.mark.parametrize("make", [WeightedMean, lambda: Mean("model_weights"), lambda: Sum("model_weights")])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_the_dtype_is_kept(dtype: torch.dtype, make: Callable[[], BuiltinReducer]) -> None:
    value = reduced(make, [update(torch.tensor([1, 2]).to(dtype)), update(torch.tensor([3, 6]).to(dtype))])
    expected = [4, 8] if isinstance(make(), Sum) else [2, 4]
    assert value.dtype == dtype
    assert value.to(torch.complex128).tolist() == expected


def test_small_floats_are_summed_in_float32() -> None:
    ones = [torch.ones(1, dtype=torch.bfloat16)] * 1000
    assert reduced(Mean, ones).item() == 1.0
    assert reduced(Sum, ones).item() == 1000.0


def test_means_of_integer_tensors_are_rounded_halves_to_even() -> None:
    def mean(*values: int) -> int:
        return int(reduced(Mean, [torch.tensor(value) for value in values]).item())

    assert mean(1, 2, 2) == 2
    assert [mean(0, 1), mean(1, 2), mean(2, 3), mean(-1, -2)] == [0, 2, 2, -2]


def test_a_counter_that_all_clients_share_stays_what_it_is() -> None:
    """With weights that no float has exactly, and numbers of clients of all sizes."""
    for count in (0, 1, 7, 123456789, 2**40 + 1):
        results = [update({"num_batches_tracked": torch.tensor(count)}, 0.1 * (place + 1)) for place in range(37)]
        assert reduced(WeightedMean, results)["num_batches_tracked"].item() == count


def test_booleans_follow_the_majority_of_the_weight_and_sums_any() -> None:
    true, false = torch.tensor([True]), torch.tensor([False])
    assert reduced(WeightedMean, [update(true, 1), update(false, 2)]).tolist() == [False]
    assert reduced(WeightedMean, [update(true, 1), update(false, 1)]).tolist() == [False]
    assert reduced(WeightedMean, [update(true, 2), update(false, 1)]).tolist() == [True]
    assert reduced(Sum, [false, true, true]).tolist() == [True]
    assert reduced(Sum, [false, false]).tolist() == [False]


def test_sums_of_integers_are_exact_or_an_error() -> None:
    large = torch.tensor([2**53 + 1, -1])
    assert reduced(Sum, [large, large, large]).tolist() == [3 * (2**53 + 1), -3]
    assert reduced(Sum, [torch.tensor([127], dtype=torch.int8), torch.tensor([-100], dtype=torch.int8)]).item() == 27
    with pytest.raises(ValueError, match=r"the result\['hits'\] sums up to 300, which does not fit into torch.uint8"):
        reduced(Sum, [{"hits": torch.tensor([200, 0], dtype=torch.uint8)}, {"hits": torch.tensor([100, 0]).byte()}])
    with pytest.raises(ValueError, match="up to -200"):
        reduced(Sum, [torch.tensor([-100], dtype=torch.int8)] * 2)


def test_numbers_are_metrics_their_sums_exact_and_their_means_fractions() -> None:
    assert reduced(Mean, [1, 2]) == 1.5
    assert reduced(Mean, [True, False]) == 0.5
    assert reduced(Sum, [True, True]) == 2
    assert reduced(Sum, [2**70, 1, 0.5]) == 2**70
    assert reduced(Sum, [2**70, 1]) == 2**70 + 1
    assert reduced(Mean, [np.float32(1), np.int64(2)]) == 1.5
    assert reduced(Mean, [1j, 1]) == 0.5 + 0.5j


def test_the_first_client_in_order_gives_dtype_and_layout() -> None:
    value = reduced(Mean, [torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64) * 2])
    assert value.dtype == torch.bfloat16
    assert value.tolist() == [1.5, 1.5]
    images = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert reduced(Mean, [images, images]).is_contiguous(memory_format=torch.channels_last)


def test_empty_scalar_sparse_and_odd_tensors_are_added() -> None:
    odd = {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.0),
        "expanded": torch.ones(1).expand(3),
        "strided": torch.arange(6.0)[::2],
        "conjugated": torch.tensor([1 + 1j]).conj(),
    }
    total = reduced(Sum, [odd, odd])
    weighted = reduced(WeightedMean, [update(odd, 3), update(odd, 1)])
    for name, tensor in odd.items():
        assert torch.equal(total[name], 2 * tensor)
        assert torch.equal(weighted[name], tensor)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_tensors_are_added() -> None:
    left = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, 2.0]), (4,))
    right = torch.sparse_coo_tensor(torch.tensor([[2, 3]]), torch.tensor([4.0, 6.0]), (4,))
    value = reduced(WeightedMean, [update(left, 1), update(right, 3)])
    assert value.to_dense().tolist() == [0.25, 0.0, 3.5, 4.5]
    assert left.to_dense().tolist() == [1.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("make", ["read-only", "reversed", "big-endian", "fortran", "scalar", "bool"])
def test_arrays_of_any_make_are_added(make: str) -> None:
    array = np.arange(6.0).reshape(2, 3)
    made = {
        "reversed": array[::-1],
        "big-endian": array.astype(">f8"),
        "fortran": np.asfortranarray(array),
        "scalar": np.array(2.0),
        "bool": array > 1,
    }.get(make, array)
    made.flags.writeable = make != "read-only"
    value = reduced(Mean, [made, made])
    assert type(value) is np.ndarray
    assert np.array_equal(value, made)
    assert value.shape == made.shape


# By value.


@pytest.mark.parametrize("weight", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_what_learners_return_stays_theirs(weight: int, dtype: torch.dtype) -> None:
    live, array = torch.ones(3).to(dtype), np.ones(3)
    before = live.clone()
    for make in (WeightedMean, lambda: Sum("model_weights")):
        first: Any = make()
        second: Any = make()
        first.add(update({"w": live, "a": array}, weight))
        second.add(update({"w": live, "a": array}, weight))
        first.merge(second)
        assert torch.equal(live, before)
        total = first.finish()
        total["w"].zero_()
        total["a"][:] = 0
        assert torch.equal(live, before)
        assert array.tolist() == [1, 1, 1]


def test_later_changes_of_a_learner_do_not_count() -> None:
    for make, live in ((Mean, torch.ones(3)), (Sum, torch.ones(3)), (Sum, np.ones(3))):
        reducer = make()
        reducer.add(live)
        live[:] = 7
        assert reducer.finish().tolist() == [1, 1, 1]


def test_parameters_become_plain_tensors_without_gradient() -> None:
    module = nn.Linear(2, 1)
    value = reduced(WeightedMean, [update(dict(module.named_parameters()), weight) for weight in (1, 3)])
    assert type(value["weight"]) is Tensor
    assert not value["weight"].requires_grad
    assert value["weight"].grad_fn is None


def test_it_works_in_any_mode_and_gives_ordinary_tensors() -> None:
    with torch.inference_mode():
        mean = Mean()
        mean.add(torch.ones(2))
    mean.add(torch.ones(2, requires_grad=True) * 3)
    value = mean.finish()
    assert not value.is_inference()
    assert not value.requires_grad


# Travel.


def test_a_prototype_has_no_tensors_and_what_was_taken_survives_pickling() -> None:
    assert len(pickle.dumps(WeightedMean())) < 200
    left, right = WeightedMean(), WeightedMean()
    left.add(update({"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3), "a": np.ones(1)}, 1))
    right.add(update({"w": torch.ones(2, dtype=torch.bfloat16) * 3, "n": torch.tensor(3), "a": np.ones(1)}, 3))
    travelled = pickle.loads(pickle.dumps(left))
    travelled.merge(pickle.loads(pickle.dumps(right)))
    value = travelled.finish()
    assert value["w"].tolist() == [2.5, 2.5]
    assert value["w"].dtype == torch.bfloat16
    assert value["n"].item() == 3
    assert isinstance(value["a"], np.ndarray)


def test_only_reducers_of_this_library_are_known_to_copy() -> None:
    class Own(Mean):
        pass

    assert is_builtin(WeightedMean())
    assert is_builtin(Sum())
    assert not is_builtin(Own())


def test_reducers_show_what_they_take() -> None:
    assert repr(WeightedMean()) == "WeightedMean(value='model_weights', weight='num_samples')"
    assert repr(Mean("loss")) == "Mean(value='loss')"


# Errors.


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), 10**400, -0.5])
def test_unusable_weights_are_refused(weight: Any) -> None:
    with pytest.raises(ValueError, match=r"'num_samples' is .* finite and not below 0"):
        WeightedMean().add(update(1.0, weight))


def test_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="'num_samples' is a str"):
        WeightedMean().add(update(1.0, "3"))
    with pytest.raises(TypeError, match="is a complex"):
        WeightedMean().add(update(1.0, 1j))
    with pytest.raises(ValueError, match="'num_samples' has 2 numbers"):
        WeightedMean().add(update(1.0, torch.ones(2)))


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="every 'num_samples' was 0"):
        reduced(WeightedMean, [update(1.0, 0), update(2.0, 0)])


def test_a_missing_key_is_named_with_those_that_are_there() -> None:
    with pytest.raises(ValueError, match="the learner's result has no 'num_samples', only 'model_weights', 'count'"):
        WeightedMean().add({"model_weights": 1.0, "count": 3})
    with pytest.raises(ValueError, match="the learner's result has no 'model_weights', only 'num_samples'"):
        WeightedMean().add({"num_samples": 3})
    with pytest.raises(ValueError, match="the learner's result is a float without 'loss'"):
        Mean("loss").add(1.0)
    with pytest.raises(ValueError, match="has 2 items and none at 2"):
        Mean(2).add((1, 2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "x"}, r"^the result\['name'\] is a str"),
        ({"a": [1, None]}, r"^the result\['a'\]\[1\] is a NoneType"),
        ({"a": np.array(["x"])}, r"^the result\['a'\] is an array of <U1"),
    ],
)
def test_what_cannot_be_added_up_is_named(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Mean().add(value)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantize")
def test_tensors_of_other_layouts_are_named() -> None:
    with pytest.raises(TypeError, match=r"^the result\['a'\] is a torch.sparse_csr tensor"):
        Mean().add({"a": torch.ones(2, 2).to_sparse_csr()})
    with pytest.raises(TypeError, match=r"^the result\['a'\] is a quantised tensor"):
        Mean().add({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)})


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ({"w": 1}, {"w": 1, "b": 1}, "^'model_weights' has in one result only: 'b'"),
        (
            {"w": torch.ones(2)},
            {"w": torch.ones(3)},
            r"^'model_weights'\['w'\] is a tensor of float32 \[2\] in one result and a tensor of float32 \[3\] in",
        ),
        (
            {"w": torch.ones(2)},
            {"w": torch.ones(2).int()},
            r"float32 \[2\] in one result and a tensor of int32 \[2\]",
        ),
        ({"w": torch.ones(2)}, {"w": np.ones(2)}, r"a tensor of float32 \[2\] .* an array of float64 \[2\]"),
        ({"w": torch.ones(())}, {"w": 1.0}, r"a tensor of float32 \[\] in one result and a number in another"),
        ({"w": [1, 2]}, {"w": [1]}, r"^'model_weights'\['w'\] has 2 items in one result and 1 in another"),
        ({"w": [1]}, {"w": (1,)}, r"^'model_weights'\['w'\] is a list in one result and a tuple in another"),
        ({"w": [1]}, {"w": 1}, r"^'model_weights'\['w'\] is a list in one result and a number in another"),
    ],
)
def test_values_that_do_not_match_are_refused_and_nothing_is_taken(left: Any, right: Any, message: str) -> None:
    mean, other = WeightedMean(), WeightedMean()
    mean.add(update({"a": torch.ones(1), **left}))
    with pytest.raises(ValueError, match=message):
        mean.add(update({"a": torch.zeros(1), **right}))
    other.add(update({"a": torch.zeros(1), **right}))
    with pytest.raises(ValueError, match=message):
        mean.merge(other)
    assert mean.finish()["a"].item() == 1.0


# How exact, to a reference of more bits, in ulps (eps) relative to the mean of the magnitudes.

SIZE = 2000


def updates(kind: str, num_clients: int, seed: int = 0) -> list[np.ndarray]:
    """Values of the clients, as float64 [num_clients, SIZE]."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((num_clients, SIZE))
    if kind == "cancelling":  # what is left of the sum is smaller than a value by 1e6
        half = num_clients // 2
        values[half : 2 * half] = -values[:half] * (1 + 1e-6 * random.standard_normal((half, SIZE)))
    elif kind == "dominated":  # each merge towards the largest rounds to its ulp
        values[0] = 1 + random.random(SIZE)
        values[1:] *= 1e-4
    elif kind == "same sign":
        values = np.abs(values)
    return list(values)


def error_in_ulps(values: Sequence[Tensor], weights: Sequence[float]) -> float:
    dtype = values[0].dtype
    mean = reduced(WeightedMean, [update(value, weight) for value, weight in zip(values, weights, strict=True)])
    exact: Any = np.longdouble if dtype == torch.float64 else np.float64
    scale = np.array(weights, dtype=exact)[:, None]
    terms = np.stack([value.to(torch.float64).numpy() for value in values]).astype(exact) * scale
    reference, magnitude = terms.sum(0) / scale.sum(), np.abs(terms).sum(0) / scale.sum()
    error = np.abs(mean.to(torch.float64).numpy().astype(exact) - reference)
    return float((error / magnitude).max()) / torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["normal", "cancelling", "dominated", "same sign"])
@pytest.mark.parametrize("num_clients", [1, 2, 3, 7, 20, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_weighted_mean_is_within_4_ulp_of_its_magnitudes(dtype: torch.dtype, num_clients: int, kind: str) -> None:
    values = [torch.from_numpy(value).to(dtype) for value in updates(kind, num_clients)]
    random = np.random.default_rng(1)
    for weights in (random.integers(1, 1000, num_clients).tolist(), random.random(num_clients).tolist()):
        assert error_in_ulps(values, weights) < 4


@pytest.mark.parametrize("kind", ["cancelling", "dominated"])
def test_thousands_of_clients_are_within_4_ulp_too(kind: str) -> None:
    values = [torch.from_numpy(value).float() for value in updates(kind, 5000)]
    assert error_in_ulps(values, np.random.default_rng(1).integers(1, 1000, 5000).tolist()) < 4


def test_roundings_that_all_err_alike_are_within_4_ulp() -> None:
    """Each sum on the way of the largest value loses just under half an ulp: 6 ulp, were it all in float32."""
    spread = [torch.zeros(1) for _ in range(4096)]
    spread[0] = torch.ones(1)
    for level in range(12):
        spread[1 << level] = torch.full((1,), 2.0**-24 * 0.999)
    assert error_in_ulps(spread, [1] * 4096) < 4
    assert error_in_ulps(spread, [2**30 + place for place in range(4096)]) < 4


def test_large_sums_are_kept_in_float64_from_the_same_client_on() -> None:
    for num_clients, dtype in ((32, torch.float32), (33, torch.float64)):
        mean = Mean()
        forest = Forest(mean, num_clients)
        for place in range(num_clients):
            forest.add(place, torch.ones(1, dtype=torch.bfloat16))
        [(_, _, reducer)] = forest.take()
        assert isinstance(reducer, Mean)
        assert reducer._entries.total.dtype == dtype


def test_a_sum_is_as_exact() -> None:
    values = [torch.from_numpy(value).float() for value in updates("cancelling", 200)]
    error = (reduced(Sum, values).double() - torch.stack(values).double().sum(0)).abs()
    magnitude = torch.stack(values).double().abs().sum(0)
    assert (error / magnitude).max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("num_threads", [1, 4])
def test_the_bits_do_not_depend_on_threads_or_strides(num_threads: int) -> None:
    values = [torch.from_numpy(value).float().repeat(50) for value in updates("cancelling", 9)]
    weights = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    expected = reduced(WeightedMean, [update(value, weight) for value, weight in zip(values, weights, strict=True)])
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        strided = [torch.stack([value, value], dim=1)[:, 0] for value in values]
        value = reduced(WeightedMean, [update(value, weight) for value, weight in zip(strided, weights, strict=True)])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(value, expected)


def test_not_a_number_and_infinity_pass_on() -> None:
    value = reduced(Mean, [torch.tensor([math.inf, math.nan, -math.inf]), torch.tensor([math.inf, 1.0, 1.0])])
    assert value[0] == math.inf
    assert value[1].isnan()
    assert value[2] == -math.inf
