"""Some rounds of each algorithm on clients with quadratic losses, against the papers' updates in closed form.

The three clients have two, three and four samples, and two of them take part in a round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.training import build_model, copy_weights
from torchfedrpc.federation.trainer import sample_clients

Vector = npt.NDArray[np.float64]

INPUTS = {
    "a": [[1.0, 0.5], [0.0, 1.0]],
    "b": [[0.5, -1.0], [1.0, 1.0], [-0.3, 0.4]],
    "c": [[0.2, 0.9], [1.1, -0.4], [0.6, 0.6], [-0.8, 0.1]],
}
LABELS = {"a": [1, 2], "b": [3, 0, 1], "c": [2, 2, 0, 1]}
CLIENTS = "abc"
SEED = 3
COHORTS = [sample_clients(CLIENTS, 2, seed=SEED, round_num=number) for number in range(5)]
START = [0.3, -0.2]
RATE = 0.1
NUM_STEPS = 3


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    """Adagrad divides by the first change, so that float32 is not near enough."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class HalfSquare(nn.Module):
    """Half of the mean squared difference, so that a linear model has a quadratic loss."""

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * (outputs.squeeze(1) - labels).square().mean()


def all_samples() -> tfr.TrainTest:
    samples = tfr.Samples(torch.tensor([*chain(*INPUTS.values())]), torch.tensor([*chain(*LABELS.values())]))
    return tfr.TrainTest(samples, samples)


def run(
    trainer: type[tfr.FedAvgTrainer],
    *,
    learner: str = "classification",
    num_rounds: int = 1,
    of_learner: Mapping[str, Any] | None = None,
    use: Callable[[Any], Any] = lambda trainer: None,
    simulation: tfr.SimulatedClients | None = None,
    **config: Any,
) -> Vector:
    """The weights after some rounds of full-batch steps by two of three clients, in float64."""
    settings = {
        "dataset": {"_target_": f"{__name__}.all_samples"},
        "model": {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 1, "bias": False},
        "loss": {"_target_": f"{__name__}.HalfSquare"},
        "batch_size": 4,
        "learning_rate": RATE,
        **(of_learner or {}),
    }
    shares = np.split(np.arange(9), [2, 5])
    clients = {name: {**settings, "indices": share} for name, share in zip(CLIENTS, shares, strict=True)}

    async def main() -> Vector:
        runtime = {"execution_mode": "local", "trusted_modules": [__name__]}
        async with tfr.LearnerProxy(learner, clients, runtime=runtime) as proxy:
            weights = {"weight": torch.tensor([START])}
            made = trainer(
                {
                    "num_rounds": num_rounds,
                    "local_epochs": NUM_STEPS,
                    "seed": SEED,
                    "clients_per_round": None if trainer is tfr.FedBuffTrainer else 2,
                    **config,
                },
                proxy,
                initial_weights=weights,
                simulation=simulation,
            )
            final = await made.train()
            use(made)
            assert final is not None
            return final["weight"][0].double().numpy()

    return asyncio.run(main())


def quadratic(client: str) -> tuple[Vector, Vector]:
    """The matrix A and the vector b of the client's gradient ``A w - b``."""
    inputs, labels = np.array(INPUTS[client]), np.array(LABELS[client])
    return inputs.T @ inputs / len(labels), inputs.T @ labels / len(labels)


def descended(
    client: str, start: Vector, shift: Vector | float = 0.0, mu: float = 0.0, steps: int = NUM_STEPS
) -> Vector:
    """Weights after steps along ``A w - b + shift + mu (w - start)``, in closed form."""
    matrix, vector = quadratic(client)
    matrix, vector = matrix + mu * np.eye(2), vector - shift + mu * start
    fixed = np.linalg.solve(matrix, vector)
    return np.asarray(fixed + np.linalg.matrix_power(np.eye(2) - RATE * matrix, steps) @ (start - fixed))


def share(client: str, cohort: Sequence[str]) -> float:
    return len(LABELS[client]) / sum(len(LABELS[one]) for one in cohort)


