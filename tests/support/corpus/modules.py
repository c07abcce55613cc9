"""Kinds whose state is in torch modules: layers, flags, hooks and shared weights; and learners that are modules."""

from __future__ import annotations

import copy
import functools
import types
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from corpus.bits import Trained, bits, problem, weights
from corpus.registry import ask, kind


@kind("step", "evaluate", "step", "evaluate")
class BatchNorm(Trained):
    """Batch normalisation, trained and evaluated in turns."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def step(self) -> str:
        self.model.train()
        self.train()
        return weights(self.model)

    def evaluate(self) -> str:
        self.model.eval()
        return bits(self.loss())


@kind("step", "calm", "step", "step")
class Dropout(Trained):
    """Dropout, switched off for good by a call."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def calm(self) -> str:
        self.model[1].eval()
        return self.step()


@kind()
class Lstm(Trained):
    """An LSTM whose hidden state goes from call to call."""

    hidden: Any = None

    def make_model(self) -> nn.Module:
        return nn.LSTM(4, 3, batch_first=True)

    def loss(self) -> Tensor:
        out, hidden = self.model(self.x[None], self.hidden)
        self.hidden = tuple(part.detach() for part in hidden)
        return (out.sum(-1, keepdim=True) - self.y).square().mean()

    def step(self) -> str:
        return bits(super().step(), self.hidden)


@kind()
class Transformer(Trained):
    """`TransformerEncoderLayer`, whose activation is a function."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 1))


@kind()
class Attention(Trained):
    """`MultiheadAttention`."""

    def make_model(self) -> nn.Module:
        return nn.MultiheadAttention(4, 2, batch_first=True)

    def loss(self) -> Tensor:
        return self.model(self.x[None], self.x[None], self.x[None])[0].sub(self.y).square().mean()


@kind()
class Convolution(Trained):
    """A convolution in `channels_last`."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)).to(memory_format=torch.channels_last)

    def loss(self) -> Tensor:
        images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        return self.model(images).square().mean()

    def step(self) -> str:
        return bits(super().step(), self.model[0].weight.stride())


@kind()
class TiedWeights(Trained):
    """Encoder and decoder with one weight."""

    def make_model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    def step(self) -> str:
        return bits(super().step(), self.model[0].weight is self.model[1].weight)


@kind()
class HeadAlias(Trained):
    """An attribute that is a parameter of the model."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.head = self.model.weight

    def step(self) -> str:
        self.train()
        return bits(self.head, self.head is self.model.weight)


@kind()
class ModelAliases(Trained):
    """A dict with two names for one model, of which one is trained and the other evaluated."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.models = {"global": self.model, "best": copy.deepcopy(self.model)}

    def step(self) -> str:
        self.train()
        return bits(weights(self.models["global"]), weights(self.models["best"]))


@kind()
class Personalised(Trained):
    """A deep copy of the model that is trained towards it."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.personal = copy.deepcopy(self.model)
        self.personal_optimiser = torch.optim.SGD(self.personal.parameters(), lr=0.1)

    def step(self) -> str:
        self.train()
        self.personal_optimiser.zero_grad()
        pairs = zip(self.personal.parameters(), self.model.parameters(), strict=True)
        sum((p - q.detach()).square().sum() for p, q in pairs).backward()
        self.personal_optimiser.step()
        return weights(self.personal)


@kind("step", "grow", "step")
class ModuleContainers(Trained):
    """`ModuleDict`, `ParameterList` and `ParameterDict`, which a call extends."""

    def make_model(self) -> nn.Module:
        return nn.ModuleDict(
            {
                "layers": nn.ModuleDict({"a": nn.Linear(4, 1)}),
                "list": nn.ParameterList([torch.ones(1)]),
                "dict": nn.ParameterDict({"b": torch.ones(1)}),
            }
        )

    def loss(self) -> Tensor:
        out = sum(layer(self.x) for layer in self.model["layers"].values())
        scale = sum(self.model["list"]) + sum(self.model["dict"].values())
        return (scale * out - self.y).square().mean()

    def grow(self) -> str:
        self.model["layers"]["c"] = nn.Linear(4, 1)
        self.model["list"].append(torch.ones(1))
        self.optimiser = self.make_optimiser()
        return self.step()

    def step(self) -> str:
        return bits(super().step(), list(self.model["layers"]), len(self.model["list"]))


@kind(refused="'model'")
class Orthogonal(Trained):
    """A weight that `parametrizations.orthogonal` keeps orthogonal."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 1))


