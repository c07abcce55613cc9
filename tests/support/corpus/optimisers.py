"""Kinds for each optimiser and learning-rate schedule of torch, and for what users build on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from corpus.bits import Trained, bits, weights
from corpus.registry import kind

_Params = Any

OPTIMISERS: dict[str, Callable[[_Params], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.5, centered=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.05),
    "AdamFused": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "SGDTensorRate": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05)),
}
if not hasattr(torch.optim, "Muon"):  # before torch 2.9
    del OPTIMISERS["Muon"]

# Each is made of an optimiser whose rate is 0.1, and steps after each step of it.
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: schedules.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [1, 3], gamma=0.5),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.5, total_iters=3),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 5),
    "CosineWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.2, total_steps=10),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o, 0.1, 2), schedules.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.1, 2), schedules.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, 0.01, 3),
}


class _Scheduled(Trained):
    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.schedule = self.make_schedule()

    def make_optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def make_schedule(self) -> Any:
        raise NotImplementedError

    def step(self) -> str:
        loss = self.train()
        self.schedule.step()
        group = self.optimiser.param_groups[0]
        return bits(loss, group["lr"], group["momentum"], self.schedule.get_last_lr(), *self.model.parameters())


def _define(name: str, base: type, doc: str, **members: Any) -> None:
    """A class of this module, so that pickle finds it by its name."""
    globals()[name] = cls = type(name, (base,), {"__module__": __name__, "__doc__": doc, **members})
    kind(*["step"] * 4)(cls)


for _name, _make in OPTIMISERS.items():

    def _make_optimiser(self: Trained, make: Any = _make) -> torch.optim.Optimizer:
        # Muon takes matrices only.
        return make([p for p in self.model.parameters() if p.ndim == 2 or make is not OPTIMISERS.get("Muon")])

    _define(f"Optimiser{_name}", Trained, f"`{_name}`.", make_optimiser=_make_optimiser)

for _name, _make in SCHEDULES.items():

    def _make_schedule(self: _Scheduled, make: Any = _make) -> Any:
        return make(self.optimiser)

    _define(f"Schedule{_name}", _Scheduled, f"`{_name}`.", make_schedule=_make_schedule)


@kind(*["step"] * 4)
class OptimiserLBFGS(Trained):
    """`LBFGS`, whose steps take a closure."""

    def make_optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.model.parameters(), lr=0.1, max_iter=2)

    def step(self) -> str:
        def closure() -> Tensor:
            self.optimiser.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return bits(self.optimiser.step(closure), *self.model.parameters())


@kind()
class OptimiserSparseAdam:
    """`SparseAdam` for an embedding."""

    def __init__(self, client_id: str) -> None:
        self.embedding = nn.Embedding(10, 3, sparse=True)
        self.optimiser = torch.optim.SparseAdam(self.embedding.parameters(), lr=0.1)

    def step(self) -> str:
        self.optimiser.zero_grad()
        self.embedding(torch.randint(10, (4,))).square().sum().backward()
        self.optimiser.step()
        return bits(self.embedding.weight)


class CountingSGD(torch.optim.SGD):
    """Decays the rate by the number of its steps, which it keeps outside of `state`."""

    def __init__(self, parameters: _Params, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.num_steps = 0

    def step(self, closure: Any = None) -> Any:
        self.num_steps += 1
        self.param_groups[0]["lr"] = 0.1 / self.num_steps
        return super().step(closure)


@kind(*["step"] * 4)
class OptimiserSubclass(Trained):
    """A subclass of SGD with a counter as an attribute."""

    def make_optimiser(self) -> torch.optim.Optimizer:
        return CountingSGD(self.model.parameters(), lr=0.1)


class Decay:
    """A hook that shrinks the parameters, the less the more often it was called."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, optimiser: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.count += 1
        with torch.no_grad():
            for parameter in optimiser.param_groups[0]["params"]:
                parameter.mul_(1 - 0.1 / self.count)


@kind(*["step"] * 4)
class OptimiserHook(Trained):
    """`register_step_post_hook` with an object that counts."""

    def make_optimiser(self) -> torch.optim.Optimizer:
        optimiser = torch.optim.SGD(self.model.parameters(), lr=0.05)
        optimiser.register_step_post_hook(Decay())
        return optimiser


