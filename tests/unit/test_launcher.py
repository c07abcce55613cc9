"""The launcher's variables: which place a process has, and what is refused."""

from __future__ import annotations

import pytest

from torchfedrpc import launcher
from torchfedrpc.errors import ConfigError
from torchfedrpc.launcher import Launch, become_worker, check_is_driver

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0.example",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
OTHERS = ["GROUP_RANK", "LOCAL_WORLD_SIZE", "ROLE_RANK", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT"]


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*TORCHRUN, *OTHERS]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launcher, "_is_worker", False)


@pytest.fixture
def _launched(_no_launch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)


def test_without_variables_there_is_no_launch() -> None:
    assert Launch.from_environment() is None


@pytest.mark.usefixtures("_launched")
def test_all_of_torchruns_variables_are_read() -> None:
    assert Launch.from_environment() == Launch(
        rank=3,
        world_size=4,
        local_rank=1,
        num_nodes=2,
        master_address="node0.example",
        master_port=29500,
        agent_store=True,
    )


@pytest.mark.usefixtures("_launched")
def test_variables_that_plain_launchers_leave_out_have_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "GROUP_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name)
    launch = Launch.from_environment()
    assert launch is not None
    assert (launch.local_rank, launch.num_nodes, launch.agent_store) == (0, None, False)


@pytest.mark.usefixtures("_launched")
def test_an_agent_store_that_torchrun_does_not_offer_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    launch = Launch.from_environment()
    assert launch is not None
    assert launch.agent_store is False


@pytest.mark.usefixtures("_launched")
@pytest.mark.parametrize(("count", "is_last"), [("0", False), ("1", False), ("2", True)])
def test_the_last_attempt_of_a_launcher_that_restarts_is_known(
    monkeypatch: pytest.MonkeyPatch, count: str, is_last: bool
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    launch = Launch.from_environment()
    assert launch is not None
    assert launch.is_last_attempt == is_last


@pytest.mark.usefixtures("_launched")
@pytest.mark.parametrize("size", ["1", "0"])
def test_a_single_rank_is_no_launch(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("MASTER_ADDR")
    assert Launch.from_environment() is None


@pytest.mark.usefixtures("_launched")
@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=rf"WORLD_SIZE is set but {name} is not: start the script with torchrun"):
        Launch.from_environment()


@pytest.mark.usefixtures("_launched")
@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_WORLD_SIZE", "MASTER_PORT"])
def test_a_variable_that_is_no_number_is_shown(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "many")
    with pytest.raises(ConfigError, match=r"no number: .*'many'"):
        Launch.from_environment()


def test_a_process_of_no_launch_may_drive() -> None:
    assert check_is_driver() is None


@pytest.mark.usefixtures("_launched")
def test_rank_0_may_drive_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    launch = check_is_driver()
    assert launch is not None
    assert launch.rank == 0


@pytest.mark.usefixtures("_launched")
def test_error_of_another_rank_says_to_use_run() -> None:
    with pytest.raises(ConfigError, match=r"this is rank 3, and only rank 0 opens a proxy: .*tfr\.run\(main\)"):
        check_is_driver()


def test_error_of_a_worker_process_names_the_main_guard() -> None:
    become_worker()
    with pytest.raises(ConfigError, match='if __name__ == "__main__"'):
        check_is_driver()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "WORLD_SIZE is not: set it to the launch",
        ),
        (
            {"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "RANK=5 is none of the 2",
        ),
    ],
    ids=["no world size", "no such rank"],
)
def test_a_launch_whose_variables_do_not_go_together_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Launch.from_environment()
