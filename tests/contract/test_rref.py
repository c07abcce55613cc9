"""Learners as RRefs: their workers own them, the driver holds them, and calls go to the owner."""

from __future__ import annotations

import pytest
from conftest import Fresh

import torchfedrpc as tfr


async def test_an_rref_names_the_worker_that_runs_the_learner_s_calls(
    proxy: tfr.LearnerProxy, fresh: Fresh, mode: str
) -> None:
    clients = fresh.apart(6)
    processes = {client: await proxy.client(client).process_id() for client in clients}
    rrefs = {client: proxy.client(client).rref for client in clients}
    if mode == "local":
        assert set(rrefs.values()) == {None}
        return
    assert all(type(rref).__name__ == "PyRRef" and not rref.is_owner() for rref in rrefs.values())
    pairs = {(rrefs[client].owner().name, processes[client]) for client in clients}
    assert len(pairs) == len(set(processes.values())) == 2
    assert len({str(rref) for rref in rrefs.values()}) == len(clients)


async def test_an_rref_is_made_on_demand_and_its_learner_by_the_first_call(
    proxy: tfr.LearnerProxy, fresh: Fresh, mode: str
) -> None:
    client = fresh.one()
    before = proxy.stats()["workers"]
    rref = proxy.client(client).rref
    assert sum(worker["learners"] for worker in proxy.stats()["workers"].values()) - sum(
        worker["learners"] for worker in before.values()
    ) == (0 if mode == "local" else 1)
    assert await proxy.client(client).append("a") == 1
    assert await proxy.client(client).append("b") == 2
    assert proxy.client(client).rref is rref


async def test_a_learner_stays_on_its_worker(proxy: tfr.LearnerProxy, fresh: Fresh, mode: str) -> None:
    if mode == "local":
        pytest.skip("there is no RRef")
    client = fresh.one()
    with pytest.raises(RuntimeError, match=f"the learner of {client} stays on its worker"):
        proxy.client(client).rref.to_here()
    assert await proxy.client(client).append("a") == 1


async def test_an_rref_cannot_be_an_argument(proxy: tfr.LearnerProxy, fresh: Fresh, mode: str) -> None:
    if mode == "local":
        pytest.skip("there is no RRef")
    client = fresh.one()
    with pytest.raises(tfr.SerializationError, match="call its learner through the proxy"):
        await proxy.client(client).same(proxy.client(client).rref)
