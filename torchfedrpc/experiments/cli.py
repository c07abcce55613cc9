"""The ``torchfedrpc`` command: runs an experiment or a sweep configured by hydra, or a subcommand."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.experiments.job import one_line, read_job
from torchfedrpc.experiments.options import imports_of, modules_of, register_options
from torchfedrpc.experiments.run_folder import CONFIG_FILE, error_text, run_in_folder
from torchfedrpc.experiments.sweeps.plugins import check_installed, register
from torchfedrpc.experiments.sweeps.sweep import summarised
from torchfedrpc.experiments.user_modules import (
    KINDS,
    add_current_folder_to_path,
    find,
    import_user_module,
    is_bundled,
    target_of,
)
from torchfedrpc.run import drive

COMMANDS = {
    "compare": "torchfedrpc.experiments.commands.compare",
    "check": "torchfedrpc.check_cli",
    "info": "torchfedrpc.experiments.commands.info",
    "new": "torchfedrpc.experiments.commands.new",
    "resume": "torchfedrpc.experiments.commands.resume",
    "report": "torchfedrpc.experiments.commands.report",
}
"""Subcommand -> module with ``main(arguments: Sequence[str]) -> int``, which returns the exit status."""

_OF_RESUMING = {"resume": "", "checkpoint_every": ""}  # settings that may differ when a sweep goes on
_FULL_ERROR = "HYDRA_FULL_ERROR"
_IS_OURS = "TORCHFEDRPC_FULL_ERROR"  # set beside the variable above, where the user has not set that

OmegaConf.register_new_resolver("torchfedrpc.commands", lambda: ", ".join(COMMANDS), replace=True)
ConfigStore.instance().store(group="runtime", name="schema", node=RuntimeConfig)


@hydra.main(version_base="1.3", config_path="pkg://torchfedrpc.conf", config_name="config")
def _task(config: DictConfig) -> float | None:
    """Run one job and return the final test accuracy, which sweepers optimise.

    If a job of a sweep fails, it returns None: hydra goes on, and an optimiser counts the trial as failed.
    """
    hydra_config = HydraConfig.get()
    output_dir = Path(hydra_config.runtime.output_dir)
    with _variables_of_the_user():
        if hydra_config.mode != RunMode.MULTIRUN:
            _note_modules(config)
            return run_in_folder(config, output_dir)
        try:
            _note_modules(config)
            if config.resume == "auto" and (accuracy := _accuracy_if_done(config, output_dir)) is not None:
                num = hydra_config.job.num
                print(f"job {num} is done already: test accuracy {accuracy:.3f}, {output_dir}", flush=True)
                return accuracy
            return run_in_folder(config, output_dir)
        except Exception as error:
            if os.environ.get(_FULL_ERROR) == "1":
                traceback.print_exception(error)
            print(f"job {hydra_config.job.num} failed: {one_line(error)}", file=sys.stderr, flush=True)
            return None


def _note_modules(config: DictConfig) -> None:
    """Add the modules that register the chosen options to ``imports``: other processes, and a resume, need them.

    Raises:
        ConfigError: If a config file of the same name as a registered option has another target.
    """
    modules = modules_of(config)
    for kind, name in HydraConfig.get().runtime.choices.items():
        entry = find(kind, name) if kind in KINDS and isinstance(name, str) else None
        if entry is None or is_bundled(entry):
            continue
        if config[kind].get("_target_") != target_of(entry):
            raise ConfigError(
                f"{kind}={name} is the name of a config file, with the target {config[kind].get('_target_')}, and of "
                f"the registered {target_of(entry)}: rename one of them"
            )
        modules.append(entry.__module__)
    with open_dict(config):
        config.imports = list(dict.fromkeys(modules))


def _accuracy_if_done(config: DictConfig, output_dir: Path) -> float | None:
    """Return the accuracy of an earlier job in this folder; None if it is not done, or had other settings."""
    earlier = read_job(output_dir)
    path = output_dir / CONFIG_FILE
    if earlier.get("status") != "done" or not path.is_file():
        return None
    files = OmegaConf.to_yaml(config, resolve=True), path.read_text(encoding="utf-8")
    present, former = ({**OmegaConf.create(file), **_OF_RESUMING} for file in files)
    return earlier.get("accuracy") if present == former else None


def main() -> None:
    """Run the command line; on the other ranks of a launch, serve learners until rank 0 ends."""
    add_current_folder_to_path()
    module = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        if module is not None:
            sys.exit(importlib.import_module(module).main(sys.argv[2:]))
        with _errors_of_hydra():
            drive(_run_hydra)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if os.environ.get(_FULL_ERROR) == "1":
            raise
        sys.exit(_composition_error_text(error) or error_text(error, adds_keys=module is None))


def _run_hydra() -> None:
    """Import the user's modules, from which hydra composes the configuration, and run hydra."""
    completed = os.environ.get("COMP_LINE", "").split()[1:]
    with suppress(*[ConfigError] if completed else []):
        for module in imports_of(completed or sys.argv[1:]):
            import_user_module(module)
    check_installed(sys.argv[1:])
    register_options()
    register()
    with summarised():
        _task()


@contextmanager
def _errors_of_hydra() -> Iterator[None]:
    """Let hydra raise its errors in a block, rather than print them with an advice to set a variable."""
    before = os.environ.get(_FULL_ERROR)
    if before == "1":
        yield
        return
    os.environ.update({_FULL_ERROR: "1", _IS_OURS: "1"})
    try:
        yield
    finally:
        for name in (_FULL_ERROR, _IS_OURS):
            os.environ.pop(name, None)
        if before is not None:
            os.environ[_FULL_ERROR] = before


@contextmanager
def _variables_of_the_user() -> Iterator[None]:
    """Undo `_errors_of_hydra` in a block, also in a process that inherits the variables: workers inherit them too."""
    ours = {_FULL_ERROR: "1", _IS_OURS: "1"} if _IS_OURS in os.environ else {}
    for name in ours:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(ours)


def _composition_error_text(error: Exception) -> str | None:
    """Return what the command prints of an error of hydra's; None for other errors."""
    if not isinstance(error, CompactHydraException):
        return None
    if isinstance(error, MissingConfigException):
        kind, _, name = (error.missing_cfg_file or "").removesuffix(".yaml").partition("/")
        if kind in KINDS:
            near = suggest(name, error.options or ())
            return (
                f"torchfedrpc: no {kind} named {name!r}{near}: there is no file {kind}/{name}.yaml in --config-dir, "
                f"and no @tfr.{kind}({name!r}) in a module of imports=[...] or in a *.py file of {Path.cwd()}"
            )
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        text = error_text(cause)
    else:
        text = f"torchfedrpc: {error}{f' {cause}' if isinstance(cause, OmegaConfBaseException) else ''}"
    return text + _job_text(error)


def _job_text(error: Exception) -> str:
    """Return which job of a sweep hydra failed to compose: its settings that are none of the whole sweep."""
    for frame, _ in traceback.walk_tb(error.__traceback__):  # hydra's errors do not have the job
        if frame.f_code.co_name == ConfigLoader.load_sweep_config.__name__:
            of_job, of_sweep = (frame.f_locals.get(name) for name in ("sweep_overrides", "master_config"))
            if of_job is None or of_sweep is None:  # another hydra
                return ""
            own = [one for one in of_job if one not in of_sweep.hydra.overrides.task]
            return f" (in the job with {' '.join(own)})" if own else ""
    return ""
