"""The launcher's variables: which place a process has, and what is refused."""

from __future__ import annotations

import os

import pytest

from torchfedrpc import launcher
from torchfedrpc.errors import ConfigError
from torchfedrpc.launcher import Launch, become_worker, check_is_driver, hidden_from_learners

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
    for name in [*TORCHRUN, *OTHERS, *SALLOC, *SRUN, *OPEN_MPI, *MPICH, launcher._RANK_PID]:
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
@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"])
def test_variables_of_a_launch_are_hidden_from_learners_for_a_while(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "4")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before, launch = dict(os.environ), Launch.from_environment()
    assert launch is not None
    with hidden_from_learners(launch):
        assert before.keys() - os.environ.keys() >= {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", name}
        assert os.environ["RANK"] == before["RANK"]
        assert os.environ["SLURM_JOB_ID"] == "7"
        assert Launch.from_environment() == launch
    assert dict(os.environ) == before
    assert Launch.from_environment() == launch


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


# srun and mpirun, with the variables that Slurm 24.11, Open MPI 5.0 and MPICH 4 set.

SRUN = {
    "SLURM_JOB_ID": "6",
    "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "rack2-node[07-09,12],login1",
    "SLURM_JOB_NODELIST": "rack1-node[01-09]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.77.0.9",
}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
SALLOC = {
    **BATCH,
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NODELIST": "node1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-hub-2123@1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "9", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def _launch_of(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> Launch | None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Launch.from_environment()


def test_tasks_of_srun_are_ranks_whose_store_is_on_the_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = _launch_of(monkeypatch, SRUN)
    assert launch is not None
    assert (launch.rank, launch.world_size, launch.local_rank, launch.num_nodes) == (2, 3, 0, None)
    assert launch.master_address == "rack2-node07"
    assert 20000 <= launch.master_port < 29500
    assert not launch.agent_store
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    other = Launch.from_environment()
    assert other is not None
    assert other.master_port != launch.master_port  # two steps of a job may run at once on the same nodes


def test_tasks_of_srun_on_one_machine_meet_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = _launch_of(monkeypatch, {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3"})
    assert launch is not None
    assert (launch.num_nodes, launch.master_address) == (1, "127.0.0.1")


@pytest.mark.parametrize("variables", [BATCH, SALLOC], ids=["batch script", "shell of salloc"])
def test_a_process_in_an_allocation_that_srun_has_not_started_waits_for_no_ranks(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    assert _launch_of(monkeypatch, variables) is None
    assert not launcher.is_process_of_rank()


def test_world_size_of_1_lets_tasks_of_srun_run_jobs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _launch_of(monkeypatch, {**SRUN, "WORLD_SIZE": "1"}) is None


def test_variables_of_torch_that_a_batch_script_exports_come_before_those_of_srun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {"WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    launch = _launch_of(monkeypatch, {**SRUN, **own})
    assert launch is not None
    assert (launch.rank, launch.master_address, launch.master_port) == (2, "10.0.0.1", 29501)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=8, and srun has started 3 processes .*: unset WORLD_SIZE"):
        Launch.from_environment()


@pytest.mark.usefixtures("_launched")
def test_ranks_of_a_torchrun_that_srun_has_started_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Launch.from_environment()
    assert _launch_of(monkeypatch, SRUN) == before
    monkeypatch.delenv("LOCAL_RANK")  # as of ranks that a script of the user numbers
    launch = _launch_of(monkeypatch, {**SRUN, "SLURM_LOCALID": "5"})
    assert launch is not None
    assert (launch.rank, launch.local_rank) == (3, 5)


@pytest.mark.parametrize(
    ("variables", "rank", "world_size"),
    [({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 3, 4), (MPICH, 1, 2)],
    ids=["Open MPI", "MPICH"],
)
def test_processes_of_mpirun_on_one_machine_are_ranks(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], rank: int, world_size: int
) -> None:
    launch = _launch_of(monkeypatch, variables)
    assert launch is not None
    assert (launch.rank, launch.world_size, launch.local_rank) == (rank, world_size, 1)
    assert (launch.num_nodes, launch.master_address) == (1, "127.0.0.1")
    monkeypatch.setenv(launcher._RANK_PID, str(os.getpid()))  # which it would set
    assert launcher.is_process_of_rank()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (OPEN_MPI, r"mpirun has started 4 .* such as mpirun -x MASTER_ADDR=10\.0\.0\.1"),
        ({**MPICH, "MPI_LOCALNRANKS": "1"}, r"such as mpiexec -genv MASTER_ADDR 10\.0\.0\.1"),
        ({**SRUN, "MASTER_ADDR": "localhost"}, r"MASTER_ADDR=localhost leads to each machine itself.*export MASTER"),
    ],
    ids=["Open MPI", "MPICH", "srun"],
)
def test_a_launch_on_several_machines_that_names_no_address_is_refused_with_the_line_to_write(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        _launch_of(monkeypatch, variables)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    launch = Launch.from_environment()
    assert launch is not None
    assert (launch.master_address, launch.num_nodes) == ("10.0.0.1", None)


def test_mpirun_in_an_allocation_comes_before_the_srun_that_has_started_its_daemon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "rack1-node02"}
    launch = _launch_of(monkeypatch, {**daemon, **OPEN_MPI})
    assert launch is not None
    assert (launch.rank, launch.world_size, launch.master_address) == (3, 4, "rack1-node01")


def test_srun_with_the_interface_of_mpi_is_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = _launch_of(monkeypatch, {**SRUN, "PMI_RANK": "2", "PMI_SIZE": "3"})
    assert launch is not None
    assert launch.master_address == "rack2-node07"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-3]", "n1"), ("n[007,9]-x,m", "n007-x"), ("r[2-3]n[5,6]", "r2n5"), ("", "")],
)
def test_the_first_machine_of_a_list_is_found(nodes: str, first: str) -> None:
    assert launcher._first_node(nodes) == first
