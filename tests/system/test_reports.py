"""What methods report arrives once and in order, whatever becomes of the workers and their world meanwhile."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from conftest import Latch
from internals import break_world, cut_off, worker_of
from losses import Losses, kill, pseudo

import torchfedrpc as tfr

CLIENTS = ["client_1", "client_2"]


class Chatterbox:
    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    def chat(self, until: str) -> int:
        number = 0
        while not Path(until).exists():
            tfr.current_call().report(number)
            number += 1
            if number % 4 == 0:
                time.sleep(0.0005)  # lets the other threads of a worker that only talks come to their turn
        return number

    def count(self, num_reports: int) -> None:
        for number in range(num_reports):
            tfr.current_call().report(number)
            time.sleep(0.0005)


async def test_a_survivors_reports_arrive_once_and_in_order_while_the_world_is_formed_again(latch: Latch) -> None:
    async with tfr.LearnerProxy(Chatterbox, CLIENTS, runtime=pseudo()) as proxy:
        seen = Losses()
        proxy.subscribe(seen)
        chatting = asyncio.ensure_future(proxy.clients().call("chat", latch.path))
        for number in range(1, 5):
            for client_id in CLIENTS:
                await seen.reported(client_id, len(seen.progress(client_id)) + 20)
            break_world(proxy)
            await seen.world(number)
        latch.open()
        counts = await chatting
        for client_id in CLIENTS:
            assert seen.progress(client_id) == list(range(counts[client_id]))


@pytest.mark.parametrize("severed", [True, False], ids=["lost while it goes on", "killed"])
async def test_no_report_is_repeated_or_left_out_where_a_worker_is_lost(severed: bool) -> None:
    async with tfr.LearnerProxy(Chatterbox, CLIENTS, runtime=pseudo()) as proxy:
        seen = Losses()
        proxy.subscribe(seen)
        counting = asyncio.ensure_future(proxy.clients().call("count", 500))
        await seen.reported(CLIENTS[0], 100)
        worker = worker_of(proxy, CLIENTS[0])
        if severed:
            cut_off(proxy, worker)
        else:
            kill(proxy, worker)
        await counting
        await seen.loss()
        for client_id in CLIENTS:
            assert seen.progress(client_id) == list(range(500))
