"""By value, both ways: no side sees the other's later changes, and what arrives is what was sent."""

from __future__ import annotations

import asyncio
import enum
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Fresh
from learners import Batch, Tagged
from torch import Tensor, nn
from values import ARRAYS, DENSE, DTYPES, PLAIN, QUANTISED, SPARSE_LAYOUTS, VIEWS, of_dtype, of_layout

import torchfedrpc as tfr


class Colour(enum.Enum):
    """Of this module, which no run trusts."""

    RED = 1


def bits(tensor: Tensor) -> Tensor:
    """A dense tensor's memory, for comparison whatever its dtype."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(bits(first), bits(second))


# Neither side sees later changes.


@pytest.mark.parametrize("method", ["keep", "set_model_weights"])
async def test_a_change_by_the_caller_is_not_seen_by_the_learner(
    proxy: tfr.LearnerProxy, one: str, method: str
) -> None:
    weights: dict[str, Any] = {"w": torch.zeros(1000), "n": np.zeros(1000)}
    await proxy.custom_method(one, method, weights)
    weights["w"] += 1
    weights["n"] += 1
    kept = await proxy.custom_method(one, "live")
    assert kept["w"].sum() == 0
    assert kept["n"].sum() == 0


async def test_a_change_by_the_learner_is_not_seen_by_the_caller(proxy: tfr.LearnerProxy, one: str) -> None:
    arguments: list[Any] = [torch.zeros(1000), np.zeros(1000), np.zeros(3), [1], {}]
    for argument in arguments:
        before = repr(argument)
        await proxy.custom_method(one, "scribble", argument)
        assert repr(argument) == before


async def test_a_live_state_dict_is_a_copy_once_it_is_returned(proxy: tfr.LearnerProxy, one: str) -> None:
    await proxy.custom_method(one, "build_model")
    first = await proxy.custom_method(one, "live_state_dict")
    before = {name: tensor.clone() for name, tensor in first.items()}
    await proxy.custom_method(one, "step_model")
    second = await proxy.custom_method(one, "live_state_dict")
    for name, tensor in before.items():
        assert torch.equal(first[name], tensor)
        assert torch.equal(second[name], tensor + 1)
        first[name] += 100
    third = await proxy.custom_method(one, "live_state_dict")
    assert all(torch.equal(third[name], second[name]) for name in second)


async def test_a_live_state_dict_is_taken_before_the_next_call_changes_it(proxy: tfr.LearnerProxy, one: str) -> None:
    await proxy.custom_method(one, "keep", {"w": torch.zeros(200_000)})
    calls = []
    for _ in range(10):
        calls += [proxy.custom_method(one, "live"), proxy.custom_method(one, "add_to_kept", 1.0)]
    results = (await asyncio.gather(*calls))[::2]
    assert [result["w"].unique().tolist() for result in results] == [[float(number)] for number in range(10)]


@pytest.mark.parametrize("alias", ["tensor", "numpy"])
async def test_a_change_right_after_submission_is_not_seen(proxy: tfr.LearnerProxy, one: str, alias: str) -> None:
    array = np.zeros(300_000, dtype=np.float32)
    tensor = torch.from_numpy(array)
    calls = []
    for number in range(10):
        calls.append(asyncio.ensure_future(proxy.custom_method(one, "same", tensor)))
        await asyncio.sleep(0)  # submitted
        if alias == "tensor":
            tensor.fill_(number + 1)
        else:
            array[:] = number + 1
    results = await asyncio.gather(*calls)
    assert [result.unique().tolist() for result in results] == [[float(number)] for number in range(10)]


async def test_calls_of_one_tick_each_have_memory_of_their_own(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids, weights = fresh.together(3), {"w": torch.zeros(100_000)}
    await asyncio.gather(*(proxy.set_model_weights(one, weights) for one in ids))
    await proxy.custom_method(ids[0], "add_to_kept", 5.0)
    kept = await asyncio.gather(*(proxy.get_model_weights(one) for one in ids))
    assert [value["w"].unique().tolist() for value in kept] == [[5.0], [0.0], [0.0]]
    assert weights["w"].sum() == 0


async def test_results_of_one_tick_each_have_memory_of_their_own(proxy: tfr.LearnerProxy, one: str) -> None:
    await proxy.custom_method(one, "keep", {"w": torch.zeros(100)})
    first, second = await asyncio.gather(*(proxy.custom_method(one, "live") for _ in range(2)))
    first["w"] += 1
    assert second["w"].sum() == 0


async def test_a_groups_clients_each_have_memory_of_their_own(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids, weights = fresh.together(3), torch.zeros(100)
    await proxy.clients(ids).call("scribble", weights)
    await proxy.clients(ids).call("keep", weights)
    await proxy.clients(ids[:1]).call("add_to_kept", 1.0)
    kept = await proxy.clients(ids).call("live")
    assert [value.sum().item() for value in kept.values()] == [100, 0, 0]


# Tensors arrive as they were.


@pytest.mark.parametrize("name", DTYPES)
async def test_every_dtype_keeps_its_bits_both_ways(proxy: tfr.LearnerProxy, one: str, name: str) -> None:
    dtype = DTYPES[name]
    tensor = of_dtype(dtype)
    argument = await proxy.custom_method(one, "describe", tensor)
    assert argument["dtype"] == str(dtype)
    assert argument["shape"] == (2, 3)
    assert same_bits(await proxy.custom_method(one, "same", tensor), tensor)
    for odd in (tensor[0, 0], tensor[:, 1:], tensor.t(), tensor[:0]):  # 0-d, with gaps, transposed, empty
        back = await proxy.custom_method(one, "same", odd)
        assert same_bits(back, odd)


@pytest.mark.parametrize("name", DENSE)
async def test_dense_strides_are_kept_both_ways(proxy: tfr.LearnerProxy, one: str, name: str) -> None:
    tensor = DENSE[name]
    argument = await proxy.custom_method(one, "describe", tensor)
    assert argument["shape"] == tuple(tensor.shape)
    assert argument["stride"] == tensor.stride()
    back = await proxy.custom_method(one, "same", tensor)
    assert same_bits(back, tensor)
    assert back.stride() == tensor.stride()


@pytest.mark.parametrize("name", VIEWS)
async def test_views_keep_their_values_and_bring_no_more_than_they_need(
    proxy: tfr.LearnerProxy, one: str, name: str
) -> None:
    tensor = VIEWS[name]
    back = await proxy.custom_method(one, "same", tensor)
    assert same_bits(back, tensor)
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    spanned_bytes = (last + 1) * tensor.itemsize
    assert back.untyped_storage().nbytes() < spanned_bytes + 64  # it begins as far into an aligned line as before


async def test_a_small_view_of_a_large_storage_does_not_bring_the_storage(proxy: tfr.LearnerProxy, one: str) -> None:
    before = proxy.stats()["bytes_sent"]
    back = await proxy.custom_method(one, "same", torch.zeros(1_000_000)[500_000:500_010])
    assert back.untyped_storage().nbytes() < 1000
    assert proxy.stats()["bytes_sent"] - before < 4000


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("make", [torch.Tensor.clone, nn.Parameter], ids=["tensor", "parameter"])
async def test_requires_grad_and_parameters_are_kept(
    proxy: tfr.LearnerProxy, one: str, make: Any, requires_grad: bool
) -> None:
    tensor = make(torch.arange(3.0)).requires_grad_(requires_grad)
    argument = await proxy.custom_method(one, "describe", tensor)
    assert argument["type"] == type(tensor).__name__
    assert argument["requires_grad"] is requires_grad
    back = await proxy.custom_method(one, "same", tensor)
    assert type(back) is type(tensor)
    assert back.requires_grad is requires_grad
    assert torch.equal(back, tensor)


async def test_autograd_history_does_not_travel(proxy: tfr.LearnerProxy, one: str) -> None:
    tensor = torch.ones(2, requires_grad=True) * 2
    assert (await proxy.custom_method(one, "describe", tensor))["is_leaf"]
    back = await proxy.custom_method(one, "same", tensor)
    assert back.is_leaf
    assert back.requires_grad
    back.sum().backward()
    assert back.grad is not None


async def test_a_value_taken_under_no_grad_or_inference_mode_is_a_normal_tensor(
    proxy: tfr.LearnerProxy, one: str
) -> None:
    with torch.inference_mode():
        tensor = torch.ones(3)
        back = await proxy.custom_method(one, "same", tensor)
    assert torch.equal(back, torch.ones(3))
    kept = await proxy.custom_method(one, "same", torch.ones(3))
    assert not kept.is_inference()


async def test_tied_tensors_stay_tied(proxy: tfr.LearnerProxy, one: str) -> None:
    base = torch.arange(12.0)
    pairs = {
        "itself": (base, base),
        "a view": (base, base.view(3, 4)),
        "overlapping": (base[:8], base[4:]),
        "another dtype": (base, base.view(torch.int32)),
    }
    for name, (first, second) in pairs.items():
        assert await proxy.custom_method(one, "tied", first, second), name
        back, other = await proxy.custom_method(one, "same", (first, second))
        assert same_bits(back, first)
        assert same_bits(other, second)
        back.zero_()
        assert other.view(-1)[0] == 0
        assert back.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    assert not await proxy.custom_method(one, "tied", base[:2].clone(), base[2:4].clone())
    assert torch.equal(base, torch.arange(12.0))


async def test_a_module_with_tied_weights_stays_tied(proxy: tfr.LearnerProxy, one: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    back = await proxy.custom_method(one, "same", model)
    assert back[0].weight is back[1].weight
    weights = await proxy.custom_method(one, "same", model.state_dict())
    assert weights["0.weight"].data_ptr() == weights["1.weight"].data_ptr()


async def test_a_module_arrives_whole(proxy: tfr.LearnerProxy, one: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    inputs = torch.rand(1, 1, 4, 4)
    back = await proxy.custom_method(one, "same", model)
    assert not back.training
    assert torch.equal(back(inputs), model(inputs))
    optimizer = torch.optim.Adam(back.parameters())
    back(inputs).sum().backward()
    optimizer.step()
    state = await proxy.custom_method(one, "same", optimizer.state_dict())
    assert state["param_groups"][0]["lr"] == 0.001
    assert torch.equal(state["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.filterwarnings("ignore:.*uantize:UserWarning", "ignore:.*uantize:DeprecationWarning")
@pytest.mark.parametrize("name", QUANTISED)
async def test_quantised_tensors_keep_scale_and_values(proxy: tfr.LearnerProxy, one: str, name: str) -> None:
    tensor = QUANTISED[name]()
    back = await proxy.custom_method(one, "same", tensor)
    assert back.qscheme() == tensor.qscheme()
    assert back.dtype == tensor.dtype
    assert torch.equal(back.int_repr(), tensor.int_repr())
    assert torch.equal(back.dequantize(), tensor.dequantize())


@pytest.mark.filterwarnings("ignore:.*[Ss]parse.*beta:UserWarning")
@pytest.mark.parametrize("name", SPARSE_LAYOUTS)
async def test_sparse_tensors_keep_layout_and_values(proxy: tfr.LearnerProxy, one: str, name: str) -> None:
    layout = SPARSE_LAYOUTS[name]
    tensor = of_layout(layout)
    back = await proxy.custom_method(one, "same", tensor)
    assert back.layout is layout
    assert torch.equal(back.to_dense(), tensor.to_dense())
    if layout is torch.sparse_coo:
        assert back.is_coalesced() == tensor.is_coalesced()
        empty = await proxy.custom_method(one, "same", torch.empty(0, 3).to_sparse())
        assert empty.shape == (0, 3)


async def test_lazy_conjugates_and_negatives_keep_their_values(proxy: tfr.LearnerProxy, one: str) -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    for view in (tensor.conj(), tensor.conj().imag, tensor.real):
        assert torch.equal(await proxy.custom_method(one, "same", view), view)


async def test_a_tensor_subclass_of_the_learners_module_keeps_its_type(proxy: tfr.LearnerProxy, one: str) -> None:
    tensor: Any = torch.arange(3.0).as_subclass(Tagged)
    tensor.tag = "mine"
    back = await proxy.custom_method(one, "same", tensor)
    assert type(back) is Tagged
    assert vars(back)["tag"] == "mine"
    assert back.tolist() == [0, 1, 2]


async def test_one_object_sent_twice_is_one_object_there(proxy: tfr.LearnerProxy, one: str) -> None:
    shared: list[Any] = [torch.ones(2)]
    shared.append(shared)
    (first, second), _ = await proxy.custom_method(one, "echo", shared, shared)
    assert first is second
    assert first[1] is first


# Other values.


@pytest.mark.parametrize("name", PLAIN)
async def test_plain_values_arrive_equal(proxy: tfr.LearnerProxy, one: str, name: str) -> None:
    value = PLAIN[name]
    back = await proxy.custom_method(one, "same", value)
    assert back == value
    assert type(back) is type(value)
    again, kwargs = await proxy.custom_method(one, "echo_async", value, key=value)
    assert again == (value,)
    assert kwargs == {"key": value}


@pytest.mark.parametrize("name", ARRAYS)
async def test_arrays_arrive_equal_and_writable(proxy: tfr.LearnerProxy, one: str, name: str) -> None:
    array = ARRAYS[name]
    back = await proxy.custom_method(one, "same", array)
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)
    assert back.flags.writeable
    assert not np.shares_memory(back, array)


async def test_read_only_arrays_arrive_equal(proxy: tfr.LearnerProxy, one: str) -> None:
    for size in (3, 100_000):
        array = np.arange(size)
        array.flags.writeable = False
        assert np.array_equal(await proxy.custom_method(one, "same", array), array)


async def test_random_generators_go_on_where_they_were(proxy: tfr.LearnerProxy, one: str) -> None:
    generators: list[Any] = [np.random.default_rng(3), random.Random(3), torch.Generator().manual_seed(3)]
    ours, own, torchs = await proxy.custom_method(one, "same", generators)
    assert ours.random() == generators[0].random()
    assert own.random() == generators[1].random()
    assert torch.equal(torch.rand(2, generator=torchs), torch.rand(2, generator=generators[2]))


async def test_a_class_of_the_learners_module_arrives(proxy: tfr.LearnerProxy, one: str) -> None:
    back = await proxy.custom_method(one, "same", Batch({"x": torch.ones(2)}))
    assert type(back) is Batch
    assert torch.equal(back.data["x"], torch.ones(2))


async def test_a_class_of_another_module_is_refused_both_ways(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(tfr.UntrustedTypeError, match=r"test_values.*trusted_modules"):
        await proxy.custom_method(one, "same", Colour.RED)
    assert await proxy.custom_method(one, "same", 1) == 1


# Large and many.


async def test_large_tensors_arrive_whole_both_ways(proxy: tfr.LearnerProxy, one: str) -> None:
    tensor = torch.arange(10_000_000, dtype=torch.float32)  # 40 MB
    back = await proxy.custom_method(one, "same", {"weights": tensor, "more": tensor[:10].clone()})
    assert torch.equal(back["weights"], tensor)
    assert back["weights"].data_ptr() != tensor.data_ptr()


async def test_hundreds_of_small_tensors_arrive_whole_both_ways(proxy: tfr.LearnerProxy, one: str) -> None:
    tensors = {f"layer.{number}": torch.full((1000,), float(number)) for number in range(300)}
    back = await proxy.custom_method(one, "same", tensors)
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    first = back["layer.0"]
    first += 1
    assert back["layer.1"][0] == 1  # no tie where there was none


async def test_large_bytes_and_text_arrive_whole(proxy: tfr.LearnerProxy, one: str) -> None:
    value = [bytes(20_000_000), "ä" * 1_000_000]
    assert await proxy.custom_method(one, "same", value) == value


async def test_many_large_calls_at_once_all_arrive(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(8)
    tensors = [torch.full((1_000_000,), float(number)) for number in range(8)]
    results = await asyncio.gather(
        *(proxy.custom_method(one, "same", tensor) for one, tensor in zip(ids, tensors, strict=True))
    )
    assert all(torch.equal(result, tensor) for result, tensor in zip(results, tensors, strict=True))
