"""Options of hydra's groups that registered classes and functions make: ``_target_``, and settings with defaults."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.protocol_checks import GIVEN, positional_of
from torchfedrpc.experiments.user_modules import KINDS, find, names, target_of
from torchfedrpc.federation.trainer import AbstractFederationTrainer

_SEED = "${seed}"
_BASE_SETTINGS = {
    "num_rounds": 20,
    "clients_per_round": None,
    "seed": _SEED,
}  # of `AbstractFederationTrainer`


class RegisteredOptions(ConfigSource):
    """Source of hydra's that has an option for each registered name. Files in hydra's search path come first."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme of its path in hydra's search path."""
        return "torchfedrpc"

    def available(self) -> bool:
        """Return True: the registries are always there."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Return whether the path is a group of `KINDS`, or the root."""
        return config_path.strip("/") in ("", *KINDS)

    def is_config(self, config_path: str) -> bool:
        """Return whether the path is a group and a registered name; a file of the current folder may have it."""
        kind, name = _split(config_path)
        return kind in KINDS and find(kind, name) is not None

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the option of a path."""
        kind, name = _split(config_path)
        config = OmegaConf.create(option_of(kind, find(kind, name)))
        return ConfigResult(self.provider, self.full_path(), config, header={"package": None})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the groups, or the names of a group; files of the current folder are not imported."""
        kind = config_path.strip("/")
        if kind in KINDS:
            return [] if results_filter == ObjectType.GROUP else names(kind)
        return [] if kind or results_filter == ObjectType.CONFIG else sorted(KINDS)


class RegisteredOptionsPath(SearchPathPlugin):
    """Puts `RegisteredOptions` into hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append it as a "schema": hydra puts ``--config-dir`` before the first of these."""
        search_path.append(provider="schema", path=f"{RegisteredOptions.scheme()}://")


def register_options() -> None:
    """Let hydra find the options of registered names. A second call does nothing."""
    plugins = Plugins.instance()
    for plugin in (RegisteredOptions, RegisteredOptionsPath):
        if plugin not in plugins.discover():
            plugins.register(plugin)


def option_of(kind: str, entry: Any) -> dict[str, Any]:
    """Return the option of a registered class or function.

    Its settings are those of the nearest registered base class, the parameters with their defaults, and of a trainer
    its ``settings``. A parameter ``seed`` is the experiment's seed; one without default must be given by the user.

    Raises:
        ConfigError: If it is defined inside a function, where no other process finds it.
    """
    if "<" in entry.__qualname__:
        raise ConfigError(
            f"the {kind} {KINDS[kind].name_of(entry)!r} is defined inside a function, where workers do not find it: "
            f"move {entry.__qualname__.rpartition('.')[2]} to the top level of {entry.__module__}"
        )
    base, settings = _settings_of_trainer(entry) if kind == "trainer" else _settings_of_parameters(kind, entry)
    inherited = {} if base is None else {"defaults": [base, "_self_"]}
    return {**inherited, "_target_": target_of(entry), **settings}


def modules_of(config: Any) -> list[str]:
    """Return the ``imports`` of a configuration; it may be one name, or lack them."""
    value = OmegaConf.select(config, "imports")
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def imports_of(arguments: Sequence[str]) -> list[str]:
    """Return the modules that a command line names by ``imports=``, or by an ``experiment=`` of its ``--config-dir``.

    Hydra composes the configuration from what these modules register, so it cannot be asked for them.
    """
    known, _ = get_args_parser().parse_known_args(arguments)
    found: list[str] = []
    for override in known.overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "imports":
            found += modules_of(OmegaConf.from_dotlist([f"imports={value}"]))
        if key == "experiment" and known.config_dir is not None:
            files = [Path(known.config_dir, "experiment", f"{name}.yaml") for name in value.split(",")]
            found += [module for file in files if file.is_file() for module in modules_of(OmegaConf.load(file))]
    return list(dict.fromkeys(found))


def _split(config_path: str) -> tuple[str, str]:
    kind, _, name = config_path.strip("/").removesuffix(".yaml").partition("/")
    return kind, name


def _settings_of_trainer(entry: Any) -> tuple[str | None, dict[str, Any]]:
    if not (isinstance(entry, type) and issubclass(entry, AbstractFederationTrainer)):
        return None, {}
    base, _ = _registered_base("trainer", entry)
    return base, {**({} if base else _BASE_SETTINGS), **entry.all_settings()}


def _settings_of_parameters(kind: str, entry: Any) -> tuple[str | None, dict[str, Any]]:
    base, is_constructor_inherited = _registered_base(kind, entry)
    if is_constructor_inherited:
        return base, {}
    parameters = list(inspect.signature(entry).parameters.values())
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    settings = {
        parameter.name: _SEED if parameter.name == "seed" else _plain(parameter.default)
        for parameter in parameters[len(positional_of(kind, entry)) :]
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and parameter.name not in GIVEN.get(kind, ())
        and _is_plain(parameter.default)
    }
    return base if passes_on else None, settings


def _registered_base(kind: str, entry: Any) -> tuple[str | None, bool]:
    """Return the name of the nearest registered base class, and whether the constructor is inherited from it."""
    for base in entry.__mro__[1:] if isinstance(entry, type) else ():
        if (name := KINDS[kind].name_of(base)) is not None:
            return name, getattr(entry, "__init__") is getattr(base, "__init__")  # noqa: B009 - mypy
    return None, False


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or value is inspect.Parameter.empty or type(value) in (bool, int, float, str)


def _plain(value: Any) -> Any:
    if value is inspect.Parameter.empty:
        return "???"  # OmegaConf's mark of a mandatory value
    return list(value) if isinstance(value, tuple) else value
