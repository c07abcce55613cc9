"""Trainers, learners, datasets, models, partitions and aggregators of the user in the ``torchfedrpc`` command."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hydra.core.plugins import Plugins
from own_project import METHODS, history, shell, write

import torchfedrpc as tfr
from torchfedrpc.experiments import cli, extras
from torchfedrpc.experiments.options import RegisteredOptionsPath, register_options
from torchfedrpc.experiments.user_modules import KINDS, names

ALL = [f"{kind}=my_{kind}" for kind in KINDS]
QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]

Command = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with nothing imported from it, and nothing registered, before and after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    variables = dict(os.environ)
    for registry in KINDS.values():
        for name in registry.names():
            registry.get(name)  # a module registers its classes when it is first imported, and not again
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    before = set(sys.modules)
    yield tmp_path
    os.environ.clear()
    os.environ.update(variables)
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        if any(
            str(where).startswith(str(tmp_path))
            for where in [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
        ):
            del sys.modules[name]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Command:
    """Run the command in this process; what it prints, or the error that ends it."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["torchfedrpc", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            if ended.code not in (0, None):
                return str(ended.code)
        return capsys.readouterr().out

    return run


@pytest.mark.timeout(240)
def test_own_classes_of_all_kinds_give_the_same_history_in_every_mode(tmp_path: Path) -> None:
    write(tmp_path, methods=METHODS)
    arguments = ["experiment=smoke", *ALL, "trainer.mu=0.3", "baseline=null"]
    console = str(Path(sys.executable).with_name("torchfedrpc"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    for mode, start in {
        "local": [console, "runtime=local"],
        "pseudo": [sys.executable, "-m", "torchfedrpc", "runtime=pseudo", "runtime.num_processes=2"],
        "distributed": [*torchrun, "--no-python", console, "runtime=distributed"],
    }.items():
        assert f"4 clients, {mode} mode" in shell(tmp_path, *start, *arguments, f"hydra.run.dir={mode}")
    assert len(history(tmp_path / "local")) == 3
    assert history(tmp_path / "local") == history(tmp_path / "pseudo") == history(tmp_path / "distributed")
    config = yaml.safe_load((tmp_path / "local" / "config.yaml").read_text())
    assert config["imports"] == ["methods"]
    assert config["trainer"] == {
        "_target_": "methods.MyTrainer",
        "num_rounds": 3,
        "clients_per_round": None,
        "local_epochs": 1,
        **tfr.FedAvgTrainer.settings,
        "seed": 0,
        "mu": 0.3,
    }


@pytest.mark.timeout(240)
def test_a_sweep_over_own_and_bundled_trainers_runs_each(tmp_path: Path) -> None:
    write(tmp_path, methods=METHODS)
    arguments = ["experiment=smoke", "runtime=local", "learner=my_learner", "baseline=null", "hydra.sweep.dir=sweep"]
    shell(tmp_path, sys.executable, "-m", "torchfedrpc", "-m", *arguments, "trainer=fedavg,my_trainer")
    first, second = history(tmp_path / "sweep" / "0"), history(tmp_path / "sweep" / "1")
    assert len(first) == len(second) == 3
    assert first != second


def test_models_and_datasets_of_imports_may_be_built_by_bundled_learners(folder: Path, command: Command) -> None:
    write(folder, methods=METHODS)
    options = ["experiment=smoke", "runtime=local", "model=my_model", "dataset=my_dataset", "baseline=null"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extras, "available", lambda name: False)  # pictures leave fonts open
        assert "final test accuracy" in command(*options, "hydra.run.dir=out", *QUIET)
    assert len(history(folder / "out")) == 3


def test_names_are_found_in_the_file_that_registers_them_and_no_other_is_imported(
    folder: Path, command: Command
) -> None:
    write(
        folder,
        methods=METHODS,
        mentions="raise RuntimeError  # '@tfr.trainer(\"my_trainer\")'",
        broken="def (",
        another="raise RuntimeError; tfr.trainer('another')",
    )
    config = yaml.safe_load(command("--cfg", "job", "trainer=my_trainer", "trainer.mu=0.3"))
    assert config["trainer"]["_target_"] == "methods.MyTrainer"
    assert config["trainer"]["mu"] == 0.3
    assert "another" in names("trainer")
    assert {"mentions", "broken", "another"}.isdisjoint(sys.modules)


def test_a_module_of_imports_may_be_anywhere_on_the_path(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere" / "lab").mkdir(parents=True)
    write(folder / "elsewhere" / "lab", methods=METHODS)
    monkeypatch.syspath_prepend(folder / "elsewhere")
    config = yaml.safe_load(command("--cfg", "job", "imports=[lab.methods]", "trainer=my_trainer"))
    assert config["trainer"]["_target_"] == "lab.methods.MyTrainer"


def test_an_experiment_file_names_the_imports_of_its_trainer(folder: Path, command: Command) -> None:
    (folder / "lab").mkdir()
    write(folder / "lab", methods=METHODS)
    (folder / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [override /trainer: my_trainer, _self_]\nimports: [lab.methods]\n"
    (folder / "conf" / "experiment" / "mine.yaml").write_text(text)
    config = yaml.safe_load(command("--config-dir", "conf", "--cfg", "job", "experiment=mine"))
    assert config["trainer"]["_target_"] == "lab.methods.MyTrainer"
    assert config["imports"] == ["lab.methods"]


def test_a_config_file_of_the_user_comes_before_a_registered_name(folder: Path, command: Command) -> None:
    write(folder, methods=METHODS)
    (folder / "conf" / "trainer").mkdir(parents=True)
    option = folder / "conf" / "trainer" / "my_trainer.yaml"
    option.write_text("defaults: [fedavg, _self_]\n_target_: methods.MyTrainer\nmu: 7\n")
    arguments = ["--config-dir", "conf", "trainer=my_trainer"]
    assert yaml.safe_load(command("--cfg", "job", *arguments))["trainer"]["mu"] == 7
    option.write_text("defaults: [fedavg, _self_]\n")
    assert command(*arguments, *QUIET) == (
        "torchfedrpc: trainer=my_trainer is the name of a config file, with the target "
        "torchfedrpc.federation.algorithms.fedavg.FedAvgTrainer, and of the registered methods.MyTrainer: rename "
        "one of them"
    )


def test_help_and_completion_list_the_names_of_the_current_folder(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, methods=METHODS)
    told = command("--help", *QUIET)
    (trainers,) = re.findall(r"^trainer: (.*)$", told, re.MULTILINE)
    assert {"fedavg", "fedprox", "my_trainer"} <= {*trainers.split(", ")}  # and those of other tests of this process
    assert f"Other commands, each with --help: {', '.join(cli.COMMANDS)}\n" in told
    assert "methods" not in sys.modules
    for line, completions in {
        "torchfedrpc trainer=my": ["trainer=my_trainer"],
        "torchfedrpc trainer=my_trainer trainer.m": ["trainer.mu="],
    }.items():
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        assert {*completions} <= {*command("-sc", "query=bash").split()}


def test_names_that_do_not_exist_say_the_nearest_and_where_they_were_looked_for(
    folder: Path, command: Command
) -> None:
    write(folder, methods=METHODS)
    assert command("trainer=my_trainr") == (
        "torchfedrpc: no trainer named 'my_trainr' (did you mean 'my_trainer'?): there is no file "
        "trainer/my_trainr.yaml in --config-dir, and no @tfr.trainer('my_trainr') in a module of imports=[...] or in "
        f"a *.py file of {folder}"
    )
    assert "no learner named 'my_trainer' (did you mean 'my_learner'?)" in command("learner=my_trainer")
    assert command("imports=[method]", "trainer=my_trainer") == (
        "torchfedrpc: imports=method: there is no module method (did you mean 'methods'?); it must be in the current "
        f"folder {folder}, on PYTHONPATH, or installed, on the driver and its workers"
    )


def test_unknown_settings_of_own_classes_say_the_nearest(folder: Path, command: Command) -> None:
    write(folder, methods=METHODS)
    assert command("trainer=my_trainer", "trainer.num_round=3") == (
        "torchfedrpc: unknown key trainer.num_round (did you mean 'num_rounds'?); +trainer.num_round=... adds one"
    )
    assert "unknown key learner.learn_rate (did you mean 'learning_rate'" in command(
        "learner=my_learner", "learner.learn_rate=1"
    )


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ("import torchfedrpc as tfr\n1 / 0\n@tfr.trainer('mine')\nclass Mine: ...", "ZeroDivisionError: division by"),
        (
            "import no_such_package\n@tfr.trainer('mine')\nclass Mine: ...",
            "ModuleNotFoundError: No module named 'no_",
        ),
        ("@tfr.trainer('mine')\nclass Mine(:", "SyntaxError: invalid syntax"),
        ("import sys\nsys.exit('usage: mine')\n@tfr.trainer('mine')\nclass Mine: ...", "SystemExit: usage: mine"),
    ],
)
def test_a_module_that_fails_to_import_is_its_own_error_in_full(
    folder: Path, command: Command, broken: str, error: str
) -> None:
    write(folder, lab=broken)
    for arguments in (["trainer=mine"], ["imports=[lab]"]):
        told = command(*arguments)
        assert told.startswith("torchfedrpc: the module lab cannot be imported:\n")
        assert f'File "{folder / "lab.py"}", line ' in told
        assert told.splitlines()[-1].startswith(error)
        assert "HYDRA_FULL_ERROR" not in told
        assert "importlib" not in told


def test_two_definitions_of_a_name_are_refused(folder: Path, command: Command) -> None:
    write(folder, methods=METHODS, copies=METHODS)
    message = f"the trainer 'my_trainer' is registered by copies.py and methods.py in {folder}: rename one of them"
    assert command("trainer=my_trainer") == f"torchfedrpc: {message}"
    write(folder, copies="import torchfedrpc as tfr\n@tfr.trainer('fedavg')\nclass Mine(tfr.FedAvgTrainer): ...")
    assert command("imports=[copies]").splitlines() == [
        "torchfedrpc: the trainer 'fedavg' is registered already, by "
        "torchfedrpc.federation.algorithms.fedavg.FedAvgTrainer: choose another name for copies.Mine",
        "in the module copies, as it was imported",
    ]


def test_a_file_that_cannot_be_imported_by_its_name_is_to_be_renamed(folder: Path, command: Command) -> None:
    text = "import torchfedrpc as tfr\n@tfr.trainer('{0}')\nclass Mine(tfr.FedAvgTrainer): ..."
    write(folder, **{"my-methods": text.format("dashed"), "queue": text.format("shadowed")})
    assert "no module can be named so: rename the file" in command("trainer=dashed")
    told = command("trainer=shadowed")
    assert re.fullmatch(r"torchfedrpc: .*queue.py registers .* queue is already the name of another .*", told)


def test_a_class_inside_a_function_is_to_be_moved(folder: Path, command: Command) -> None:
    write(
        folder,
        methods="""
        import torchfedrpc as tfr

        def make():
            @tfr.trainer("inner")
            class Inner(tfr.FedAvgTrainer): ...

        make()
        """,
    )
    message = "the trainer 'inner' is defined inside a function, where workers do not find it: move Inner to the top"
    assert command("trainer=inner") == f"torchfedrpc: {message} level of methods"


def test_a_setting_without_default_must_be_given(folder: Path, command: Command) -> None:
    write(folder, methods="import torchfedrpc as tfr\n@tfr.dataset('files')\ndef files(path, seed=0): ...")
    told = command("dataset=files", "runtime=local", *QUIET)
    assert told == "torchfedrpc: dataset.path has no default: give it a value, dataset.path=..."


def test_options_are_registered_once_for_all_commands_of_a_process() -> None:
    for _ in range(2):
        register_options()
    assert Plugins.instance().discover().count(RegisteredOptionsPath) == 1