@kind(refused="'model'")
class WeightNormParametrised(Trained):
    """`parametrizations.weight_norm`."""

    def make_model(self) -> nn.Module:
        return parametrizations.weight_norm(nn.Linear(4, 1))


@kind(refused="'model'")
class SpectralNormParametrised(Trained):
    """`parametrizations.spectral_norm`, which iterates at each forward pass."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 1))


@kind(refused="'model'")
class SpectralNormByHook(Trained):
    """The older `nn.utils.spectral_norm`, a hook of the module."""

    def make_model(self) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 1))


@kind(refused="'model'")
class Pruned(Trained):
    """A layer that was pruned, by a hook of the module."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), nn.Linear(4, 1))

    def make_optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.05)


@kind()
class LazyLayer(Trained):
    """A lazy layer that the first call completes."""

    optimiser_made = False

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(1))

    def make_optimiser(self) -> torch.optim.Optimizer:
        self.model(torch.randn(2, 4))
        return super().make_optimiser()


class Buffers(nn.Module):
    """A module with a persistent buffer and one that state_dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.scratch -= 1
        return self.linear(x) * (1 - 0.01 * self.calls) + 0.01 * self.scratch


@kind()
class BuffersAndCounters(Trained):
    """A module of the learner's package with buffers that `state_dict` leaves out, and a plain counter."""

    def make_model(self) -> nn.Module:
        return Buffers()

    def step(self) -> str:
        return bits(super().step(), self.model.scratch, self.model.calls)


class ExtraState(nn.Module):
    """A module with extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.history: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        self.history.append(float(out.detach().sum()))
        return out

    def get_extra_state(self) -> dict[str, Any]:
        return {"history": self.history}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.history = state["history"]


@kind()
class ModuleExtraState(Trained):
    """A module with `get_extra_state`."""

    def make_model(self) -> nn.Module:
        return ExtraState()

    def step(self) -> str:
        return bits(super().step(), self.model.history)


@kind(refused="'model'")
class CompiledModule(Trained):
    """`module.compile()`, which is part of the module."""

    def make_model(self) -> nn.Module:
        model = nn.Linear(4, 1)
        model._compiled_call_impl = functools.partial(_one_more, model)  # as Module.compile() sets it
        return model


def _one_more(model: nn.Linear, x: Tensor) -> Tensor:
    return model.forward(x) + 1


@kind(refused="'model'")
class ScriptedModule(Trained):
    """A model compiled by `torch.jit.script`."""

    def make_model(self) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.script(nn.Linear(4, 1))


def doubled(self: nn.Linear, x: Tensor) -> Tensor:
    """A forward pass that replaces a module's own."""
    return 2 * nn.functional.linear(x, self.weight, self.bias)


@kind(refused="'model'")
class PatchedForward(Trained):
    """A model whose `forward` was replaced on the instance."""

    def make_model(self) -> nn.Module:
        model = nn.Linear(4, 1)
        model.forward = types.MethodType(doubled, model)
        return model


