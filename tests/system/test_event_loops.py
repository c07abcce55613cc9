"""One proxy belongs to one event loop: another loop is refused with the next step, in every mode."""

from __future__ import annotations

import asyncio
import signal
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

    with pytest.raises(tfr.ConfigError, match=r"as in a notebook: write await tfr\.run_async\(main, \.\.\.\)"):
        tfr.run(main, "local")
    assert await tfr.run_async(main, "local") == 1
    assert await main("local") == 1
    assert await asyncio.to_thread(tfr.run, main, "local") == 1  # a thread without a loop may start one


async def test_run_async_closes_the_proxy_that_main_leaves_open(lone_runtime: dict[str, Any]) -> None:
    async def leave(*, fails: bool) -> Any:
        proxy = await tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime).open()
        assert tfr.LearnerProxy.current() is proxy
        if fails:
            raise ValueError(await same(proxy))
        return await same(proxy)

    assert await tfr.run_async(leave, fails=False) == 1
    assert tfr.LearnerProxy.current() is None
    with pytest.raises(ValueError, match="1"):
        await tfr.run_async(leave, fails=True)
    assert tfr.LearnerProxy.current() is None


async def test_run_async_leaves_a_proxy_open_that_was_open_before(lone_runtime: dict[str, Any]) -> None:
    proxy = await tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime).open()
    assert await tfr.run_async(same, proxy) == 1
    assert await same(proxy) == 1
    with pytest.raises(tfr.ConfigError, match=r"await tfr\.LearnerProxy\.current\(\)\.close\(\)"):
        await tfr.LearnerProxy(Probe, ["a"]).open()
    for _ in range(2):
        await proxy.close()
    assert tfr.LearnerProxy.current() is None


async def test_run_async_refuses_what_is_no_coroutine_function_and_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        pass

    with pytest.raises(tfr.ConfigError, match=r"tfr\.run_async needs a coroutine function"):
        await tfr.run_async(lambda: None)  # type: ignore[arg-type,return-value]
    launch = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(tfr.ConfigError, match=r"tfr\.run\(main\) starts the ranks of a launch"):
        await tfr.run_async(main)


def test_sigint_cancels_main_of_run_async_and_ends_it_with_a_keyboard_interrupt() -> None:
    cleaned_up: list[str] = []

    async def main() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned_up.append("in order")

    with asyncio.Runner() as runner:
        loop = runner.get_loop()  # not its run(), which handles SIGINT itself
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(tfr.run_async(main))
    assert cleaned_up
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