@kind(refused="'optimiser'")
class OptimiserHookByLambda(Trained):
    """`register_step_post_hook` with a lambda."""

    def make_optimiser(self) -> torch.optim.Optimizer:
        optimiser = torch.optim.SGD(self.model.parameters(), lr=0.05)
        optimiser.register_step_post_hook(lambda *_: self.model.weight.data.mul_(0.9))
        return optimiser


@kind("step", "widen", "step", "step")
class OptimiserGroups(Trained):
    """A group of parameters that is added to the optimiser later."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.scale = nn.Parameter(torch.ones(1))

    def loss(self) -> Tensor:
        return nn.functional.mse_loss(self.scale * self.model(self.x), self.y)

    def widen(self) -> str:
        self.optimiser.add_param_group({"params": [self.scale], "lr": 0.01, "label": "scale"})
        return self.step()

    def step(self) -> str:
        return bits(super().step(), self.scale, [group.get("label") for group in self.optimiser.param_groups])


@kind(*["step"] * 4)
class OptimiserPair(Trained):
    """Two optimisers that take turns on one model."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.other = torch.optim.Adam(self.model.parameters(), lr=0.05)

    def step(self) -> str:
        self.optimiser, self.other = self.other, self.optimiser
        return super().step()


@kind(*["step"] * 4)
class OptimiserOwnState(Trained):
    """State that a learner keeps in `optimiser.state`, as SCAFFOLD's control variates."""

    def step(self) -> str:
        result = super().step()
        for parameter in self.model.parameters():
            entry = self.optimiser.state[parameter]
            entry["control"] = entry.get("control", 0) + parameter.detach()
        return bits(result, [self.optimiser.state[p]["control"] for p in self.model.parameters()])


@kind(*["step"] * 4, refused="'schedule'")
class ScheduleLambda(_Scheduled):
    """`LambdaLR` with a lambda."""

    def make_schedule(self) -> Any:
        return schedules.LambdaLR(self.optimiser, lambda epoch: 0.5**epoch)


class Halving:
    """A schedule's factor as an object."""

    def __init__(self) -> None:
        self.base = 0.5

    def __call__(self, epoch: int) -> float:
        return self.base**epoch


@kind(*["step"] * 4)
class ScheduleObject(_Scheduled):
    """`LambdaLR` with a callable object."""

    def make_schedule(self) -> Any:
        return schedules.LambdaLR(self.optimiser, Halving())


@kind(*["step"] * 4, refused="'schedule'")
class ScheduleMultiplicative(_Scheduled):
    """`MultiplicativeLR` with a lambda."""

    def make_schedule(self) -> Any:
        return schedules.MultiplicativeLR(self.optimiser, lambda epoch: 0.9)


@kind(*["step"] * 4)
class SchedulePlateau(_Scheduled):
    """`ReduceLROnPlateau`."""

    def make_schedule(self) -> Any:
        return schedules.ReduceLROnPlateau(self.optimiser, patience=0, threshold=0.9)

    def step(self) -> str:
        loss = self.train()
        self.schedule.step(loss)
        return bits(loss, self.optimiser.param_groups[0]["lr"], self.schedule.num_bad_epochs, self.schedule.best)


@kind(*["step"] * 4)
class ScaledGradients(Trained):
    """`torch.amp.GradScaler`."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def step(self) -> str:
        self.optimiser.zero_grad()
        self.scaler.scale(self.loss()).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return bits(self.scaler.get_scale(), *self.model.parameters())


@kind(*["step"] * 4)
class AveragedWeights(Trained):
    """`AveragedModel` with equal weights."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.average = AveragedModel(self.model)

    def step(self) -> str:
        self.train()
        self.average.update_parameters(self.model)
        return weights(self.average)


@kind(*["step"] * 4, refused="'average'")
class AveragedExponentially(AveragedWeights):
    """`AveragedModel` with torch's exponential average, which is a closure."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


@kind(*["step"] * 4)
class AveragedByHand(Trained):
    """An exponential average as a dict of tensors."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.shadow = {name: value.clone() for name, value in self.model.state_dict().items()}

    def step(self) -> str:
        self.train()
        for name, value in self.model.state_dict().items():
            self.shadow[name].lerp_(value, 0.1)
        return bits(self.shadow)
