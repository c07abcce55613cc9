"""The shipped configuration: every option composes, and its keys change on purpose only."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from torchfedrpc.config import Isolation, OnWorkerLost, RuntimeConfig, Transport
from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments import cli  # noqa: F401 - registers the schema of the runtime
from torchfedrpc.experiments.experiment_config import ExperimentConfig
from torchfedrpc.experiments.recipe import locate
from torchfedrpc.experiments.run_folder import plain
from torchfedrpc.experiments.sweeps import sweep
from torchfedrpc.federation.callbacks import Callback

GROUPS = ["runtime", "dataset", "partition", "model", "learner", "trainer", "aggregator", "callbacks", "logger"]
GROUPS += ["cohort", "simulation"]
GROUPS += ["experiment", "hydra"]
OPTIONS = [
    (group, option.name.removesuffix(".yaml"))
    for group in GROUPS
    for option in sorted(resources.files("torchfedrpc.conf").joinpath(group).iterdir(), key=lambda file: file.name)
]

REQUIRED = {
    "leaf": ["dataset.root=leaf"],
    "femnist": ["dataset.root=leaf"],
    "hugging_face": ["dataset.data=saved"],
}
"""Option -> settings that it has no default for."""


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_module("torchfedrpc.conf", version_base="1.3"):
        yield


def _compose(*overrides: str) -> DictConfig:
    return compose("config", overrides=list(overrides))


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in node.items():
        inner = isinstance(value, DictConfig) and len(value) > 0
        keys += _keys(value, f"{prefix}{key!s}.") if inner else [f"{prefix}{key!s}"]
    return sorted(keys)


def test_the_groups_are_these() -> None:
    folders = [entry.name for entry in resources.files("torchfedrpc.conf").iterdir() if entry.is_dir()]
    assert sorted(name for name in folders if name != "__pycache__") == sorted(GROUPS)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    config = compose("config", overrides=[f"{group}={option}"], return_hydra_config=True)
    OmegaConf.resolve(config.trainer)
    overrides = [] if group == "hydra" else [f"{group}={option}", *REQUIRED.get(option, [])]
    experiment = ExperimentConfig.of(plain(_compose(*overrides)))
    for recipe in (experiment.dataset, experiment.partition, experiment.model):
        assert callable(locate(recipe))
    assert isinstance(locate(experiment.learner), type)
    assert isinstance(locate(experiment.trainer), type)
    for recipe in {**experiment.callbacks, **experiment.logger}.values():
        assert issubclass(locate(recipe), Callback)


def test_a_group_of_recipes_takes_one_option_or_several() -> None:
    assert list(_compose("logger=csv").logger) == ["csv"]
    config = _compose("logger=[csv,tensorboard]", "logger.csv.path=rounds.csv", "callbacks=[best_model]")
    assert list(config.logger) == ["csv", "tensorboard"]
    assert config.logger.csv.path == "rounds.csv"
    assert _compose("+logger.mine._target_=lab.Logger").logger.mine._target_ == "lab.Logger"


def test_the_default_is_fedavg_of_a_cnn_on_digits() -> None:
    config = _compose()
    assert config.runtime.execution_mode == "auto"
    assert config.runtime.num_clients == 10
    assert config.partition.alpha == 0.5
    assert config.trainer.num_rounds == 20
    assert config.dataset._target_.endswith("digits")
    assert config.model._target_.endswith("ConvNet")
    assert config.trainer._target_.endswith("FedAvgTrainer")


def test_the_launcher_of_a_sweep_is_the_one_that_may_run_under_torchrun() -> None:
    config = compose("config", return_hydra_config=True)
    assert config.hydra.launcher._target_ == sweep.BASIC_LAUNCHER


def test_the_seed_reaches_everything_that_draws() -> None:
    config = _compose("seed=7")
    assert config.seed == config.dataset.seed == config.partition.seed == config.trainer.seed == 7


def test_the_runtime_has_the_keys_and_defaults_of_its_dataclass() -> None:
    config = OmegaConf.to_object(_compose("runtime.num_clients=null").runtime)
    assert config == RuntimeConfig()


@pytest.mark.parametrize("runtime", ["auto", "local", "pseudo", "distributed"])
def test_overrides_reach_a_configuration_that_is_frozen_afterwards(runtime: str) -> None:
    overrides = ["runtime.execution_mode=a_mode_of_ones_own", "runtime.isolation=none", "runtime.on_worker_lost=fail"]
    overrides += ["runtime.trusted_modules=[lab]", "+runtime.client_endpoints={a: local}", "runtime.transport=shm"]
    config = ExperimentConfig.of(plain(_compose(f"runtime={runtime}", *overrides))).runtime
    assert config == RuntimeConfig(
        execution_mode="a_mode_of_ones_own",
        num_clients=10,
        isolation=Isolation.none,
        on_worker_lost=OnWorkerLost.fail,
        trusted_modules=["lab"],
        client_endpoints={"a": "local"},
        transport=Transport.shm,
    )
    with pytest.raises(ConfigError, match=r"dataclasses\.replace"):
        config.num_clients = 3


@pytest.mark.parametrize(
    "override",
    [
        "runtime.isolation=copy",
        "foo=1",
        "runtime.num_client=3",
        "runtime.num_clients=many",
        "trainer.rounds=3",
        "model=transformer",
    ],
)
def test_a_wrong_key_or_value_is_an_error(override: str) -> None:
    with pytest.raises(ConfigCompositionException):
        _compose(override)


def test_a_configuration_without_a_model_says_how_to_give_one() -> None:
    message = r"the configuration lacks model: give it on the command line, such as model=cnn; torchfedrpc --help"
    with pytest.raises(ConfigError, match=message):
        ExperimentConfig.of(plain(_compose("~model")))
    with pytest.raises(ConfigError, match="needs _target_, the dotted name of what makes it; this has none"):
        locate(ExperimentConfig.of(plain(_compose("~model._target_"))).model)


def test_the_keys_are_these() -> None:
    assert _keys(_compose()) == [
        "aggregator._target_",
        "baseline.autocast",
        "baseline.batch_size",
        "baseline.learning_rate",
        "baseline.local_epochs",
        "baseline.loss",
        "baseline.max_gradient_norm",
        "baseline.momentum",
        "baseline.num_rounds",
        "baseline.optimiser",
        "baseline.schedule",
        "baseline.weight_decay",
        "checkpoint_every",
        "client_scores",
        "cohort._target_",
        "dataset._target_",
        "dataset.seed",
        "dataset.test_fraction",
        "evaluate_every",
        "held_out",
        "imports",
        "learner._target_",
        "learner.autocast",
        "learner.batch_size",
        "learner.keep_weights",
        "learner.learning_rate",
        "learner.learning_rate_decay",
        "learner.loss",
        "learner.max_gradient_norm",
        "learner.momentum",
        "learner.optimiser",
        "learner.schedule",
        "learner.weight_decay",
        "model._target_",
        "model.batch_norm",
        "model.channels",
        "model.image_size",
        "model.in_channels",
        "model.num_classes",
        "partition._target_",
        "partition.alpha",
        "partition.min_samples",
        "partition.seed",
        "report",
        "resume",
        "runtime.call_timeout_s",
        "runtime.channels",
        "runtime.client_endpoints",
        "runtime.deterministic",
        "runtime.device_map",
        "runtime.execution_mode",
        "runtime.heartbeat_timeout_s",
        "runtime.interface",
        "runtime.isolation",
        "runtime.join_at",
        "runtime.journal_max_bytes",
        "runtime.journal_max_calls",
        "runtime.max_concurrent_calls",
        "runtime.max_inflight_bytes",
        "runtime.max_pending_calls",
        "runtime.max_recoveries",
        "runtime.max_resident_learners",
        "runtime.num_clients",
        "runtime.num_processes",
        "runtime.on_worker_lost",
        "runtime.rejoin_timeout_s",
        "runtime.token_file",
        "runtime.torch_threads",
        "runtime.transport",
        "runtime.trusted_modules",
        "runtime.use_multiprocessing",
        "runtime.worker_log_level",
        "runtime.workers_per_device",
        "seed",
        "trace",
        "trace_calls",
        "trainer._target_",
        "trainer.clients_per_round",
        "trainer.compression",
        "trainer.compression_ratio",
        "trainer.deadline_s",
        "trainer.local_epochs",
        "trainer.local_steps",
        "trainer.min_results",
        "trainer.num_rounds",
        "trainer.on_failure",
        "trainer.seed",
        "trainer.weighting",
    ]


@pytest.mark.parametrize("name", [option for group, option in OPTIONS if group == "trainer"])
def test_options_of_trainers_have_the_defaults_of_their_classes(name: str) -> None:
    config = plain(_compose(f"trainer={name}"))["trainer"]
    assert isinstance(config, dict)
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in _settings(name).items()}
    differing = {
        key: (config[key], value) for key, value in settings.items() if key in config and config[key] != value
    }
    assert differing == ({"mu": (0.1, None)} if name == "fedprox" else {})  # which has no default in a program


def _settings(name: str) -> dict[str, object]:
    found: dict[str, object] = locate(
        {"_target_": str(_compose(f"trainer={name}").trainer["_target_"])}
    ).all_settings()
    return found


def test_cohorts_that_are_drawn_by_samples_count_models_alike() -> None:
    for cohort, weighting in (("weighted", "uniform"), ("power_of_choice", "uniform"), ("round_robin", "samples")):
        assert _compose(f"cohort={cohort}").trainer.weighting == weighting
    assert _compose("cohort=weighted", "trainer.weighting=samples").trainer.weighting == "samples"
