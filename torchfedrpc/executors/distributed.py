"""Pseudo and distributed mode: where their workers come from."""

from __future__ import annotations

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.executors.admission import Admission
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.call_executor import CallExecutor
from torchfedrpc.executors.durations import Durations
from torchfedrpc.executors.placement import ClientEndpoint, addresses
from torchfedrpc.executors.remote import RemoteLearners
from torchfedrpc.executors.stateful import StatefulLearners
from torchfedrpc.executors.stateless import StatelessLearners
from torchfedrpc.host.process import default_num_workers
from torchfedrpc.registry import executor
from torchfedrpc.rpc.handshake import load_token
from torchfedrpc.rpc.launch import current_workers
from torchfedrpc.rpc.sources import DialledSource, JoinedSource, ProcessSource, Source
from torchfedrpc.rpc.surroundings import Surroundings


@executor("pseudo")
class PseudoExecutor(CallExecutor):
    """Executor that starts ``num_processes`` workers on loopback, replaces lost ones, and ends them with the run."""

    def _make_learners(self, spec: ExecutorSpec) -> RemoteLearners:
        endpoints = {
            client: ClientEndpoint.parse(client, text) for client, text in self.config.client_endpoints.items()
        }
        elsewhere = {client for client, endpoint in endpoints.items() if endpoint.kind in ("local", "address")}
        count = num_workers(self.config, len(spec.clients) - len(elsewhere))
        own = ProcessSource(count, Surroundings.of_this_process(fixed_hashes=True))
        sources = [own, *_sources_elsewhere(self.config)]
        return _on_workers(self.config, spec, sources, self._admission, self._durations)


@executor("distributed")
class DistributedExecutor(CallExecutor):
    """Executor for ranks that serve under ``tfr.run``, and for workers elsewhere. Ranks stay for the next proxy."""

    def _make_learners(self, spec: ExecutorSpec) -> RemoteLearners:
        sources = _sources_elsewhere(self.config)
        if (workers := current_workers()) is not None:
            sources = [workers, *sources]
        if not sources:
            raise ConfigError(
                "distributed mode needs the other ranks of a launch: start the script's main coroutine by "
                "tfr.run(main), and the script with torchrun --nproc-per-node=3 script.py; or workers that listen "
                "(client_endpoints with their addresses), or that join (runtime.join_at)"
            )
        return _on_workers(self.config, spec, sources, self._admission, self._durations)


def _on_workers(
    config: RuntimeConfig, spec: ExecutorSpec, sources: list[Source], admission: Admission, durations: Durations
) -> RemoteLearners:
    """Return the learners of a run on workers."""
    if spec.learner.stateless:
        return StatelessLearners(config, spec, sources, durations)
    return StatefulLearners(config, spec, sources, admission, durations)


def _sources_elsewhere(config: RuntimeConfig) -> list[Source]:
    """Return the sources of workers that listen at an address or join the run.

    Raises:
        ConfigError: If the token cannot be read, or this process cannot listen.
    """
    sources: list[Source] = []
    listening = addresses(config.client_endpoints)
    if listening or config.join_at is not None:
        token = load_token(config.token_file)
        if listening:
            sources.append(DialledSource(listening, token))
        if config.join_at is not None:
            sources.append(JoinedSource(config.join_at, token))
    return sources


def num_workers(config: RuntimeConfig, num_clients: int) -> int:
    """Return the number of worker processes of pseudo mode for so many clients."""
    return config.num_processes or min(default_num_workers(config.workers_per_device), max(num_clients, 1))
