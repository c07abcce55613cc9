"""The suite's own checks fail when they should."""

from __future__ import annotations

import asyncio

import pytest
from conftest import LoopErrors, needs


async def fail() -> None:
    raise ValueError("unseen")


def test_an_exception_that_nothing_retrieves_fails_a_test(loop_errors: LoopErrors) -> None:
    async def main() -> None:
        asyncio.create_task(fail())  # noqa: RUF006, it is to be forgotten
        await asyncio.sleep(0)

    asyncio.run(main())
    with pytest.raises(pytest.fail.Exception, match=r"never retrieved(?s:.*)unseen"):
        loop_errors.check()
    loop_errors.check()


async def test_an_error_of_a_callback_fails_a_test(loop_errors: LoopErrors) -> None:
    asyncio.get_running_loop().call_soon(int, "no number")
    await asyncio.sleep(0)
    with pytest.raises(pytest.fail.Exception, match="no number"):
        loop_errors.check()


def test_a_missing_optional_package_skips_a_test_but_fails_it_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception):
        needs("no_such_package")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(ModuleNotFoundError):
        needs("no_such_package")
