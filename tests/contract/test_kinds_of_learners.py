"""What can be a learner, what cannot, and what a proxy makes of its arguments."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
from learners import Loading, Outer, Probe, make_a_closure, make_probe, probe_with_kwargs

import torchfedrpc as tfr

tfr.learner("probe of the tests")(Probe)


@pytest.mark.parametrize(
    ("learner", "expected"),
    [
        (Probe, {"own": 2}),
        (make_probe, {"own": 2, "made_by": "factory"}),
        ("probe of the tests", {"own": 2}),
        (probe_with_kwargs, {"own": 2, "common": 1}),
        (Outer.Inner, {"own": 2}),
    ],
    ids=["class", "factory", "registered name", "partial", "nested class"],
)
async def test_a_learner_is_a_class_a_factory_or_a_registered_name(
    lone_runtime: dict[str, Any], learner: Any, expected: dict[str, Any]
) -> None:
    async with tfr.LearnerProxy(learner, {"a": {"own": 2}, "b": {}}, runtime=lone_runtime) as proxy:
        assert proxy.client_ids == ["a", "b"]
        assert await proxy.custom_method("a", "constructor_kwargs") == expected


async def test_constructor_arguments_are_taken_by_value(lone_runtime: dict[str, Any]) -> None:
    weights = torch.zeros(3)
    async with tfr.LearnerProxy(Probe, {"a": {"weights": weights}}, runtime=lone_runtime) as proxy:
        kwargs = await proxy.custom_method("a", "constructor_kwargs")
        kwargs["weights"] += 1
        weights += 5
        assert (await proxy.custom_method("a", "constructor_kwargs"))["weights"].sum() == 0


async def test_clients_default_to_num_clients(lone_runtime: dict[str, Any]) -> None:
    async with tfr.LearnerProxy(Probe, runtime={**lone_runtime, "num_clients": 3}) as proxy:
        assert proxy.client_ids == ["client_1", "client_2", "client_3"]
        assert (await proxy.train_epoch("client_3"))["client"] == "client_3"


async def test_a_learner_may_load_its_data_with_worker_processes(lone_runtime: dict[str, Any]) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("where processes are not forked they import the learner's module, which has no name there")
    async with tfr.LearnerProxy(Loading, ["a", "b"], runtime=lone_runtime) as proxy:
        loaded = await proxy.options(timeout_s=60).clients().call("load")
    for values in loaded.values():
        assert sorted(values) == list(range(12))


@pytest.mark.parametrize(
    ("learner", "words"),
    [
        (lambda client_id: Probe(client_id), "lambda"),
        (make_a_closure(), "top level"),
        (functools.partial(Probe, "positional"), "keyword arguments only"),
        ("no such name", "no learner named"),
        (5, "class"),
        (None, "class"),
        (object(), "class"),
    ],
    ids=["lambda", "closure", "positional partial", "unknown name", "number", "none", "instance"],
)
def test_a_learner_that_a_worker_could_not_find_is_refused_in_every_mode(
    lone_runtime: dict[str, Any], learner: Any, words: str
) -> None:
    with pytest.raises(tfr.ConfigError, match=words):
        tfr.LearnerProxy(learner, ["a"], runtime=lone_runtime)


@pytest.mark.parametrize(
    ("clients", "words"),
    [
        ("client_1", "several ids"),
        ([], "at least one client"),
        ([1, 2], "strings"),
        ({"a": 5}, "mapping"),
        (None, "no clients"),
        (["a", "a"], "twice"),
    ],
)
def test_wrong_clients_are_refused(mode: str, clients: Any, words: str) -> None:
    with pytest.raises(tfr.ConfigError, match=words):
        tfr.LearnerProxy(Probe, clients, runtime=mode)


async def test_two_proxies_at_once_are_refused_and_the_first_goes_on(lone_runtime: dict[str, Any]) -> None:
    async with tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime) as proxy:
        with pytest.raises(tfr.ConfigError, match="close it first"):
            async with tfr.LearnerProxy(Probe, ["b"], runtime=lone_runtime):
                pass
        assert await proxy.custom_method("a", "append", 1) == 1
    async with tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime) as proxy:
        assert await proxy.custom_method("a", "append", 1) == 1  # a learner of its own


async def test_a_proxy_outside_its_block_refuses_calls(lone_runtime: dict[str, Any]) -> None:
    proxy = tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime)
    for _ in range(2):
        with pytest.raises(tfr.ConfigError, match="async with"):
            await proxy.custom_method("a", "echo")
        with pytest.raises(tfr.ConfigError, match="async with"):
            proxy.stream("a", "count", 1)
        with pytest.raises(tfr.ConfigError, match="async with"):
            await proxy.client("a").echo()
        async with proxy:
            assert await proxy.custom_method("a", "same", 1) == 1


async def test_an_error_in_the_block_closes_the_proxy_and_is_raised(lone_runtime: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="plain"):
        async with tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime) as proxy:
            await proxy.custom_method("a", "fail", "value")
    async with tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime) as proxy:
        assert await proxy.custom_method("a", "same", 1) == 1
