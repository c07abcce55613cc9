"""Position of this process in a launch by torchrun, srun or mpirun, read from environment variables."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torchfedrpc.errors import ConfigError

_DEFAULT_PORT = 29500  # that of torchrun
_PORTS = range(20000, 29500)  # below the ports that systems assign to connections


@dataclass(frozen=True)
class _Launcher:
    """Variables by which a launcher gives each process its position; torchrun's need no translation.

    Attributes:
        name: The command.
        rank: Rank of the process.
        world_size: Number of processes.
        local_rank: Rank of the process on its machine.
        num_local: Number of processes on its machine; srun lists those of all machines.
        nodes: List of the machines, rank 0's first, if a scheduler has assigned them.
        job: Variables that identify the launch on its machines.
    """

    name: str
    rank: str
    world_size: str
    local_rank: str
    num_local: str
    nodes: str
    job: tuple[str, ...] = ()


# In this order: within a Slurm allocation, mpirun starts its daemons by srun, and ranks inherit a daemon's variables.
# Of a Slurm job only srun's tasks are ranks: SLURM_NTASKS and SLURM_PROCID are also set in a batch script and a shell
# of salloc, where SLURM_STEP_NUM_TASKS is missing or 1. MPI_LOCALRANKID tells mpiexec from srun --mpi=pmi2.
_LAUNCHERS = (
    _Launcher(
        name="mpirun",
        rank="OMPI_COMM_WORLD_RANK",
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        num_local="OMPI_COMM_WORLD_LOCAL_SIZE",
        nodes="SLURM_JOB_NODELIST",
        job=("PMIX_NAMESPACE",),
    ),
    _Launcher(
        name="mpiexec",  # of MPICH and Intel MPI
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        num_local="MPI_LOCALNRANKS",
        nodes="SLURM_JOB_NODELIST",
    ),
    _Launcher(
        name="srun",
        rank="SLURM_PROCID",
        world_size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        num_local="SLURM_STEP_TASKS_PER_NODE",
        nodes="SLURM_STEP_NODELIST",
        job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
)


def _variables() -> dict[str, str]:
    """Return the environment with torch's variables of a launch, translated from those of srun or mpirun if missing.

    Raises:
        ConfigError: If the variables of the launcher and the user's do not go together.
    """
    environment = dict(os.environ)
    for launcher in _LAUNCHERS:
        if {launcher.rank, launcher.world_size, launcher.local_rank} <= environment.keys():
            return _translated(launcher, environment)
    return environment


def _translated(launcher: _Launcher, environment: dict[str, str]) -> dict[str, str]:
    """Return the environment with torch's variables; those that the user or torchrun has set are kept."""
    size = environment[launcher.world_size]
    if "RANK" in environment:  # by torchrun, or by the user
        return {"LOCAL_RANK": environment[launcher.local_rank]} | environment
    if "1" in (size, environment.get("WORLD_SIZE")):
        return environment
    if environment.get("WORLD_SIZE", size) != size:
        raise ConfigError(
            f"WORLD_SIZE={environment['WORLD_SIZE']}, and {launcher.name} has started {size} processes "
            f"({launcher.world_size}): unset WORLD_SIZE"
        )
    derived = {
        "RANK": environment[launcher.rank],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment[launcher.local_rank],
        "MASTER_PORT": str(_port(" ".join(environment.get(name, "") for name in launcher.job))),
    }
    address = environment.get("MASTER_ADDR", "")
    if environment.get(launcher.num_local) == size:
        derived |= {"MASTER_ADDR": "127.0.0.1", "GROUP_WORLD_SIZE": "1"}
    elif address and not is_loopback(address):
        derived |= {"MASTER_ADDR": address}
    elif not address and launcher.nodes in environment:
        derived |= {"MASTER_ADDR": _first_node(environment[launcher.nodes])}
    else:
        lead = f"MASTER_ADDR={address} leads to each machine itself" if address else "MASTER_ADDR is not set"
        where = "-x MASTER_ADDR=10.0.0.1" if launcher.name == "mpirun" else "-genv MASTER_ADDR 10.0.0.1"
        line = "export MASTER_ADDR=10.0.0.1" if launcher.name == "srun" else f"{launcher.name} {where} ..."
        raise ConfigError(
            f"{launcher.name} has started {size} processes on several machines, and {lead}: name the address at "
            f"which the others reach the machine of rank 0, such as {line}"
        )
    return derived | environment


def is_loopback(address: str) -> bool:
    """Return whether an address, or this name of one, leads from each machine to itself."""
    return address == "localhost" or address.startswith("127.")


def _port(job: str) -> int:
    """Return a port for a launch, which differs from that of other launches on its machines if the job is known."""
    return _PORTS[zlib.crc32(job.encode()) % len(_PORTS)] if job.strip() else _DEFAULT_PORT


