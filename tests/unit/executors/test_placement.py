"""Endpoints, and even shares of clients."""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchfedrpc.errors import ConfigError
from torchfedrpc.executors.placement import ClientEndpoint, even_out, place_again, place_clients

THREE = {"worker1": "alpha", "worker2": "beta", "worker3": "alpha"}
TWO = {"worker1": "m", "worker2": "m"}


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("local", ClientEndpoint("local")),
        ("worker1", ClientEndpoint("rank", rank=1)),
        ("worker12", ClientEndpoint("rank", rank=12)),
        ("rank:2", ClientEndpoint("rank", rank=2)),
        ("host:gpu-7.example.org", ClientEndpoint("host", name="gpu-7.example.org")),
        ("host:local", ClientEndpoint("host", name="local")),
    ],
)
def test_an_endpoint_is_read(text: str, endpoint: ClientEndpoint) -> None:
    assert ClientEndpoint.parse("client_1", text) == endpoint


@pytest.mark.parametrize(
    "text",
    ["", "worker", "worker-1", "worker1.5", "workerX", "Worker1", "rank:", "rank:-1", "rank:x", "rank2", "host:",
     "host:a:1", "host:a/b", "LOCAL", "local ", " worker1", "somewhere", "rank:²"],
)  # fmt: skip
def test_a_malformed_endpoint_names_the_client_and_the_forms(text: str) -> None:
    expected = (
        re.escape(f"client_endpoints.client_9 is {text!r}: ")
        + ".*worker1, rank:2 or host:NAME, one that listens as HOST:PORT, or local"
    )
    with pytest.raises(ConfigError, match=expected):
        ClientEndpoint.parse("client_9", text)


@pytest.mark.parametrize("text", ["site:8080", "tcp://site:8080", "http://site:8080", "http://site:8080/"])
def test_an_address_may_have_a_scheme(text: str) -> None:
    assert ClientEndpoint.parse("client_1", text) == ClientEndpoint("address", name="site:8080")


def test_machines_of_certain_names_have_addresses_with_a_scheme() -> None:
    assert ClientEndpoint.parse("client_1", "tcp://rank:8080") == ClientEndpoint("address", name="rank:8080")
    assert ClientEndpoint.parse("client_1", "worker1:8080") == ClientEndpoint("address", name="worker1:8080")


@pytest.mark.parametrize(
    "text",
    ["https://site:8080", "site:0", "site:65536", "[::1]:5000", "http://site", "http://site:8080/x", "tcp://local"],
)
def test_what_cannot_be_dialled_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="one that listens as HOST:PORT"):
        ClientEndpoint.parse("client_1", text)


def test_clients_without_an_endpoint_go_to_workers_in_neighbouring_shares() -> None:
    places = place_clients(["a", "b", "c", "d", "e"], {}, TWO)
    assert list(places.values()) == sorted(places.values())
    assert sorted(Counter(places.values()).values()) == [2, 3]


@settings(deadline=None)
@given(num_clients=st.integers(0, 60), num_workers=st.integers(1, 9))
def test_shares_are_even_and_of_neighbours_for_any_numbers(num_clients: int, num_workers: int) -> None:
    clients = [f"client_{number}" for number in range(num_clients)]
    workers = [f"worker{number}" for number in range(1, num_workers + 1)]
    places = place_clients(clients, {}, dict.fromkeys(workers, "m"))
    assert list(places) == clients
    assert list(places.values()) == sorted(places.values())
    counts = [list(places.values()).count(worker) for worker in workers]
    assert sum(counts) == num_clients
    assert max(counts) - min(counts) <= 1


def test_a_named_worker_gets_its_client() -> None:
    places = place_clients(["a", "b"], {"a": "worker3", "b": "rank:1"}, THREE)
    assert places == {"a": "worker3", "b": "worker1"}


def test_clients_of_a_machine_take_turns_on_its_workers() -> None:
    clients = list("abcd")
    places = place_clients(clients, dict.fromkeys(clients, "host:alpha"), THREE)
    assert [places[client] for client in clients] == ["worker1", "worker3", "worker1", "worker3"]


def test_machines_have_turns_of_their_own() -> None:
    endpoints = {"a": "host:alpha", "b": "host:beta", "c": "host:alpha"}
    assert place_clients(list("abc"), endpoints, THREE) == {"a": "worker1", "b": "worker2", "c": "worker3"}


def test_a_local_client_has_no_worker() -> None:
    assert place_clients(["a", "b"], {"a": "local"}, {"worker1": "m"}) == {"b": "worker1"}


