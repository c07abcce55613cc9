"""Recipes: what they make, what they may name, and what is said where they cannot."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.models import LogisticRegression
from torchfedrpc.experiments.recipe import build, locate

HERE = [__name__]
num_made = 0
imported = OrderedDict  # a name of this module that another defines


class Pair:
    """Keeps what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        global num_made
        num_made += 1
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, value: Any) -> Pair:
        """One with that value."""
        return cls(value)

    class Inner:
        """A class in a class."""


def divide(numerator: int, denominator: int) -> float:
    """May fail."""
    return numerator / denominator


def target(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"{__name__}.{name}", **arguments}


# What they make.


def test_a_recipe_calls_its_target() -> None:
    assert build(target("divide", numerator=3), HERE, denominator=4) == 0.75


def test_extra_arguments_arrive_as_they_are() -> None:
    marker = object()
    made = build(target("Pair", plain=[1, 2]), HERE, extra=marker)
    assert made.kwargs == {"plain": [1, 2], "extra": marker}


def test_a_recipe_in_another_is_called_first() -> None:
    inner = target("divide", numerator=1, denominator=2)
    made = build(target("Pair", _args_=[inner, {"deep": [inner]}], kept=(inner,)), HERE)
    assert made.args == (0.5, {"deep": [0.5]})
    assert made.kwargs == {"kept": (0.5,)}


def test_a_partial_recipe_is_called_later() -> None:
    made = build(target("Pair", later=target("divide", _partial_=True, numerator=1)), HERE)
    assert made.kwargs["later"](denominator=4) == 0.25


def test_methods_and_inner_classes_of_a_trusted_package_are_found() -> None:
    assert build(target("Pair.of", value=3), HERE).args == (3,)
    assert type(build(target("Pair.Inner"), HERE)) is Pair.Inner


def test_text_is_never_interpolated() -> None:
    assert build(target("Pair", text="${oc.env:HOME}"), HERE).kwargs == {"text": "${oc.env:HOME}"}


def test_models_of_this_library_and_torch_nn_need_no_trust() -> None:
    assert isinstance(build({"_target_": "torchfedrpc.experiments.models.LogisticRegression"}), LogisticRegression)
    linear = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
    relu = {"_target_": "torch.nn.modules.activation.ReLU"}
    model = build({"_target_": "torch.nn.Sequential", "_args_": [linear, relu]})
    assert isinstance(model, torch.nn.Sequential)
    optimiser = build({"_target_": "torch.optim.AdamW", "lr": 0.1}, params=model.parameters())
    assert isinstance(optimiser, torch.optim.AdamW)
    schedule = {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.5}
    assert isinstance(build(schedule, optimizer=optimiser), torch.optim.lr_scheduler.ExponentialLR)
    activation = {"_target_": "torch.nn.ReLU", "_partial_": True}
    assert build(activation)()(torch.tensor(-1.0)) == 0


def test_an_error_of_the_target_is_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        build(target("divide", numerator=1, denominator=0), HERE)


# What they may name.

REFUSED = [
    *("os.system", "posix.system", "subprocess.run", "subprocess.Popen", "builtins.eval", "builtins.exec"),
    *("torch.utils.collect_env.run", "distutils.spawn.spawn", "torch.fx.graph_module._exec_with_source"),
    *("torch.load", "torch.hub.load", "torch.jit.load", "torch.nn", "torch.nn.functional"),
    *("torch.optim.swa_utils.AveragedModel", "torch.optim.SGD.step"),
    *("torch.nn.functional.relu", "torch.nn.init.zeros_", "torch.nn.utils.skip_init", "torch.nn.Parameter"),
    *("torch.nn.functional.importlib.import_module", "torch.nn.functional.warnings.warn", "torch.nn.grad.torch.load"),
    *("torch.nn.functional.handle_torch_function", "torch.nn.functional.boolean_dispatch", "torch.nn.functional.np"),
    *("torch.nn.modules.module.register_module_forward_hook", "torch.nn.modules.module.torch.load"),
    *("torch.nn.Module.apply", "torch.nn.Module.__init__.__globals__", "torch.nn.modules.module._addindent"),
    *("torch.nn.parallel.distributed.os.system", "torch.nn.parallel.distributed.dist.init_process_group"),
    *("torchfedrpc.run", "torchfedrpc.run.drive", "torchfedrpc.experiments.cli.main", "torchfedrpc.worker_cli.main"),
    *("torchfedrpc.__main__.main", "torchfedrpc.rpc.guard.remove", "torchfedrpc.rpc.surroundings.adopt_main"),
    *(
        "torchfedrpc.rpc.processes.start_worker",
        "torchfedrpc.rpc.processes.os.system",
        "torchfedrpc.wire.file.os.kill",
    ),
    *("torchfedrpc.experiments.recipe.build", "torchfedrpc.experiments.recipe.importlib.import_module"),
    *("torchfedrpc.federation.checkpoint_store.CheckpointStore", "torchfedrpc.experiments.history.History"),
    *(
        "torchfedrpc.experiments.data.samples.torch.load",
        "torchfedrpc.experiments.data.samples.dataclass",
        "torchfedrpc.experiments.models.nn",
    ),
    *("hydra.utils.get_method", "sklearn.datasets.load_digits", "test_models.torch.load"),
]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", ["top", "in arguments", "in a list"])
def test_any_other_target_is_refused_by_name_before_anything_is_made(name: str, place: str) -> None:
    bad = {"_target_": name}
    recipe = {
        "top": bad,
        "in arguments": target("Pair", first=target("Pair"), second={"deep": bad}),
        "in a list": target("Pair", _args_=[target("Pair"), [(bad,)]]),
    }[place]
    before, modules = num_made, set(sys.modules)
    with pytest.raises(ConfigError, match=rf"may not call {name.replace('.', '[.]')}: .*runtime.trusted_modules"):
        build(recipe, HERE)
    assert num_made == before
    assert not {module for module in set(sys.modules) - modules if not module.startswith(("torch.nn", "torchfedrpc"))}


