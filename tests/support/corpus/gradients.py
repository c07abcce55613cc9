"""Kinds whose state is in gradients, autograd graphs and hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from corpus.bits import Trained, bits, problem, weights
from corpus.registry import SAME, ask, kind

GRAPH = "an autograd graph"
HOOK = "a hook on a tensor"


@kind(*["backward", "update"] * 2, num_clients=8)
class GradKept(Trained):
    """`backward()` in one call, `optimiser.step()` in the next, by eight clients of unequal sizes."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.size = int(client_id.rpartition("-")[2])

    def backward(self) -> str:
        for _ in range(self.size):
            (torch.ones(200, 200) @ torch.ones(200, 200)).sum()
        self.loss().backward()
        return bits(*(p.grad for p in self.model.parameters()))

    def update(self) -> str:
        self.optimiser.step()
        self.optimiser.zero_grad()
        return weights(self.model)


@kind("backward", "backward", "backward", "update")
class GradAccumulated(GradKept):
    """Gradients that add up over several calls before a step."""

    def update(self) -> str:
        self.optimiser.step()
        return weights(self.model)


@kind("backward", "update", "backward", "update")
class GradOfPlainTensor:
    """A plain tensor with `requires_grad` whose `.grad` is kept."""

    def __init__(self, client_id: str) -> None:
        self.w = torch.zeros(1, requires_grad=True)

    def backward(self) -> str:
        (self.w - 3).square().sum().backward()
        return bits(self.w.grad)

    def update(self) -> str:
        with torch.no_grad():
            if self.w.grad is not None:
                self.w -= 0.1 * self.w.grad
        return bits(self.w, self.w.grad)


@kind("zero", "look", "zero", "look")
class GradOfZeros(Trained):
    """Gradients zeroed in place, which are not `None`."""

    def zero(self) -> str:
        self.loss().backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=False)
        return weights(self.model)

    def look(self) -> str:
        self.optimiser.step()  # by momentum, where there is a gradient
        return bits([p.grad is None for p in self.model.parameters()], *self.model.parameters())


@kind("backward", "clip", "backward", "clip")
class GradAliased(Trained):
    """A list of the parameters' gradients, which is scaled in place."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.gradients: list[Any] = []

    def backward(self) -> str:
        self.loss().backward()
        self.gradients = [p.grad for p in self.model.parameters()]
        return bits(*self.gradients)

    def clip(self) -> str:
        for gradient in self.gradients:
            gradient.mul_(0.5)
        self.optimiser.step()
        return weights(self.model)


@kind("backward", "update", "backward", "update")
class GradSparse:
    """A sparse gradient of an embedding."""

    def __init__(self, client_id: str) -> None:
        self.embedding = nn.Embedding(10, 3, sparse=True)
        self.optimiser = torch.optim.SGD(self.embedding.parameters(), lr=0.1)

    def backward(self) -> str:
        self.embedding(torch.tensor([1, 2, 2])).square().sum().backward()
        gradient = self.embedding.weight.grad
        return bits(gradient.is_coalesced(), gradient._nnz(), gradient.to_dense())

    def update(self) -> str:
        self.optimiser.step()
        return bits(self.embedding.weight)


@kind("backward", "look", "backward", "look")
class GradTransposed:
    """A gradient whose strides are those of a transposed matrix."""

    def __init__(self, client_id: str) -> None:
        self.w = torch.randn(300, 200).t().requires_grad_()

    def backward(self) -> str:
        (self.w * self.w.sin()).sum().backward()
        return bits(self.w.grad.stride())

    def look(self) -> str:
        return bits(self.w.grad.stride(), self.w.grad.view(-1) if self.w.grad.is_contiguous() else "gaps")


@kind("forward", ask("backward", 2.0), "forward", ask("backward", 3.0), refused=GRAPH)
class GraphKept(Trained):
    """Split learning: activations with their graph in one call, `backward(gradient)` in the next."""

    activations: Any = None

    def forward(self) -> str:
        self.activations = self.model(self.x)
        return bits(self.activations)

    def backward(self, scale: float) -> str:
        self.optimiser.zero_grad()
        self.activations.backward(torch.full_like(self.activations, scale))
        self.optimiser.step()
        return weights(self.model)


@kind("forward", ask("backward", 2.0), "forward", ask("backward", 3.0), refused=GRAPH, ways={"evicted": SAME})
class GraphDropped(GraphKept):
    """Split learning that drops the graph after its backward pass."""

    def backward(self, scale: float) -> str:
        result = super().backward(scale)
        self.activations = None
        return result


@kind(refused=GRAPH)
class GraphInHistory(Trained):
    """A list of losses that were not detached."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.losses: list[Tensor] = []

    def step(self) -> str:
        self.losses.append(self.loss())
        self.optimiser.zero_grad()
        torch.stack(self.losses[-1:]).sum().backward(retain_graph=True)
        self.optimiser.step()
        return bits(len(self.losses), self.losses[0].requires_grad, self.losses[0].grad_fn is None)


