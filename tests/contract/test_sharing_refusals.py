"""What cannot be shared, and what is none of those who share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import opened

import torchfedrpc as tfr

from .test_sharing import SIZE, Sharer


@pytest.fixture(scope="module")
def old_ref(runner: asyncio.Runner) -> Any:
    """A reference of a proxy that is closed."""

    async def make() -> Any:
        async with tfr.LearnerProxy(Sharer, ["a"], runtime="local") as proxy:
            return await proxy.share(torch.ones(SIZE))

    return runner.run(make())


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, runtime: dict[str, Any], old_ref: Any) -> Iterator[tfr.LearnerProxy]:
    """Learners of which two cannot be made."""
    clients: dict[str, dict[str, Any]] = {"a": {}, "b": {"x": lambda: 1}, "c": {"x": [old_ref]}, "d": {}}
    with opened(runner, tfr.LearnerProxy(Sharer, clients, runtime=runtime)) as proxy:
        yield proxy


async def test_a_learner_that_cannot_be_made_is_no_matter_of_those_who_share_with_it(proxy: tfr.LearnerProxy) -> None:
    async with asyncio.timeout(5):
        result = await proxy.clients().options(on_error="collect").call("sums", torch.ones(SIZE))
    assert dict(result) == {"a": [SIZE], "d": [SIZE]}
    assert {one: type(error) for one, error in result.failures.items()} == dict.fromkeys("bc", tfr.SerializationError)


async def test_a_reference_in_a_constructors_arguments_is_refused(proxy: tfr.LearnerProxy) -> None:
    with pytest.raises(tfr.SerializationError, match=r"constructor arguments of c cannot be sent: .*SharedRef"):
        await proxy.custom_method("c", "constructor_kwargs")


async def test_a_reference_of_a_proxy_that_is_closed_is_refused(proxy: tfr.LearnerProxy, old_ref: Any) -> None:
    for argument in (old_ref, [old_ref]):
        with pytest.raises(
            tfr.SerializationError, match=r"arguments of a\.same cannot be sent: .*proxy that is closed"
        ):
            await proxy.custom_method("a", "same", argument)


async def test_an_object_that_cannot_be_sent_cannot_be_shared(proxy: tfr.LearnerProxy) -> None:
    with pytest.raises(tfr.SerializationError):
        await proxy.share([torch.ones(SIZE), lambda: 1])
    with pytest.raises(tfr.SerializationError, match="arguments of a call"):
        await proxy.share([await proxy.share(1)])