def averaged(start: Vector, round_num: int = 0, **settings: Any) -> Vector:
    """The mean over the cohort of a round, by numbers of samples."""
    cohort = COHORTS[round_num]
    return np.asarray(sum(share(client, cohort) * descended(client, start, **settings) for client in cohort))


W = np.array(START)
SERVER: dict[str, Any] = {
    "server_learning_rate": 0.5,
    "server_momentum": 0.9,
    "tau": 1e-2,
    "beta1": 0.8,
    "beta2": 0.95,
}


def served(name: str, num_rounds: int = 3) -> Vector:
    """The pseudo-code of Reddi et al. 2021, algorithm 2, and of Hsu et al. 2019."""
    rate, tau = SERVER["server_learning_rate"], SERVER["tau"]
    beta1, beta2 = SERVER["beta1"] if name in ("adam", "yogi") else 0.0, SERVER["beta2"]
    x, m, v = W, np.zeros(2), np.full(2, tau**2)
    for round_num in range(num_rounds):
        delta = averaged(x, round_num) - x
        if name == "momentum":
            m = SERVER["server_momentum"] * m + delta
            x = x + rate * m
            continue
        m = beta1 * m + (1 - beta1) * delta
        if name == "adagrad":
            v = v + delta**2
        elif name == "adam":
            v = beta2 * v + (1 - beta2) * delta**2
        else:
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        x = x + rate * m / (np.sqrt(v) + tau)
    return np.asarray(x)


def near(value: Vector) -> Any:
    return pytest.approx(value, abs=1e-6)


def test_cohorts_of_these_rounds_differ() -> None:
    assert {frozenset(cohort) for cohort in COHORTS[:3]} == {frozenset("ab"), frozenset("ac"), frozenset("bc")}


def test_fedavg() -> None:
    assert run(tfr.FedAvgTrainer, num_rounds=2) == near(averaged(averaged(W), 1))


def test_fedavg_of_clients_that_count_alike() -> None:
    expected = sum(descended(client, W) for client in COHORTS[0]) / 2
    assert run(tfr.FedAvgTrainer, weighting="uniform") == near(np.asarray(expected))


def test_fedprox() -> None:
    assert run(tfr.FedProxTrainer, mu=0.7) == near(averaged(W, mu=0.7))


@pytest.mark.parametrize(
    ("trainer", "name"),
    [
        (tfr.FedAvgMTrainer, "momentum"),
        (tfr.FedAdagradTrainer, "adagrad"),
        (tfr.FedAdamTrainer, "adam"),
        (tfr.FedYogiTrainer, "yogi"),
    ],
)
def test_server_optimisers(trainer: type[tfr.FedAvgTrainer], name: str) -> None:
    assert run(trainer, num_rounds=3, **SERVER) == near(served(name))


@pytest.mark.parametrize("server_learning_rate", [1.0, 0.5])
def test_scaffold(server_learning_rate: float) -> None:
    x, c, own = W, np.zeros(2), {client: np.zeros(2) for client in CLIENTS}
    for cohort in COHORTS[:3]:
        y = {client: descended(client, x, shift=c - own[client]) for client in cohort}
        after = {client: own[client] - c + (x - y[client]) / (NUM_STEPS * RATE) for client in cohort}
        c = c + sum(after[client] - own[client] for client in cohort) / len(CLIENTS)  # |S| / N of the mean
        x, own = x + server_learning_rate * (sum(y.values()) / 2 - x), own | after
    controls = []
    found = run(
        tfr.ScaffoldTrainer,
        learner="scaffold",
        num_rounds=3,
        server_learning_rate=server_learning_rate,
        use=lambda trainer: controls.append(trainer.control["weight"][0].double().numpy()),
    )
    assert found == near(x)
    assert controls == [near(c)]


