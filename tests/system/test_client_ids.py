"""Ids that a proxy takes: texts that every process can name, in an order that every process has."""

from __future__ import annotations

from typing import Any

import pytest
from learners import Probe

import torchfedrpc as tfr

SETS = [{"a", "b"}, frozenset({"a", "b"}), {"a": {}}.keys() | {"b"}]


@pytest.mark.parametrize("ids", SETS)
def test_client_ids_without_an_order_are_refused(ids: Any) -> None:
    with pytest.raises(tfr.ConfigError, match=r"order.*sorted\(ids\)"):
        tfr.LearnerProxy(Probe, ids)


@pytest.mark.parametrize("ids", SETS)
async def test_group_and_snapshots_without_an_order_are_refused(ids: Any) -> None:
    async with tfr.LearnerProxy(Probe, ["a", "b"], runtime="local") as proxy:
        with pytest.raises(tfr.ConfigError, match="order"):
            proxy.clients(ids)
        with pytest.raises(tfr.ConfigError, match="order"):
            await anext(proxy.snapshots(ids))
        results = await proxy.clients({"b": {}, "a": {}}.keys()).call("same", value=1)
        assert list(results) == ["b", "a"]


@pytest.mark.parametrize("clients", [["a", "b\udcff"], {"b\udcff": {}}])
def test_client_id_with_a_lone_surrogate_is_refused_by_name(clients: Any) -> None:
    with pytest.raises(tfr.ConfigError, match=r"'b\\udcff' is no valid text \(surrogates not allowed\)"):
        tfr.LearnerProxy(Probe, clients)