@pytest.mark.parametrize("name", ["torch.utils.collect_env.run", "torchfedrpc.rpc.surroundings.adopt_main"])
def test_neither_torch_nor_this_library_can_be_trusted_as_a_whole(name: str) -> None:
    with pytest.raises(ConfigError, match="write a function in a package of yours"):
        build({"_target_": name}, ["torch", "torchfedrpc"])


def test_a_name_that_a_trusted_package_imported_is_refused_with_the_package_that_defines_it() -> None:
    for name in ("imported", "torch.load", "sys.exit", "Pair.__init__.__globals__", "num_made"):
        with pytest.raises(ConfigError, match=f"may not call {__name__}.{name}"):
            build(target(name), HERE)


def test_the_advice_of_the_error_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_model_zoo.py").write_text("import torch\ndef small():\n    return torch.nn.Linear(1, 1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = {"_target_": "a_model_zoo.small"}
    with pytest.raises(ConfigError, match=r"add that to the others in runtime.trusted_modules=\[a_model_zoo\]"):
        build(recipe)
    assert "a_model_zoo" not in sys.modules
    assert isinstance(build(recipe, ["a_model_zoo"]), torch.nn.Linear)


def test_a_main_module_of_a_trusted_package_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("raise SystemExit('it has run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="a_package"):
        build({"_target_": "a_package.__main__.main"}, ["a_package"])


@pytest.mark.parametrize("mode", ["local", "pseudo"])
async def test_a_learner_refuses_an_untrusted_recipe_in_every_mode_alike(mode: str) -> None:
    run = {"_target_": "torch.utils.collect_env.run", "command": ["true"]}
    client = {"dataset": run, "model": run, "indices": np.arange(1)}
    runtime = {"execution_mode": mode} | ({"num_processes": 1} if mode == "pseudo" else {})
    async with tfr.LearnerProxy("classification", {"a": client}, runtime=runtime) as proxy:
        for method in ("get_model_weights", "train_epoch"):
            with pytest.raises(ConfigError, match=r"a recipe may not call torch\.utils\.collect_env\.run"):
                await proxy.custom_method("a", method)


# What is said.


def test_a_target_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"torchfedrpc\.experiments\.models\.nothing"):
        build({"_target_": "torchfedrpc.experiments.models.nothing"})
    with pytest.raises(ConfigError, match=r"torchfedrpc\.experiments\.models\.nothing"):
        locate({"_target_": "torchfedrpc.experiments.models.nothing"})


@pytest.mark.parametrize("name", ["", "dict", "torchfedrpc..models", "a b.c", "torch.nn.", 3, None, ["os", "system"]])
def test_text_that_is_no_dotted_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="_target_"):
        build(target("Pair", inner={"_target_": name}), HERE)


def test_a_recipe_without_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="_target_"):
        build({"size": 3})
    with pytest.raises(ConfigError, match="_target_"):
        locate({"size": 3})


# What is missing.


def test_a_module_that_is_not_installed_is_named_with_the_next_step() -> None:
    recipe = {"_target_": "nosuchpackage.Net"}
    with pytest.raises(ConfigError, match=r"trusted_modules=\[nosuchpackage\], and install the .*PYTHONPATH"):
        build(recipe)
    for make in (lambda: build(recipe, ["nosuchpackage"]), lambda: locate(recipe)):
        with pytest.raises(ConfigError, match=r"cannot find 'nosuchpackage\.Net': .*; install .*PYTHONPATH"):
            make()


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("torchfedrpc.experiments.models.MPL", "'MLP'"),
        ("torchfedrpc.experiments.data.digit.digits", "'digits'"),
        ("torch.nn.Linaer", "'Linear'"),
        (f"{__name__}.Pair.Iner", "'Inner'"),
    ],
)
def test_a_target_that_a_module_lacks_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot find '{name}': .*\(did you mean .*{near}"):
        build({"_target_": name}, HERE)