@pytest.mark.parametrize("compression", [None, "top_k"])
def test_fednova(compression: str | None) -> None:
    steps = {"a": 2, "b": 5, "c": 3}

    class Unequal(tfr.SimulatedClients):
        """The clients make different numbers of steps."""

        def plan(self, cohort: Sequence[str], round_num: int, num_epochs: int) -> Any:
            planned = super().plan(cohort, round_num, num_epochs)
            planned.epochs.update({client: steps[client] for client in cohort})
            return planned

    x = W
    for cohort in COHORTS[:2]:
        change = {client: (x - descended(client, x, steps=steps[client])) / steps[client] for client in cohort}
        tau_eff = sum(share(client, cohort) * steps[client] for client in cohort)
        x = np.asarray(x - tau_eff * sum(share(client, cohort) * change[client] for client in cohort))
    settings: dict[str, Any] = {"compression": compression, "compression_ratio": 1.0}
    assert run(tfr.FedNovaTrainer, num_rounds=2, simulation=Unequal(), **settings) == near(x)


def test_fednova_counts_momentum() -> None:
    momentum = 0.5
    weight = sum((1 - momentum ** (NUM_STEPS - step)) / (1 - momentum) for step in range(NUM_STEPS))
    found: list[float] = []
    run(
        tfr.FedNovaTrainer,
        of_learner={"momentum": momentum},
        use=lambda trainer: found.append(trainer.averages["gradient_weight"]),
    )
    assert found == [pytest.approx(weight)]


def test_ditto() -> None:
    x, personal = W, dict[str, Vector]()
    for round_num, cohort in enumerate(COHORTS[:2]):
        for client in cohort:
            matrix, vector = quadratic(client)
            v = personal.get(client, x)
            for _ in range(NUM_STEPS):
                v = v - RATE * (matrix @ v - vector + 0.3 * (v - x))
            personal[client] = v
        x = averaged(x, round_num)

    class Checked(tfr.DittoTrainer):
        """Looks at the personal models at the end."""

        async def train(self) -> Mapping[str, Tensor] | None:
            weights = await super().train()
            for client, v in personal.items():
                own = await self.learner_proxy.client(client).get_personal_weights()
                assert own["weight"][0].numpy() == near(v)
            return weights

    assert run(Checked, learner="ditto", num_rounds=2, penalty=0.3, personal_epochs=NUM_STEPS) == near(x)


def test_fedbuff() -> None:
    """Client b takes 2.5 times as long as a, and c 5 times; a buffer has two changes, weighted by staleness."""

    class Speeds(tfr.SimulatedClients):
        def seconds(self, client_id: str, number: int, num_epochs: float = 1) -> float:
            return {"a": 1.0, "b": 2.5, "c": 5.0}[client_id]

    x, begun, staleness = W, dict.fromkeys(CLIENTS, (0, W)), []
    arrivals = ["aa", "ba", "ac", "ba"]  # at 1, 2, 2.5, 3, 4, 5, 5, 5 s; of equal times the call that began first
    for round_num, clients in enumerate(arrivals):
        total, ages = np.zeros(2), []
        for client in clients:
            since, start = begun[client]
            total += (descended(client, start) - start) / np.sqrt(1 + round_num - since)
            ages.append(round_num - since)
            begun[client] = (round_num, x)  # its next call begins as the next result is awaited
        staleness.append(sum(ages) / 2)
        x = x + 0.5 * total / 2
        begun[clients[-1]] = (round_num + 1, x)  # that of the last one after the step
    settings: dict[str, Any] = {"buffer_size": 2, "num_in_flight": 3, "server_learning_rate": 0.5}
    seen: list[Any] = []
    found = run(
        tfr.FedBuffTrainer,
        num_rounds=len(arrivals),
        simulation=Speeds(),
        use=lambda trainer: seen.extend(ended.metrics for ended in trainer.history),
        **settings,
    )
    assert [metrics["staleness"] for metrics in seen] == staleness
    assert found == near(x)


