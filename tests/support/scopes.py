"""Scopes of calls that no host runs."""

from __future__ import annotations

from typing import Any

import torch

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.host.call import Call
from torchfedrpc.host.call_scope import CallScope
from torchfedrpc.host.mailbox import Job, Mailbox
from torchfedrpc.host.process_state import ProcessState
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.wire.packing import Reference


class Idle:
    """A learner without methods."""

    def __init__(self, client_id: str) -> None: ...


def process_state(device: torch.device | None = None) -> ProcessState:
    """The state of this process as of now, for calls on this thread."""
    runtime = RuntimeConfig(torch_threads=torch.get_num_threads())
    return ProcessState(LearnerSpec.of(Idle, 0, runtime)[0], device)


def scope(process: ProcessState, seed: int = 5, **kind: Any) -> CallScope:
    """The scope of a call of `Idle`."""
    job = Job(Call(1, "client_1", "method", Reference(None)), Mailbox("client_1", None))
    return CallScope(process, job, "method", seed, **kind)
