"""The runtime configuration: accepted forms, and the error of each mistake."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import re
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from learners import Probe
from omegaconf import OmegaConf, ValidationError

import torchfedrpc as tfr
from torchfedrpc.config import DeviceMap, ExecutionMode, Isolation, LogLevel, OnWorkerLost, RuntimeConfig, Transport
from torchfedrpc.errors import ConfigError
from torchfedrpc.executors.router import resolve_mode

CHOICES = {
    "on_worker_lost": OnWorkerLost,
    "isolation": Isolation,
    "device_map": DeviceMap,
    "transport": Transport,
    "worker_log_level": LogLevel,
}
FIELDS = [item.name for item in dataclasses.fields(RuntimeConfig)]


@pytest.mark.parametrize(
    "keys",
    [
        {"execution_mode": "local", "num_clients": 3},
        {"execution_mode": "pseudo", "num_processes": 4, "use_multiprocessing": True},
        {
            "execution_mode": "distributed",
            "client_endpoints": {"client_1": "worker1", "client_2": "rank:2", "client_3": "local"},
        },
    ],
    ids=lambda keys: keys["execution_mode"],
)
@pytest.mark.parametrize("wrap", [dict, MappingProxyType, OmegaConf.create], ids=["dict", "mapping", "omegaconf"])
def test_the_three_configurations_are_accepted_as_they_stand(keys: dict[str, Any], wrap: Any) -> None:
    config = RuntimeConfig.of(wrap(keys))
    assert config == RuntimeConfig(**keys)
    assert {name: getattr(config, name) for name in keys} == keys


def test_an_omegaconf_node_gives_plain_containers() -> None:
    node = OmegaConf.create(
        {
            "count": 4,
            "runtime": {
                "num_clients": "${count}",
                "trusted_modules": ["site_tools"],
                "client_endpoints": {"a": "local"},
            },
        }
    )
    config = RuntimeConfig.of(node.runtime)
    assert config.num_clients == 4
    assert type(config.trusted_modules) is list
    assert type(config.client_endpoints) is dict


def test_a_structured_omegaconf_node_is_accepted() -> None:
    node = OmegaConf.merge(OmegaConf.structured(RuntimeConfig), {"num_clients": 2})
    assert RuntimeConfig.of(node) == RuntimeConfig(num_clients=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["auto", "local", "pseudo", "distributed", "a_mode_of_ones_own"])
def test_a_modes_name_is_a_configuration(mode: str) -> None:
    assert RuntimeConfig.of(mode) == RuntimeConfig(execution_mode=mode)


def test_runtime_of_none_means_the_defaults() -> None:
    assert RuntimeConfig.of(None) == RuntimeConfig()


def test_the_defaults_are_those_that_are_promised() -> None:
    promised = {
        "execution_mode": "auto",
        "call_timeout_s": 300,
        "heartbeat_timeout_s": 10,
        "on_worker_lost": "recover",
        "max_recoveries": 3,
        "isolation": "value",
        "torch_threads": 1,
        "max_concurrent_calls": 1,
        "device_map": "auto",
        "trusted_modules": [],
        "transport": "auto",
    }
    config = RuntimeConfig()
    assert {name: getattr(config, name) for name in promised} == promised


def test_a_configuration_is_copied_and_checked_again() -> None:
    config = RuntimeConfig(num_clients=2, trusted_modules=["lab"], client_endpoints={"a": "local"})
    copied = RuntimeConfig.of(config)
    assert copied == config
    config.client_endpoints["b"] = "worker1"
    config.trusted_modules.append("os")
    assert (copied.client_endpoints, copied.trusted_modules) == ({"a": "local"}, ["lab"])
    with pytest.raises(ConfigError, match="must not name os"):
        RuntimeConfig.of(config)


def test_containers_that_are_given_stay_the_callers_own() -> None:
    given = {"trusted_modules": ["lab"], "channels": ["basic"], "client_endpoints": {"a": "local"}}
    config = RuntimeConfig(**given)  # type: ignore[arg-type]
    for container in given.values():
        container.clear()  # type: ignore[attr-defined]
    assert (config.trusted_modules, config.channels, config.client_endpoints) == (["lab"], ["basic"], {"a": "local"})
    assert RuntimeConfig(trusted_modules=("lab",)).trusted_modules == ["lab"]  # type: ignore[arg-type]


async def test_a_proxy_copies_its_configuration() -> None:
    config = RuntimeConfig(execution_mode="local", num_clients=2)
    async with tfr.LearnerProxy(Probe, runtime=config) as proxy:
        config.trusted_modules.append("lab")
        config.client_endpoints["client_9"] = "worker1"
        assert "lab" not in proxy.trusted_modules
        assert proxy.mode == "local"
        assert type(proxy.mode) is str  # it may be an argument of a learner, where our Enums may not travel
        assert await proxy.custom_method("client_1", "same", 1) == 1
    with pytest.raises(ConfigError, match="client_9"):
        tfr.LearnerProxy(Probe, runtime=config)


@pytest.mark.parametrize("make", [RuntimeConfig, copy.deepcopy, pickle.dumps, RuntimeConfig.of, "omegaconf"])
def test_a_configuration_cannot_be_set_after_its_checks(make: Any) -> None:
    config = RuntimeConfig(call_timeout_s=5)
    if make == "omegaconf":
        config = OmegaConf.to_object(OmegaConf.structured(config))  # type: ignore[assignment]
    elif make is pickle.dumps:
        config = pickle.loads(pickle.dumps(config))
    elif make is not RuntimeConfig:
        config = make(config)
    with pytest.raises(ConfigError, match=r"call_timeout_s .*dataclasses\.replace\(config, call_timeout_s=-1\)"):
        config.call_timeout_s = -1
    assert config.call_timeout_s == 5
    assert dataclasses.replace(config, call_timeout_s=7).call_timeout_s == 7
    with pytest.raises(ConfigError, match="must be above 0 seconds"):
        dataclasses.replace(config, call_timeout_s=-1)


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_is_a_member_that_equals_its_name(key: str) -> None:
    for member in CHOICES[key]:
        assert member == member.name
        for given in (member, str(member)):
            value = getattr(RuntimeConfig(**{key: given}), key)  # type: ignore[arg-type]
            assert value is member
            assert value == str(member) == f"{value}"
    assert isinstance(getattr(RuntimeConfig(), key), CHOICES[key])


def test_a_modes_name_is_a_member_where_the_mode_is_ours() -> None:
    for mode in ExecutionMode:
        assert RuntimeConfig(execution_mode=str(mode)).execution_mode is mode
        assert RuntimeConfig(execution_mode=mode).execution_mode == mode.name
    assert RuntimeConfig(execution_mode="a_mode_of_ones_own").execution_mode == "a_mode_of_ones_own"


def test_a_configuration_with_choices_is_plain_data_for_json() -> None:
    config = RuntimeConfig(execution_mode="pseudo", isolation=Isolation.none, on_worker_lost=OnWorkerLost.fail)
    assert RuntimeConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("key", CHOICES)
def test_a_structured_node_takes_choices_by_name_and_refuses_others(key: str) -> None:
    node = OmegaConf.structured(RuntimeConfig)
    for member in CHOICES[key]:
        node[key] = member.name
        assert getattr(RuntimeConfig.of(node), key) is member
        assert OmegaConf.select(OmegaConf.create(OmegaConf.to_yaml(node)), key) == member.name
    with pytest.raises(ValidationError, match=r"expected one of \["):
        node[key] = "nonsense"


def test_no_two_configurations_share_a_container() -> None:
    first, second = RuntimeConfig(), RuntimeConfig()
    first.client_endpoints["a"] = "local"
    first.trusted_modules.append("site_tools")
    assert (second.client_endpoints, second.trusted_modules) == ({}, [])


@pytest.mark.parametrize("name", FIELDS)
def test_every_key_is_described(name: str) -> None:
    assert re.search(rf"^ {{4}}{name}: \S", inspect.getdoc(RuntimeConfig) or "", re.MULTILINE)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("num_client", "'num_clients'"),
        ("executionmode", "'execution_mode'"),
        ("num_proceses", "'num_processes'"),
        ("client_endpoint", "'client_endpoints'"),
        ("call_timeout", "'call_timeout_s'"),
        ("heartbeat_timeout", "'heartbeat_timeout_s'"),
        ("max_pending", "'max_pending_calls'"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"^unknown key runtime\.{key} \(did you mean .*{nearest}"):
        RuntimeConfig.of({key: 1})


@pytest.mark.parametrize("key", ["zzz", "", 7, None])
def test_a_key_near_none_lists_all(key: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^unknown key runtime\.{key} \(known: ") as caught:
        RuntimeConfig.of({key: 1})
    assert all(repr(name) in str(caught.value) for name in FIELDS)


@pytest.mark.parametrize("runtime", [3, 1.5, True, ["local"], {"local"}, SimpleNamespace(num_clients=3), object])
def test_object_that_is_no_configuration_is_refused(runtime: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^runtime must be a RuntimeConfig, a mapping, an OmegaConf node or a mode"
    ):
        RuntimeConfig.of(runtime)


def test_an_omegaconf_list_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match=r"^runtime must be .* not list$"):
        RuntimeConfig.of(OmegaConf.create(["local"]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("execution_mode", None),
        ("execution_mode", 1),
        ("num_clients", "3"),
        ("num_clients", 3.0),
        ("num_clients", True),
        ("num_processes", "4"),
        ("num_processes", 2.5),
        ("num_processes", False),
        ("use_multiprocessing", 1),
        ("use_multiprocessing", "true"),
        ("use_multiprocessing", None),
        ("client_endpoints", None),
        ("client_endpoints", ["worker1"]),
        ("client_endpoints", {"client_1": 1}),
        ("client_endpoints", {1: "worker1"}),
        ("client_endpoints", "worker1"),
        ("call_timeout_s", "300"),
        ("call_timeout_s", True),
        ("heartbeat_timeout_s", None),
        ("heartbeat_timeout_s", "10"),
        ("on_worker_lost", None),
        ("on_worker_lost", False),
        ("max_recoveries", 3.0),
        ("max_recoveries", None),
        ("journal_max_calls", None),
        ("journal_max_bytes", 1e9),
        ("max_pending_calls", "100"),
        ("max_pending_calls", True),
        ("max_inflight_bytes", None),
        ("max_inflight_bytes", "512M"),
        ("isolation", None),
        ("interface", 0),
        ("deterministic", "yes"),
        ("torch_threads", None),
        ("torch_threads", 1.0),
        ("max_concurrent_calls", "2"),
        ("device_map", None),
        ("trusted_modules", "numpy"),
        ("trusted_modules", [1]),
        ("trusted_modules", None),
        ("transport", 1),
    ],
)
def test_error_of_a_wrong_type_names_key_and_value(key: str, value: Any) -> None:
    message = rf"^runtime\.{key} must be .*, not {re.escape(repr(value))} \({type(value).__name__}\)$"
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig.of({key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_clients", 0, "at least 1, not 0"),
        ("num_clients", -1, "at least 1, not -1"),
        ("torch_threads", 0, "at least 1, not 0"),
        ("max_concurrent_calls", 0, "at least 1, not 0"),
        ("workers_per_device", 0, "at least 1, not 0"),
        ("num_processes", -1, "must not be negative, it is -1"),
        ("call_timeout_s", 0, "above 0 seconds (None for no limit), but it is 0"),
        ("call_timeout_s", -0.5, "above 0 seconds (None for no limit), but it is -0.5"),
        ("call_timeout_s", float("nan"), "above 0 seconds (None for no limit), but it is nan"),
        ("call_timeout_s", float("inf"), "above 0 seconds (None for no limit), but it is inf"),
        ("heartbeat_timeout_s", 0.9, "at least 1 second and finite, but it is 0.9"),
        ("heartbeat_timeout_s", float("inf"), "at least 1 second and finite, but it is inf"),
        ("heartbeat_timeout_s", float("nan"), "at least 1 second and finite, but it is nan"),
        ("on_worker_lost", "retry", "one of recover, fail, not 'retry'"),
        ("max_recoveries", -1, "at least 0, not -1"),
        ("journal_max_calls", 0, "at least 1, not 0"),
        ("journal_max_bytes", -1, "at least 0, not -1"),
        ("max_pending_calls", 0, "at least 1, not 0"),
        ("max_inflight_bytes", 0, "at least 1, not 0"),
        ("isolation", "copy", "one of value, none, not 'copy'"),
        ("max_resident_learners", 0, "at least 1, not 0"),
        ("channels", ["mpt_uv"], "among mpt_uv, cma, basic, the last of them included, not ['mpt_uv']"),
        ("channels", ["basic", "ibv"], "the last of them included, not ['basic', 'ibv']"),
        ("transport", "ibv", "one of auto, uv, shm, not 'ibv'"),
        ("device_map", "cuda:0", "one of auto, none, not 'cuda:0'"),
        ("device_map", "", "one of auto, none, not ''"),
    ],
)
def test_error_of_a_value_out_of_range_names_the_bounds(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^runtime\.{key} .*{re.escape(message)}$"):
        RuntimeConfig(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_clients", None),
        ("num_processes", 0),
        ("call_timeout_s", None),
        ("call_timeout_s", 1),
        ("call_timeout_s", 0.01),
        ("heartbeat_timeout_s", 1),
        ("on_worker_lost", "fail"),
        ("max_recoveries", 0),
        ("journal_max_calls", 1),
        ("journal_max_bytes", 0),
        ("max_pending_calls", None),
        ("max_pending_calls", 1),
        ("max_inflight_bytes", 1),
        ("interface", "wg0"),
        ("trusted_modules", ["site_tools", "lab"]),
        ("client_endpoints", MappingProxyType({"a": "local"})),
    ],
)
def test_a_value_at_the_edge_is_accepted(key: str, value: Any) -> None:
    assert getattr(RuntimeConfig(**{key: value}), key) == value


def test_error_of_pseudo_mode_without_a_process_says_what_to_set() -> None:
    message = "num_processes is 0, and pseudo mode .*num_processes=1 or more, or .*=local$"
    with pytest.raises(ConfigError, match=message):
        resolve_mode(RuntimeConfig(execution_mode="pseudo", num_processes=0), None)


@pytest.mark.parametrize("mode", ["auto", "local", "distributed"])
def test_the_number_of_processes_is_ignored_in_other_modes(mode: str) -> None:
    assert RuntimeConfig(execution_mode=mode, num_processes=0).num_processes == 0


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({"num_clients": 2}, ["client_1", "client_2"]),
        ({"num_processes": 3}, ["client_1", "client_2", "client_3"]),
        ({"num_clients": 1, "num_processes": 3}, ["client_1"]),
        ({"client_endpoints": {"b": "local", "a": "local"}}, ["b", "a"]),
        ({"client_endpoints": {"b": "local"}, "num_processes": 2}, ["b"]),
        ({"client_endpoints": {"client_2": "local"}, "num_clients": 2}, ["client_1", "client_2"]),
    ],
)
def test_clients_are_made_from_what_tells_their_number(keys: dict[str, Any], ids: list[str]) -> None:
    assert RuntimeConfig(**keys).default_client_ids() == ids


@pytest.mark.parametrize("keys", [{}, {"num_processes": 0}])
def test_without_a_number_of_clients_the_ways_to_give_one_are_named(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"clients=\[\.\.\.\].* or set runtime\.num_clients"):
        RuntimeConfig(**keys).default_client_ids()


@pytest.mark.parametrize("module", ["operator", "builtins", "os", "subprocess", "functools", "os.path"])
def test_a_module_of_the_standard_library_cannot_be_trusted(module: str) -> None:
    with pytest.raises(ConfigError, match="could run anything"):
        RuntimeConfig(trusted_modules=[module])


def test_a_key_cannot_be_deleted() -> None:
    config = tfr.RuntimeConfig()
    with pytest.raises(tfr.ConfigError, match=r"keeps transport: make another one by dataclasses\.replace"):
        del config.transport