def test_clients_with_an_endpoint_do_not_shift_the_shares_of_the_others() -> None:
    places = place_clients(list("abcde"), {"a": "worker2"}, TWO)
    assert places == {"a": "worker2", "b": "worker1", "c": "worker1", "d": "worker2", "e": "worker2"}


@pytest.mark.parametrize("text", ["worker4", "worker0", "rank:0", "rank:4", "host:gamma"])
def test_a_worker_that_does_not_exist_gives_those_that_do(text: str) -> None:
    message = (
        f"client_endpoints.a is {text!r}, and this run has no such worker: it has worker1, worker2, "
        "worker3 (rank:1 is worker1) on host:alpha, host:beta"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        place_clients(["a"], {"a": text}, THREE)


def test_a_worker_that_does_not_exist_gives_those_that_are_named_by_address_too() -> None:
    endpoints = {"a": "worker2", "b": "site:80"}
    with pytest.raises(ConfigError, match=r"it has worker1, site:80 \(rank:1 is worker1\) on host:alpha, host:beta"):
        place_clients(list("ab"), endpoints, {"worker1": "alpha", "site:80": "beta"})


def test_clients_of_a_lost_worker_go_to_the_least_loaded_of_those_that_are_left() -> None:
    places = {"a": "worker1", "b": "worker2", "c": "worker1", "d": "worker1", "e": "worker3"}
    left = {"worker2": "beta", "worker3": "alpha"}
    assert place_again(["a", "c", "d"], {}, left, places) == {"a": "worker2", "c": "worker3", "d": "worker2"}


def test_clients_of_an_address_wait_for_it_and_others_do_not_go_there() -> None:
    endpoints = {"a": "http://site:80", "b": "site:80", "c": "host:alpha"}
    machines = {"worker1": "alpha", "site:80": "beta"}
    places = place_clients(list("abcde"), endpoints, machines)
    assert places == {"a": "site:80", "b": "site:80", "c": "worker1", "d": "worker1", "e": "worker1"}
    assert place_again(list("ab"), endpoints, {"worker1": "alpha"}, places) == {}
    assert place_again(["d"], endpoints, machines, places) == {"d": "worker1"}
    assert place_clients(list("ad"), {"a": "site:80"}, {"site:80": "beta"}) == {"a": "site:80", "d": "site:80"}


@settings(deadline=None)
@given(num_clients=st.integers(0, 40), num_workers=st.integers(1, 6), draw=st.data())
def test_whoever_comes_gets_a_share_and_no_client_moves_that_need_not(
    num_clients: int, num_workers: int, draw: st.DataObject
) -> None:
    clients = [f"client_{number}" for number in range(num_clients)]
    workers = [f"worker{number}" for number in range(num_workers)]
    before = {client: draw.draw(st.sampled_from([*workers, "gone"])) for client in clients}
    moved = even_out(clients, {}, workers, before, is_cheap=lambda client: client.endswith("7"))
    after = before | moved
    counts = {worker: list(after.values()).count(worker) for worker in workers}
    assert sum(counts.values()) == num_clients
    assert max(counts.values()) - min(counts.values()) <= 1
    held = Counter(before.values())
    excess = sum(max(0, held[worker] - counts[worker]) for worker in workers) + held["gone"]
    assert len(moved) == excess
    assert all(before[client] != label for client, label in moved.items())


def test_share_of_a_worker_that_joins_takes_time_in_proportion_to_the_clients() -> None:
    before = {f"client_{number}": "worker1" for number in range(600_000)}
    began_s = time.process_time()
    moved = even_out(list(before), {}, ["worker1", "worker2"], before, is_cheap=lambda _: True)
    assert len(moved) == 300_000
    assert time.process_time() - began_s < 4  # 0.6 s; 12 s if each client that moves shifts those behind it


def test_clients_without_a_learner_move_first_and_named_ones_stay() -> None:
    before = dict.fromkeys("abcdef", "worker1")
    moved = even_out(
        list("abcdef"), {"f": "worker1"}, ["worker1", "worker2"], before, is_cheap=lambda one: one in "ac"
    )
    assert moved == {"a": "worker2", "c": "worker2"}


def test_a_client_that_a_worker_was_named_for_goes_elsewhere_and_one_of_a_machine_stays_there() -> None:
    endpoints, places = {"a": "worker1", "b": "host:alpha", "c": "host:gone"}, dict.fromkeys("abc", "worker1")
    left = {"worker2": "beta", "worker3": "alpha"}
    assert place_again(list("abc"), endpoints, left, places) == {"a": "worker2", "b": "worker3"}
