"""Position of this process in a launch by torchrun or a similar launcher, read from environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torchfedrpc.errors import ConfigError


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
        environment = os.environ
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
                f"WORLD_SIZE is set but {error.args[0]} is not: start the script with torchrun, or unset WORLD_SIZE"
            ) from None
        except ValueError as error:
            raise ConfigError(f"a launcher's variable is no number: {error}") from None


_RANK_PID = "TORCHFEDRPC_RANK_PID"


def is_process_of_rank() -> bool:
    """Return whether this process is a rank other than 0 of a launch, and not a child process of such a rank.

    Children inherit the launcher's variables, so the first process that calls this counts as the rank.
    """
    if os.environ.get("RANK", "0") == "0":
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