@kind("step", "cut", "step")
class LayersRemoved(Trained):
    """A `Sequential` from which a call removes a layer."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Softsign())

    def cut(self) -> str:
        del self.model[1]
        return self.step()


@kind()
class HalfModel(Trained):
    """A model in bfloat16."""

    def make_model(self) -> nn.Module:
        return nn.Linear(4, 1).bfloat16()

    def loss(self) -> Tensor:
        return (self.model(self.x.bfloat16()).float() - self.y).square().mean()


@kind("step", "swap", "step")
class ParameterReplaced(Trained):
    """A parameter that a call replaces by another object."""

    def swap(self) -> str:
        self.model.weight = nn.Parameter(self.model.weight.detach() * 2)
        self.optimiser = self.make_optimiser()
        return self.step()


@kind(*[ask("receive", scale) for scale in (1.0, 2.0, 3.0)])
class WeightsReceived(Trained):
    """Weights that arrive with each call, with their distance from those before."""

    previous: Any = None

    def receive(self, scale: float) -> str:
        self.train()
        state = {name: value * scale for name, value in self.model.state_dict().items()}
        drift = None if self.previous is None else sum((state[name] - self.previous[name]).sum() for name in state)
        self.previous = state
        self.model.load_state_dict(state)
        return bits(drift, weights(self.model))


# Learners that are modules themselves.


@kind()
class LearnerIsModule(nn.Module):
    """A learner that is a module, with plain attributes."""

    def __init__(self, client_id: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.x, self.y = problem()
        self.optimiser = torch.optim.Adam(self.parameters(), lr=0.05)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def step(self) -> str:
        self.count += 1
        self.optimiser.zero_grad()
        (self(self.x) - self.y).square().mean().backward()
        self.optimiser.step()
        return bits(self.count, *self.parameters())


@kind(*["step"] * 4)
class ModuleCachedProperty(nn.Module):
    """A learner that is a module, whose cached property training deletes."""

    def __init__(self, client_id: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        _ = self.norm

    @functools.cached_property
    def norm(self) -> float:
        return float(self.weight.detach().norm())

    def step(self) -> str:
        before = self.norm
        with torch.no_grad():
            self.weight += 1
        del self.norm
        return bits(before)


@kind(*["step"] * 3)
class ModuleAttributeDeleted(nn.Module):
    """A learner that is a module, which deletes an attribute, a buffer and a layer."""

    def __init__(self, client_id: str) -> None:
        super().__init__()
        self.warm_up = 3
        self.linear, self.spare = nn.Linear(2, 1), nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros(1))

    def step(self) -> str:
        had = [hasattr(self, name) for name in ("warm_up", "spare", "seen")]
        for name in ("warm_up", "spare", "seen"):
            if hasattr(self, name):
                delattr(self, name)
        return bits(had, len(list(self.parameters())))


@kind("step", "calm", "step", "look")
class ModuleModes(nn.Module):
    """A learner that is a module in evaluation mode, with a frozen layer and a hook by object."""

    def __init__(self, client_id: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def step(self) -> str:
        return bits(self.layers(torch.ones(3, 2)))

    def calm(self) -> str:
        self.eval()
        self.layers[0].requires_grad_(False)
        return self.step()

    def look(self) -> str:
        return bits(self.training, [p.requires_grad for p in self.parameters()])


@kind("backward", "update", "backward", "update")
class ModuleGradKept(nn.Module):
    """A learner that is a module and keeps gradients between calls."""

    def __init__(self, client_id: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.optimiser = torch.optim.SGD(self.parameters(), lr=1.0)

    def backward(self) -> str:
        self.w.sum().backward()
        return bits(self.w.grad)

    def update(self) -> str:
        self.optimiser.step()
        return bits(self.w)


@kind()
class ModuleStateDict(nn.Module):
    """A learner that is a module with a `state_dict` of its own."""

    def __init__(self, client_id: str) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.count = 0

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"count": self.count, "linear": self.linear.state_dict()}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        self.count = state["count"]
        self.linear.load_state_dict(state["linear"])

    def step(self) -> str:
        self.count += 1
        with torch.no_grad():
            self.linear.weight += self.count
        return bits(self.count, self.linear.weight)


# Compiled modules.


@kind(refused="'model'")
class Compiled(Trained):
    """A model that `torch.compile` wraps."""

    def make_model(self) -> nn.Module:
        model: Any = torch.compile(nn.Linear(4, 1), backend="eager")
        assert isinstance(model, nn.Module)
        return model


@kind(refused="'model'")
class CompiledInPlace(Trained):
    """A model compiled in place, by its `compile()`."""

    def make_model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        model.compile(backend="eager")
        return model


@kind()
class CompiledStateDict(Compiled):
    """A compiled model whose weights are in `state_dict()` of the learner."""

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x, "y": self.y, "model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.x, self.y = state["x"], state["y"]
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
