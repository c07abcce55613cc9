"""Methods that try to end the process, or the event loop, that they share with other learners."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import torchfedrpc as tfr


class Exiting:
    """Learner whose methods exit."""

    def __init__(self, client_id: str) -> None:
        pass

    async def raise_unprintable(self) -> None:
        raise Unprintable

    async def raise_with_state(self) -> None:
        error = ValueError("x")
        error.state = Unpicklable()  # type: ignore[attr-defined]
        raise error

    async def exit_in_a_task(self) -> None:
        await asyncio.create_task(self._exit())

    async def stop_the_loop(self) -> None:
        asyncio.get_running_loop().stop()

    async def _exit(self) -> None:
        raise SystemExit(3)

    async def same(self, value: Any) -> Any:
        return value


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Unpicklable:
    def __getstate__(self) -> Any:
        raise SystemExit(3)


@pytest.mark.parametrize(
    ("method", "kind", "text"),
    [
        ("raise_unprintable", Unprintable, None),
        ("raise_with_state", tfr.RemoteError, "ValueError"),
        ("exit_in_a_task", tfr.RemoteError, "SystemExit"),
        ("stop_the_loop", RuntimeError, "cannot stop the event loop"),
    ],
)
async def test_an_exit_in_an_async_method_ends_its_call_alone(
    lone_runtime: dict[str, Any], method: str, kind: type[Exception], text: str | None
) -> None:
    async with asyncio.timeout(20), tfr.LearnerProxy(Exiting, ["a", "b"], runtime=lone_runtime) as proxy:
        with pytest.raises(kind, match=text):
            await proxy.custom_method("a", method)
        assert [await proxy.custom_method(one, "same", one) for one in "ab"] == ["a", "b"]
