"""One proxy belongs to one event loop: another loop is refused with the next step, in every mode."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from learners import Probe

import torchfedrpc as tfr


async def same(proxy: tfr.LearnerProxy) -> Any:
    return await proxy.custom_method("a", "same", 1)


async def opened_again(proxy: tfr.LearnerProxy) -> Any:
    async with proxy:
        return await same(proxy)


def test_proxy_left_open_in_a_closed_loop_is_refused_and_can_be_opened_again(lone_runtime: dict[str, Any]) -> None:
    proxy = tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime)
    asyncio.run(proxy.__aenter__())
    closing: list[str] = []

    async def note() -> None:
        closing.append("closing")

    proxy.before_close(note)
    uses: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: same(proxy),
        lambda: proxy.clients().call("same", value=1),
        lambda: proxy.clients().reduce("same", tfr.Sum(), value=1),
        lambda: proxy.share(1),
        lambda: proxy.__aexit__(None, None, None),
    ]
    for use in uses:
        with pytest.raises((tfr.ConfigError, tfr.GroupCallError), match=r"one asyncio\.run around async with"):
            asyncio.run(use())
    with pytest.raises(tfr.ConfigError, match="not open"):
        asyncio.run(same(proxy))
    assert asyncio.run(opened_again(proxy)) == 1
    assert not closing  # which was for the session that was left


async def test_call_from_another_threads_loop_is_refused_and_the_proxy_goes_on(lone_runtime: dict[str, Any]) -> None:
    async with tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime) as proxy:
        for use in (lambda: same(proxy), lambda: proxy.__aexit__(None, None, None)):
            with pytest.raises(tfr.ConfigError, match=r"another event loop.*run_coroutine_threadsafe"):
                await asyncio.to_thread(asyncio.run, use())
        assert await same(proxy) == 1


async def test_run_within_a_running_loop_says_to_await_main() -> None:
    async def main(runtime: str) -> Any:
        return await opened_again(tfr.LearnerProxy(Probe, ["a"], runtime=runtime))

    with pytest.raises(tfr.ConfigError, match=r"as in a notebook: write await main\(\.\.\.\) instead"):
        tfr.run(main, "local")
    assert await main("local") == 1
    assert await asyncio.to_thread(tfr.run, main, "local") == 1  # a thread without a loop may start one
