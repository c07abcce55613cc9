"""A call's scope: torch's modes and settings are the call's own within a step, and come back after it."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import scopes
import torch
from scopes import process_state

from torchfedrpc.host import call_scope, torch_settings
from torchfedrpc.host.call_scope import CallScope
from torchfedrpc.host.torch_settings import read_settings


def scope(*, is_thorough: bool = False) -> CallScope:
    """The scope of a call on this thread, whatever its modes are."""
    return scopes.scope(process_state(), is_nested=True, is_thorough=is_thorough)


def modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


DEFAULT = (True, False)


@pytest.fixture(autouse=True)
def _default_modes() -> Iterator[None]:
    assert modes() == DEFAULT
    yield
    torch.set_grad_enabled(True)
    assert modes() == DEFAULT


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_call_begins_with_gradients_enabled_whatever_ran_before(around: Any) -> None:
    with around():
        outside = modes()
        with scope():
            assert modes() == DEFAULT
            assert (torch.ones(1, requires_grad=True) * 2).requires_grad
        assert modes() == outside


def test_a_mode_that_a_call_sets_does_not_outlive_its_step() -> None:
    with scope():
        torch.set_grad_enabled(False)
        assert modes() == (False, False)
    assert modes() == DEFAULT


def test_a_call_finds_its_own_mode_at_its_next_step() -> None:
    own = scope()
    with own:
        torch.set_grad_enabled(False)
    for _ in range(2):
        assert modes() == DEFAULT
        with own:
            assert modes() == (False, False)
    with own:
        torch.set_grad_enabled(True)
    with torch.no_grad(), own:
        assert modes() == DEFAULT


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_block_of_a_coroutine_keeps_its_mode_over_its_steps(mode: Any) -> None:
    def method() -> Generator[tuple[bool, bool], None, None]:
        with mode():
            yield modes()
            yield modes()
        yield modes()

    with mode():
        inside = modes()
    steps, own = method(), scope()
    found = []
    for _ in range(3):
        with own:
            found.append(next(steps))
        assert modes() == DEFAULT
    assert found == [inside, inside, DEFAULT]
    steps.close()


def test_calls_in_turn_have_modes_of_their_own() -> None:
    first, second = scope(), scope()
    with first:
        torch.set_grad_enabled(False)
    with second:
        assert modes() == DEFAULT
    with first:
        assert modes() == (False, False)
    with second:
        assert modes() == DEFAULT


def test_modes_nest() -> None:
    with scope():
        torch.set_grad_enabled(False)
        with scope():
            assert modes() == DEFAULT
        assert modes() == (False, False)


def test_the_mode_comes_back_where_a_step_raises_and_the_step_after_finds_what_it_left() -> None:
    own = scope()

    def fail() -> None:
        with own:
            torch.set_grad_enabled(False)
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert modes() == DEFAULT
    with own:
        assert modes() == (False, False)


def test_thread_of_a_host_has_the_modes_with_which_calls_begin() -> None:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(call_scope._read_modes()))
    with torch.no_grad(), torch.autocast("cpu"), torch.device("meta"):
        thread.start()
        thread.join()
    assert found == [call_scope._BEGIN]


# Autocast.


def product(weights: torch.Tensor) -> torch.dtype:
    return (weights @ weights).dtype


def test_a_call_begins_without_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with scope():
            assert product(torch.ones(2, 2)) is torch.float32
        assert product(torch.ones(2, 2)) is torch.bfloat16


def test_autocast_that_a_call_sets_does_not_outlive_its_step_and_holds_at_the_next() -> None:
    before = autocast()
    own, other = scope(), scope()
    with own:
        torch.set_autocast_dtype("cpu", torch.float16)
        torch.set_autocast_enabled("cpu", True)
    assert autocast() == before
    with other:
        assert autocast() == before
    with own:
        assert autocast() == (True, torch.float16)
    assert autocast() == before


def test_a_block_of_autocast_is_kept_over_the_steps_of_a_coroutine() -> None:
    def method() -> Iterator[torch.dtype]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield product(torch.ones(2, 2))
            yield product(torch.ones(2, 2))
        yield product(torch.ones(2, 2))

    steps, own = method(), scope()
    found = []
    for _ in range(3):
        with own:
            found.append(next(steps))
        assert product(torch.ones(2, 2)) is torch.float32
    assert found == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_weights_that_a_call_has_cast_are_not_stale_after_its_update() -> None:
    def waits() -> Generator[None, None, None]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    waiting, steps = scope(), waits()
    with waiting:
        next(steps)
    weights = torch.nn.Parameter(torch.ones(2, 2))
    found = []
    with scope():
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found.append((weights @ torch.ones(2, 2)).sum().item())
            with torch.no_grad():
                weights.add_(1)
    with waiting:
        steps.close()
    assert found == [8.0, 16.0]


# Settings.


def test_default_dtype_of_a_call_does_not_outlive_its_step_and_holds_at_the_next() -> None:
    own = scope()
    with own:
        torch.set_default_dtype(torch.float64)
    assert torch.get_default_dtype() is torch.float32
    with own:
        assert torch.get_default_dtype() is torch.float64
    assert torch.get_default_dtype() is torch.float32


def test_setting_of_the_process_is_not_of_the_call_and_comes_back() -> None:
    own = scope()
    torch.set_default_dtype(torch.float64)
    try:
        with own:
            assert torch.get_default_dtype() is torch.float32
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_thorough_scope_puts_back_settings_that_methods_rarely_change() -> None:
    before = read_settings()
    with scope(is_thorough=True):
        torch.set_warn_always(True)
    assert read_settings() == before


def test_scope_that_cannot_set_a_setting_leaves_modes_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    own = scope()
    with own:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)

    def fail(dtype: torch.dtype) -> None:
        raise RuntimeError("it cannot be set")

    fails = [
        one._replace(set=fail) if one.name == "torch.set_default_dtype" else one for one in torch_settings._SETTINGS
    ]
    monkeypatch.setattr(torch_settings, "_SETTINGS", fails)
    with pytest.raises(RuntimeError, match="a call has changed a setting for good"), own:
        pass
    assert modes() == DEFAULT