@kind(refused=GRAPH)
class GraphOfAView(Trained):
    """A row of a weight kept as a view, through which gradients flow."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.row = self.model.weight[0]

    def step(self) -> str:
        self.optimiser.zero_grad()
        self.row.square().sum().backward(retain_graph=True)
        self.optimiser.step()
        return weights(self.model)


@kind(refused=GRAPH)
class GraphRetained(Trained):
    """A non-leaf tensor that retains its gradient."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.hidden = self.model(self.x)
        self.hidden.retain_grad()

    def step(self) -> str:
        self.hidden.sum().backward(retain_graph=True)
        return bits(self.hidden.grad, self.model.bias.grad)


def double(gradient: Tensor) -> Tensor:
    """A hook of the learner's module."""
    return 2 * gradient


@kind(refused=HOOK)
class HookByLambda(Trained):
    """A lambda as hook on a parameter."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.model.weight.register_hook(lambda gradient: 2 * gradient)


@kind(refused=HOOK)
class HookByFunction(Trained):
    """A function of the module as hook on a parameter."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.model.weight.register_hook(double)


@kind(refused=HOOK)
class HookAfterAccumulation(Trained):
    """A hook that runs the optimiser as soon as a gradient has been accumulated."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(self._update)

    @staticmethod
    def _update(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    def step(self) -> str:
        self.loss().backward()
        return weights(self.model)


class Counting:
    """A hook that counts, and scales the output."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        self.count += 1
        return output * 1.5


@kind()
class ModuleHookByObject(Trained):
    """A forward hook that is an object with a count."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.hook = Counting()
        self.model.register_forward_hook(self.hook)

    def step(self) -> str:
        return bits(super().step(), self.hook.count)


@kind(refused="'model'")
class ModuleHookByLambda(Trained):
    """A forward hook that is a lambda."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.model.register_forward_hook(lambda module, inputs, output: output * 1.5)


@kind(refused="'model'")
class ModuleHookOfBackward(Trained):
    """A full backward hook that is a function."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.seen = 0
        self.model.register_full_backward_hook(self._see)

    def _see(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        self.seen += 1

    def step(self) -> str:
        return bits(super().step(), self.seen)


class Cube(torch.autograd.Function):
    """A function with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


@kind()
class CustomFunction(Trained):
    """An autograd function of the learner's module."""

    def loss(self) -> Tensor:
        return 0.01 * Cube.apply(self.model(self.x) - self.y).abs().mean()


@kind()
class Checkpointed(Trained):
    """Activation checkpointing with dropout."""

    def loss(self) -> Tensor:
        return checkpoint(self._inner, self.x, use_reentrant=False)

    def _inner(self, x: Tensor) -> Tensor:
        return (nn.functional.dropout(self.model(x), 0.5) - self.y).square().mean()


@kind()
class SecondOrder(Trained):
    """A gradient of a gradient within a call."""

    def loss(self) -> Tensor:
        loss = super().loss()
        (gradient,) = torch.autograd.grad(loss, [self.model.weight], create_graph=True)
        return loss + 0.1 * gradient.square().sum()


@kind()
class FunctionalGrad(Trained):
    """`torch.func.grad` over the parameters."""

    def step(self) -> str:
        names = dict(self.model.named_parameters())

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return (torch.func.functional_call(self.model, parameters, (self.x,)) - self.y).square().mean()

        with torch.no_grad():
            for name, gradient in torch.func.grad(loss)({k: v.detach() for k, v in names.items()}).items():
                names[name] -= 0.05 * gradient
        return weights(self.model)


@kind()
class DetachedAlias(Trained):
    """A detached alias of a weight that is trained."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.watched = self.model.weight.detach()

    def step(self) -> str:
        self.train()
        return bits(self.watched, self.model.weight)


@kind()
class Autocast(Trained):
    """Training in bfloat16 by autocast."""

    def loss(self) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().loss().float()


@kind("freeze", "step", "thaw", "step")
class Frozen(Trained):
    """A layer that a call freezes and another thaws."""

    def freeze(self) -> str:
        self.model.weight.requires_grad_(False)
        return self.step()

    def thaw(self) -> str:
        self.model.weight.requires_grad_(True)
        return self.step()


@kind()
class GradOfData:
    """An input that is optimised beside the model, as attacks do."""

    def __init__(self, client_id: str) -> None:
        self.x, self.y = problem()
        self.model = nn.Linear(4, 1)
        self.x.requires_grad_()
        self.optimiser = torch.optim.Adam([self.x], lr=0.1)

    def step(self) -> str:
        nn.functional.mse_loss(self.model(self.x), self.y).backward()
        self.optimiser.step()
        return bits(self.x, self.x.grad, self.model.weight.grad)
