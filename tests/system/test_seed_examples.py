"""The trainers and configurations that people bring along run as they stand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from own_mode import CountingExecutor

import torchfedrpc as fedcl
from torchfedrpc import AbstractFederationTrainer

teacher_model_weights = {"w": torch.ones(3)}


class SeedLearner:
    """Has the methods that the trainers call."""

    def __init__(self, client_id: str) -> None:
        self.weights = {"w": torch.rand(3)}
        self.calls: list[str] = []

    def train_epoch(self, round_num: int, local_epochs: int, learning_rate: float) -> dict[str, Any]:
        for _ in range(local_epochs):
            self.weights["w"] -= learning_rate * torch.randn(3)
        return {"model_weights": self.weights, "num_samples": 10}

    def set_model_weights(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    def get_model_weights(self) -> dict[str, torch.Tensor]:
        return self.weights

    def evaluate(self) -> dict[str, float]:
        return {"accuracy": float(self.weights["w"].sigmoid().mean())}

    def preprocess_data(self, batch_size: int) -> None:
        self.calls.append(f"preprocess {batch_size}")

    def train_with_distillation(self, teacher_weights: dict[str, torch.Tensor], alpha: float) -> dict[str, Any]:
        self.calls.append(f"distill {alpha}")
        return {"loss": float(teacher_weights["w"].sum()) * alpha}

    def post_process_results(self, result: dict[str, Any]) -> None:
        self.calls.append(f"post-process {result['loss']:.1f}")

    def history(self) -> list[str]:
        return self.calls


@fedcl.trainer("my_fedavg")
class MyFedAvgTrainer(AbstractFederationTrainer):
    async def train(self):  # type: ignore[no-untyped-def]
        for round_num in range(self.config.num_rounds):
            selected_clients = self.select_clients(round_num)
            training_tasks = []
            for client_id in selected_clients:
                task = self.learner_proxy.train_epoch(
                    client_id=client_id, round_num=round_num, local_epochs=5, learning_rate=0.01
                )
                training_tasks.append(task)
            results = await asyncio.gather(*training_tasks)
            weights_list = [result["model_weights"] for result in results]
            global_weights = await self.aggregate_weights(weights_list)
            update_tasks = []
            for client_id in selected_clients:
                task = self.learner_proxy.set_model_weights(client_id=client_id, weights=global_weights)
                update_tasks.append(task)
            await asyncio.gather(*update_tasks)
            if round_num % 5 == 0:
                eval_tasks = [self.learner_proxy.evaluate(client_id=client_id) for client_id in selected_clients]
                eval_results = await asyncio.gather(*eval_tasks)
                avg_accuracy = sum(r["accuracy"] for r in eval_results) / len(eval_results)
        return avg_accuracy, global_weights  # the one line that is not theirs: something to look at


class MyCustomTrainer(AbstractFederationTrainer):
    async def train(self):  # type: ignore[no-untyped-def]
        await self.learner_proxy.custom_method("client_1", "preprocess_data", batch_size=32)
        result = await self.learner_proxy.custom_method(
            "client_1", "train_with_distillation", teacher_weights=teacher_model_weights, alpha=0.7
        )
        await self.learner_proxy.custom_method("client_1", "post_process_results", result)


CONFIGURATIONS = [
    {"execution_mode": "local", "num_clients": 3},
    {"execution_mode": "pseudo", "num_processes": 4, "use_multiprocessing": True},
]
ENDPOINTS = {"client_1": "local", "client_2": "local", "client_3": "local"}


async def run_fedavg(runtime: dict[str, Any]) -> tuple[float, torch.Tensor]:
    async with fedcl.LearnerProxy(SeedLearner, ["client_1", "client_2", "client_3"], runtime=runtime) as proxy:
        config = {"num_rounds": 6, "clients_per_round": 2, "seed": 3}
        accuracy, weights = await fedcl.get_trainer("my_fedavg")(config, proxy).train()
    return accuracy, weights["w"]


async def test_the_first_trainer_gives_the_same_bits_in_each_configuration() -> None:
    outcomes = [await run_fedavg(runtime) for runtime in CONFIGURATIONS]
    assert outcomes[0][0] == outcomes[1][0]
    assert torch.equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("runtime", CONFIGURATIONS, ids=lambda runtime: runtime["execution_mode"])
async def test_the_second_trainer_runs(runtime: dict[str, Any]) -> None:
    async with fedcl.LearnerProxy(SeedLearner, runtime=runtime) as proxy:
        await MyCustomTrainer({}, proxy).train()
        calls = await proxy.custom_method("client_1", "history")
        assert calls == ["preprocess 32", "distill 0.7", "post-process 2.1"]


@pytest.mark.parametrize("runtime", CONFIGURATIONS, ids=lambda runtime: runtime["execution_mode"])
def test_a_configuration_without_clients_makes_its_own(runtime: dict[str, Any]) -> None:
    proxy = fedcl.LearnerProxy(SeedLearner, runtime=runtime)
    count = runtime.get("num_clients") or runtime["num_processes"]
    assert proxy.client_ids == [f"client_{number}" for number in range(1, count + 1)]
    assert proxy.mode == runtime["execution_mode"]


async def test_endpoints_make_the_clients_of_the_third_configuration() -> None:
    runtime = {"execution_mode": "distributed", "client_endpoints": ENDPOINTS}
    with pytest.warns(UserWarning, match="local mode"):
        proxy = fedcl.LearnerProxy(SeedLearner, runtime=runtime)
    async with proxy:
        assert proxy.client_ids == list(ENDPOINTS)
        assert await proxy.evaluate("client_3")


async def test_users_mode_runs_the_trainer_unchanged_to_the_same_bits() -> None:
    own = await run_fedavg({"execution_mode": "counting"})
    assert (CountingExecutor.log[0], CountingExecutor.log[-1]) == ("open", "close")
    assert "train_epoch" in CountingExecutor.log
    local = await run_fedavg({"execution_mode": "local"})
    assert own[0] == local[0]
    assert torch.equal(own[1], local[1])
