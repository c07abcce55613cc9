"""What nobody else can hold goes without a copy, and whatever somebody may still hold is copied."""

from __future__ import annotations

import collections
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchfedrpc.wire import owned
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.owned import owned_storages
from torchfedrpc.wire.packing import pack, pack_only
from torchfedrpc.wire.tensors import SMALL_BYTES

ALLOW = AllowList([__name__])
LARGE = SMALL_BYTES // 4 + 64  # elements of float32: more than what is sent together with others anyway


def zeros() -> Tensor:
    return torch.zeros(LARGE)


def leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)


# What goes without a copy.


@pytest.mark.parametrize(
    "make",
    [
        zeros,
        lambda: [zeros()],
        lambda: (zeros(), 3, "text", None),
        lambda: {"weights": zeros()},
        lambda: collections.OrderedDict(weights=zeros()),
        lambda: {"weights": [zeros(), ({"more": zeros()},)], "count": 3},
        lambda: zeros().view(torch.int32).clone(),
        lambda: torch.zeros(64, LARGE // 32).t().contiguous(),
        lambda: {name: tensor.clone() for name, tensor in nn.Linear(200, 200).state_dict().items()},
        lambda: torch.ones(LARGE, dtype=torch.bfloat16).double(),
        lambda: torch.cat([zeros(), zeros()]),
    ],
    ids=["tensor", "list", "tuple", "dict", "ordered", "nested", "int32", "contiguous", "state", "double", "cat"],
)
def test_what_nobody_else_holds_is_taken_as_it_is(make: Callable[[], Any]) -> None:
    box = [make()]
    before = {tensor.data_ptr() for tensor in leaves(box) if tensor.nbytes > SMALL_BYTES}
    gc.collect()  # what `leaves` has left behind
    received = pack_only(box).open(ALLOW)
    after = {tensor.data_ptr() for tensor in leaves(received) if tensor.nbytes > SMALL_BYTES}
    assert after == before


def test_what_has_arrived_and_is_given_back_is_taken_as_it_is() -> None:
    box = [pack([zeros(), zeros()]).open(ALLOW)]
    assert len(owned_storages(box)) == 2


def test_one_tensor_is_copied_and_the_one_beside_it_is_not() -> None:
    kept = zeros()
    box = [[zeros(), kept]]
    fresh = box[0][0].data_ptr()
    received = pack_only(box).open(ALLOW)
    kept.fill_(1)
    assert received[0].data_ptr() == fresh
    assert not received[1].any()


def test_an_attribute_goes_along_and_the_tensor_itself_stays() -> None:
    box = [zeros()]
    box[0].label = ["mine"]  # type: ignore[attr-defined]
    received = pack_only(box).open(ALLOW)
    assert received is not box[0]
    assert received.label == ["mine"]
    assert received.label is not box[0].label  # type: ignore[attr-defined]


def test_what_is_taken_is_an_ordinary_tensor() -> None:
    box = [zeros()]
    received = pack_only(box).open(ALLOW)
    box.clear()
    received.resize_(2 * LARGE)
    received.requires_grad_()
    assert received.is_leaf
    assert not received._is_view()


def test_a_view_of_something_large_does_not_bring_it_along() -> None:
    box = [torch.zeros(10 * LARGE)[:LARGE].detach()]
    received = pack_only(box).open(ALLOW)
    assert received.untyped_storage().nbytes() == 4 * LARGE


def test_a_variable_that_refers_to_it_costs_a_copy_and_no_more() -> None:
    value = [zeros()]
    box = [value]
    assert not owned_storages(box)
    assert not pack_only(box).open(ALLOW)[0].any()


# What somebody may hold: a way to hold on to the weights, and what can then be done to them.


class Pair(NamedTuple):
    first: Any
    second: Any


def fill(held: Any) -> None:
    held[:] = 1


def fill_referred(held: Any) -> None:
    if (tensor := held()) is not None:
        tensor.fill_(1)


def in_module(weights: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("weights", weights)
    return module


def in_script(weights: Tensor) -> Any:
    class Weighing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weights", weights)

        def forward(self) -> Tensor:
            return self.weights

    return torch.jit.script(Weighing())


def in_frame(weights: Tensor) -> Iterator[None]:
    def change() -> Iterator[None]:
        yield
        weights.fill_(1)
        yield

    generator = change()
    next(generator)
    return generator


def in_traceback(weights: Tensor) -> Exception:
    try:
        int("x", base=weights.dim())
    except ValueError as error:
        return error
    raise AssertionError


def change_in_traceback(error: Exception) -> None:
    assert error.__traceback__ is not None
    error.__traceback__.tb_frame.f_locals["weights"].fill_(1)


def in_thread(weights: Tensor) -> Callable[[], None]:
    go_on = threading.Event()

    def wait() -> None:
        mine = weights
        go_on.wait()
        mine.fill_(1)

    thread = threading.Thread(target=wait)
    thread.start()

    def change() -> None:
        go_on.set()
        thread.join()

    return change


def in_default(weights: Tensor) -> Callable[[], Any]:
    return lambda weights=weights: weights.fill_(1)


def in_cache(weights: Tensor) -> Callable[[int], Tensor]:
    cached = functools.lru_cache(lambda _: results.pop())
    results = [weights]
    cached(0)
    return cached


HOLDS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "tensor": (lambda weights: weights, fill),
    "list": (lambda weights: [weights], lambda held: fill(held[0])),
    "detached": (lambda weights: weights.detach(), fill),
    "data": (lambda weights: weights.data, fill),
    "view": (lambda weights: weights[5:9], fill),
    "base of a view": (lambda weights: weights[5:9], lambda held: fill(held._base)),
    "set": (lambda weights: torch.empty(0).set_(weights), fill),
    "parameter": (nn.Parameter, lambda held: fill(held.data)),
    "module": (in_module, lambda held: held.weights.fill_(1)),
    "script": (in_script, lambda held: held.weights.fill_(1)),
    "storage": (Tensor.untyped_storage, lambda held: held.fill_(1)),
    "numpy": (Tensor.numpy, fill),
    "numpy view": (lambda weights: weights.numpy()[3:5], fill),
    "buffer": (lambda weights: memoryview(weights.numpy()), lambda held: fill(np.frombuffer(held, np.float32))),
    "dlpack": (lambda weights: torch.utils.dlpack.to_dlpack(weights), lambda held: fill(torch.from_dlpack(held))),
    "dlpack numpy": (lambda weights: torch.from_dlpack(np.from_dlpack(weights)), fill),
    "weak reference": (weakref.ref, fill_referred),
    "weak storage": (lambda weights: weakref.ref(weights.untyped_storage()), fill_referred),
    "closure": (lambda weights: lambda: weights.fill_(1), lambda held: held()),
    "method": (lambda weights: weights.fill_, lambda held: held(1)),
    "partial": (lambda weights: functools.partial(fill, weights), lambda held: held()),
    "default": (in_default, lambda held: held()),
    "cache": (in_cache, lambda held: fill(held(0))),
    "generator": (in_frame, next),
    "traceback": (in_traceback, change_in_traceback),
    "thread": (in_thread, lambda held: held()),
    "iterator": (lambda weights: iter([weights]), lambda held: fill(next(held))),
    "object array": (lambda weights: np.array([weights, None], dtype=object), lambda held: fill(held[0])),
    "future": (lambda weights: completed(weights), lambda held: fill(held.value())),
}

if np.lib.NumpyVersion(np.__version__) < "2.1.0":  # it takes no read-only memory
    del HOLDS["dlpack numpy"]


def completed(weights: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(weights)
    return future


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda weights: weights,
    "in a dict": lambda weights: {"weights": weights},
    "deep": lambda weights: [({"weights": [weights]},)],
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script`", "ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=list(WRAPS))
@pytest.mark.parametrize("name", HOLDS)
def test_what_is_done_to_held_weights_is_not_seen(name: str, wrap: Callable[[Tensor], Any]) -> None:
    hold, change = HOLDS[name]
    kept: list[Any] = []

    def give() -> Any:
        weights = zeros()
        kept.append(hold(weights))
        return wrap(weights)

    box = [give()]
    parcel = pack_only(box)
    change(kept[0])
    (received,) = leaves(parcel.open(ALLOW))
    assert not received.any()


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: [weights],
        lambda weights: (weights,),
        lambda weights: {"weights": weights},
        lambda weights: collections.OrderedDict(weights=weights),
        lambda weights: {"deep": [weights]}["deep"],
    ],
    ids=["list", "tuple", "dict", "ordered", "inner"],
)
@pytest.mark.parametrize("wrap", [lambda held: held, lambda held: {"held": held}], ids=["itself", "within"])
def test_a_container_that_is_held_is_copied_with_all_that_is_in_it(
    make: Callable[[Tensor], Any], wrap: Callable[[Any], Any]
) -> None:
    kept: list[Any] = []

    def give() -> Any:
        kept.append(make(zeros()))
        return wrap(kept[0])

    box = [give()]
    parcel = pack_only(box)
    for tensor in leaves(kept[0]):
        tensor.fill_(1)
    (received,) = leaves(parcel.open(ALLOW))
    assert not received.any()


def test_a_container_to_which_a_weak_reference_exists_is_copied() -> None:
    kept: list[Any] = []

    def give() -> Any:
        state = collections.OrderedDict(weights=zeros())
        kept.append(weakref.ref(state))
        return state

    box = [give()]
    parcel = pack_only(box)
    kept[0]()["weights"].fill_(1)
    assert not parcel.open(ALLOW)["weights"].any()


def test_the_attributes_of_an_object_are_copied() -> None:
    class Holder:
        def __init__(self) -> None:
            self.weights = zeros()

    holder = Holder()
    for look in (lambda: holder.__dict__, lambda: vars(holder), lambda: [holder.__dict__]):
        box = [look()]
        parcel = pack_only(box)
        holder.weights.fill_(1)
        assert not any(tensor.any() for tensor in leaves(parcel.open(ALLOW)))
        holder.weights.zero_()


def test_what_a_generator_yields_and_keeps_is_copied() -> None:
    def give() -> Iterator[Any]:
        weights = zeros()
        for _ in range(2):
            yield [weights]
            weights.fill_(1)

    generator = give()
    box = [next(generator)]
    parcel = pack_only(box)
    next(generator)
    assert not parcel.open(ALLOW)[0].any()


def test_a_tuple_that_an_iterator_uses_again_is_copied() -> None:
    pairs = zip([zeros()], [zeros()], strict=True)
    box = [next(pairs)]
    assert not owned_storages(box)


def test_a_gradient_of_a_parameter_is_copied() -> None:
    weights = nn.Parameter(torch.ones(LARGE))
    (weights * 2).sum().backward()
    box = [[weights.grad]]
    parcel = pack_only(box)
    box.clear()
    weights.grad.zero_()  # type: ignore[union-attr]
    assert parcel.open(ALLOW)[0].eq(2).all()


def test_what_autograd_has_saved_is_copied() -> None:
    weights = torch.ones(LARGE, requires_grad=True)
    products: list[Tensor] = []

    def give() -> Any:
        factor = torch.full((LARGE,), 3.0)
        products.append(weights * factor)
        return [factor]

    box = [give()]
    received = pack_only(box).open(ALLOW)
    box.clear()
    received[0].zero_()
    products[0].sum().backward()
    assert weights.grad is not None
    assert weights.grad.eq(3).all()


@pytest.mark.parametrize("make", [np.zeros, lambda count: np.zeros(count, dtype=np.float32)[:]])
def test_memory_of_numpy_is_copied(make: Callable[[int], np.ndarray[Any, Any]]) -> None:
    array = make(LARGE)
    box = [[torch.from_numpy(array)]]
    parcel = pack_only(box)
    array.fill(1)
    assert not parcel.open(ALLOW)[0].any()


def test_memory_of_somebodys_buffer_is_copied() -> None:
    buffer = bytearray(4 * LARGE)
    box = [torch.frombuffer(buffer, dtype=torch.float32)]
    parcel = pack_only(box)
    buffer[:] = b"\1" * len(buffer)
    assert not parcel.open(ALLOW).any()


@pytest.mark.parametrize("shared", [True, False])
def test_memory_of_a_file_is_copied(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * LARGE))
    box = [torch.from_file(str(path), shared=shared, size=LARGE)]
    parcel = pack_only(box)
    with path.open("r+b") as file:
        file.write(b"\1" * 4 * LARGE)
    assert not parcel.open(ALLOW).any()


def test_memory_that_is_mapped_from_a_checkpoint_is_copied(tmp_path: Path) -> None:
    torch.save({"weights": zeros()}, tmp_path / "state.pt")
    box = [torch.load(tmp_path / "state.pt", mmap=True)]
    assert not owned_storages(box)


def test_memory_shared_between_processes_is_copied() -> None:
    box = [zeros().share_memory_()]
    assert not owned_storages(box)


def test_memory_that_numpy_has_seen_is_copied() -> None:
    """A foreign extension may have kept its address from there."""

    def give() -> Tensor:
        weights = zeros()
        weights.numpy()
        return weights

    box = [give()]
    assert not owned_storages(box)


def test_a_lazy_clone_is_copied() -> None:
    weights = zeros()
    box = [weights._lazy_clone()]
    assert not owned_storages(box)


@pytest.mark.parametrize(
    "make",
    [
        lambda: zeros().requires_grad_(),
        lambda: zeros().requires_grad_() * 2,
        lambda: nn.Parameter(zeros()),
        lambda: torch.zeros(1, LARGE).conj_physical()[0],
        lambda: torch.zeros(LARGE, dtype=torch.complex64).conj(),
        lambda: torch.zeros(LARGE, device="meta"),
        lambda: torch.zeros(LARGE).to_sparse(),
        lambda: Pair(zeros(), 1),
        lambda: collections.deque([zeros()]),
        lambda: collections.defaultdict(list, weights=zeros()),
        lambda: torch.inference_mode()(zeros)(),
    ],
    ids=["requires_grad", "history", "parameter", "view", "conj", "meta", "sparse", "named", "deque", "default",
         "inference"],
)  # fmt: skip
def test_what_is_not_a_plain_tensor_in_a_plain_container_is_copied(make: Callable[[], Any]) -> None:
    box = [make()]
    assert not owned_storages(box)


def test_tensors_that_share_memory_stay_tied() -> None:
    def give() -> Any:
        weights = zeros()
        return [weights, weights], [weights.detach(), weights.detach()]

    for which in (0, 1):
        box = [give()[which]]
        assert not owned_storages(box)
        first, second = pack_only(box).open(ALLOW)
        first[0] = 5
        assert second[0] == 5


def test_a_result_that_holds_itself_is_no_trouble() -> None:
    loop: list[Any] = [zeros()]
    loop.append(loop)
    box = [loop]
    del loop
    assert not owned_storages(box)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert not owned_storages([deep])


def test_small_tensors_are_left_to_be_sent_together() -> None:
    box = [[torch.zeros(3), torch.zeros(3)]]
    assert not owned_storages(box)


@pytest.mark.parametrize("name", ["_tensor_uses", "_storage_uses", "_shares_lazily"])
def test_a_torch_that_cannot_count_has_everything_copied(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(owned, name, None)
    assert not owned_storages([zeros()])


def test_a_python_that_cannot_count_has_everything_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned.sys, "_is_gil_enabled", lambda: False, raising=False)
    assert not owned_storages([zeros()])
