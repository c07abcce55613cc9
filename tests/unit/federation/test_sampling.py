"""Cohorts: drawn from the seed and the round alone."""

from __future__ import annotations

from torchfedrpc.federation.trainer import sample_clients

CLIENTS = [f"client_{number}" for number in range(1, 101)]


def test_the_cohort_depends_on_seed_and_round_alone() -> None:
    assert sample_clients(CLIENTS, 10, seed=3, round_num=7) == sample_clients(CLIENTS, 10, seed=3, round_num=7)
    assert sample_clients(CLIENTS, 10, seed=3, round_num=7) != sample_clients(CLIENTS, 10, seed=3, round_num=8)
    assert sample_clients(CLIENTS, 10, seed=3, round_num=7) != sample_clients(CLIENTS, 10, seed=4, round_num=7)


def test_clients_are_drawn_once_and_stay_in_order() -> None:
    cohort = sample_clients(CLIENTS, 40, seed=0, round_num=0)
    assert len(set(cohort)) == 40
    assert cohort == sorted(cohort, key=CLIENTS.index)


def test_all_clients_are_all_clients() -> None:
    assert sample_clients(CLIENTS, 100, seed=0, round_num=5) == CLIENTS


def test_every_client_gets_its_turn() -> None:
    counts = dict.fromkeys(CLIENTS, 0)
    for round_num in range(500):
        for client_id in sample_clients(CLIENTS, 10, seed=0, round_num=round_num):
            counts[client_id] += 1
    assert min(counts.values()) > 20  # 50 expected, with a standard deviation of 6.7
    assert max(counts.values()) < 80