def _first_node(nodes: str) -> str:
    """Return the first name of a list such as ``rack2-node[07-09,12],login1``."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert found is not None  # it matches the empty text
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", found[0])


@dataclass(frozen=True)
class Launch:
    """Position of this process in a launch of several processes.

    Attributes:
        rank: Rank of this process: 0 for the driver, 1 .. world_size - 1 for the workers.
        world_size: Number of processes in the launch.
        local_rank: Rank of this process on its machine.
        num_nodes: Number of machines in the launch; None if the launcher does not set it (torchrun does).
        master_address: Address of rank 0's machine, as the launcher names it.
        master_port: Port of the launch's store at that address.
        agent_store: Whether the launcher serves that store (torchrun does); otherwise rank 0 has to.
        is_last_attempt: Whether the launcher will not restart this process after a failure.
    """

    rank: int
    world_size: int
    local_rank: int
    num_nodes: int | None
    master_address: str
    master_port: int
    agent_store: bool
    is_last_attempt: bool = True

    @classmethod
    def from_environment(cls) -> Launch | None:
        """Return the launch of this process; None without a launch, or in a launch of one rank.

        Raises:
            ConfigError: If some of the launcher's variables are missing or not numbers.
        """
        if _hidden is not None:
            return _hidden
        environment = _variables()
        if "WORLD_SIZE" not in environment and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            raise ConfigError(
                "RANK, MASTER_ADDR and MASTER_PORT are set but WORLD_SIZE is not: set it to the launch's number of "
                "ranks, or start the script with torchrun"
            )
        try:
            if "WORLD_SIZE" not in environment or int(environment["WORLD_SIZE"]) <= 1:
                return None
            if not 0 <= int(environment["RANK"]) < int(environment["WORLD_SIZE"]):
                raise ConfigError(
                    f"RANK={environment['RANK']} is none of the {environment['WORLD_SIZE']} ranks of WORLD_SIZE: "
                    f"they are numbered from 0"
                )
            return cls(
                rank=int(environment["RANK"]),
                world_size=int(environment["WORLD_SIZE"]),
                local_rank=int(environment.get("LOCAL_RANK", "0")),
                num_nodes=int(environment["GROUP_WORLD_SIZE"]) if "GROUP_WORLD_SIZE" in environment else None,
                master_address=environment["MASTER_ADDR"],
                master_port=int(environment["MASTER_PORT"]),
                agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                is_last_attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
                >= int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")),
            )
        except KeyError as error:
            raise ConfigError(
                f"WORLD_SIZE is set but {error.args[0]} is not: start the script with torchrun or srun, or unset "
                f"WORLD_SIZE"
            ) from None
        except ValueError as error:
            raise ConfigError(f"a launcher's variable is no number: {error}") from None


# By these, libraries find that they are in a launch of torchrun, mpirun or srun. RANK is not among them: it tells a
# reader which process it is, and no library that there are others.
_PLACE = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
    r"|(OMPI_COMM_WORLD|PMI|PMIX|MV2_COMM_WORLD)_\w+|MPI_LOCAL\w+|SLURM_(NTASKS|PROCID|LOCALID|STEP_NUM_TASKS)"
)
_hidden: Launch | None = None  # the launch whose variables are hidden


@contextmanager
def hidden_from_learners(launch: Launch) -> Iterator[None]:
    """Remove the variables of this process's launch but RANK from the environment, and restore them at the end.

    A learner's library that finds them, such as accelerate or Lightning, takes its training for a part of a training
    on all ranks, and waits for the other ranks.
    """
    global _hidden
    taken = {name: os.environ.pop(name) for name in list(os.environ) if _PLACE.fullmatch(name)}
    before, _hidden = _hidden, launch
    try:
        yield
    finally:
        _hidden = before
        os.environ.update(taken)


_RANK_PID = "TORCHFEDRPC_RANK_PID"


def is_process_of_rank() -> bool:
    """Return whether this process is a rank other than 0 of a launch, and not a child process of such a rank.

    Children inherit the launcher's variables, so the first process that calls this counts as the rank.
    """
    try:
        if _variables().get("RANK", "0") == "0":
            return False
    except ConfigError:  # the script's `run` raises it
        return False
    return os.environ.setdefault(_RANK_PID, str(os.getpid())) == str(os.getpid())


_is_worker = False


def become_worker() -> None:
    """Mark this process as a worker, which serves learners."""
    global _is_worker
    _is_worker = True


def check_is_driver() -> Launch | None:
    """Check that this process may drive a run.

    Returns:
        The launch that this process drives; None without a launch.

    Raises:
        ConfigError: If this process is a worker, or a rank other than 0.
    """
    if _is_worker:
        raise ConfigError(
            "a worker process imports the script, and the script starts a run as it is imported: put that under "
            'if __name__ == "__main__":'
        )
    launch = Launch.from_environment()
    if launch is not None and launch.rank != 0:
        raise ConfigError(
            f"this is rank {launch.rank}, and only rank 0 opens a proxy: start the script's main coroutine by "
            f"tfr.run(main), which lets the other ranks serve learners"
        )
    return launch