@pytest.mark.parametrize(
    ("settings", "simulation"),
    [
        ({"clients_per_round": 1}, None),
        ({"min_results": 1}, None),
        ({"deadline_s": 5}, None),
        ({}, tfr.SimulatedClients(dropout=0.1)),
        ({}, tfr.SimulatedClients(deadline_s=2, partial=True)),
    ],
)
def test_fedbuff_refuses_what_it_would_ignore(
    settings: dict[str, Any], simulation: tfr.SimulatedClients | None
) -> None:
    named = next(iter(settings), "dropout=0 and simulation.deadline_s=null")
    with pytest.raises(ConfigError, match=named):
        run(tfr.FedBuffTrainer, buffer_size=1, num_in_flight=2, simulation=simulation, **settings)


def test_scaffold_refuses_momentum_and_weights_by_samples() -> None:
    with pytest.raises(tfr.GroupCallError, match=r"learner\.momentum=0"):
        run(tfr.ScaffoldTrainer, learner="scaffold", of_learner={"momentum": 0.9})
    with pytest.raises(ConfigError, match="weighting to uniform"):
        run(tfr.ScaffoldTrainer, learner="scaffold", weighting="samples")


async def test_fedavg_of_one_client_and_a_full_batch_is_centralised_sgd_to_the_bit() -> None:
    torch.set_default_dtype(torch.float32)
    threads = torch.get_num_threads()
    recipe = {"_target_": "torchfedrpc.experiments.models.ConvNet", "channels": [2, 3]}
    dataset = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 120}
    indices = np.arange(77)
    client = {"dataset": dataset, "model": recipe, "indices": indices, "batch_size": 77, "learning_rate": 0.1}
    model = build_model(recipe, seed=1)
    async with tfr.LearnerProxy("classification", {"a": client}, runtime="local") as proxy:
        trainer = tfr.FedAvgTrainer({"num_rounds": 5}, proxy, initial_weights=copy_weights(model))
        found = await trainer.train()
    assert found is not None
    data = tfr.build(dataset).train
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.set_num_threads(1)  # as learners have
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(data.inputs[indices]), data.labels[indices])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.set_num_threads(threads)
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("trainer", "settings"),
    [
        (tfr.FedAdamTrainer, {"beta1": 1.5}),
        (tfr.FedAdamTrainer, {"tau": 0}),
        (tfr.FedYogiTrainer, {"beta2": 1}),
        (tfr.FedAdagradTrainer, {"server_learning_rate": -1}),
        (tfr.FedAvgMTrainer, {"server_momentum": 1.5}),
        (tfr.FedBuffTrainer, {"server_learning_rate": -1}),
        (tfr.FedProxTrainer, {"mu": True}),
        (tfr.FedProxTrainer, {"mu": float("inf")}),
        (tfr.DittoTrainer, {"penalty": -1}),
    ],
)
def test_numbers_out_of_range_are_refused(trainer: type[tfr.FedAvgTrainer], settings: dict[str, Any]) -> None:
    name = next(iter(settings))
    learner = "ditto" if trainer is tfr.DittoTrainer else "classification"
    with pytest.raises(ConfigError, match=f"the trainer's {name} must be a number"):
        run(trainer, learner=learner, **settings)


def test_steps_may_be_counted_instead_of_epochs() -> None:
    expected = sum(share(client, COHORTS[0]) * descended(client, W, steps=2) for client in COHORTS[0])
    assert run(tfr.FedAvgTrainer, local_steps=2) == near(np.asarray(expected))
    with pytest.raises(ConfigError, match="simulated clients count epochs"):
        run(tfr.FedAvgTrainer, local_steps=2, simulation=tfr.SimulatedClients())


class Idle:
    """A learner that does nothing."""

    def __init__(self, client_id: str) -> None: ...


def test_complex_parameters_are_refused() -> None:
    async def main() -> None:
        async with tfr.LearnerProxy(Idle, ["a"], runtime="local") as proxy:
            with pytest.raises(ConfigError, match="FedAdamTrainer cannot step w, which is complex"):
                tfr.FedAdamTrainer({}, proxy, initial_weights={"w": torch.zeros(2, dtype=torch.complex64)})

    asyncio.run(main())
