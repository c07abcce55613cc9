"""A peer of torch RPC that was never invited: it has the addresses of a run's processes, and attacks them.

Run by its path it reads one line of JSON, attacks, and prints what became of each request as one line of JSON.
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from processes import environment
from torch.distributed import rpc

from torchfedrpc.rpc import endpoint
from torchfedrpc.rpc.message import parcel_message
from torchfedrpc.wire.packing import pack

_distributed: Any = torch.distributed
_TIMEOUT_S = 3.0  # most are answered within a millisecond; a busy machine takes longer for some
NUM_EMPTY = 500

Outcome = tuple[str, float]
"""What a request became, in words, and the seconds that it took."""


class Names(_distributed.Store):  # type: ignore[misc]
    """A store in which the victims are registered as members of the peer's own world."""

    def __init__(self, addresses: dict[str, str]) -> None:
        super().__init__()
        self._values = {f"names/{rank}": name.encode() for rank, name in enumerate(addresses, start=1)}
        self._values |= {f"addrs/{name}": address.encode() for name, address in addresses.items()}

    def set(self, key: str, value: bytes) -> None:
        self._values[key] = value

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        self._values[key] = desired
        return desired

    def get(self, key: str) -> bytes:
        return self._values[key]


def functions(canary: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Python functions that no process may run for a stranger."""
    touch = f"touch {canary}"
    yield "os.system", os.system, (touch,)
    yield "eval", eval, (f"open({canary!r}, 'w')",)
    yield "exec", exec, (f"open({canary!r}, 'w')",)
    yield "open", open, (canary, "w")
    yield "subprocess.run", subprocess.run, (["touch", canary],)
    yield "partial", functools.partial(os.system, touch), ()
    yield "attrgetter", operator.attrgetter("system"), ("os",)
    yield "getattr", getattr, ("os", "system")
    yield "a part of an entry", endpoint._submit, (None, None, 0, ())
    yield "the guard's end", __import__("torchfedrpc.rpc.guard").rpc.guard.remove, ()


def headers() -> Iterator[tuple[str, Any]]:
    """Headers of a stranger, who has no secret."""
    yield "a world's number", (1, 0, 0, (), None)
    yield "another secret", (bytes(32), 0, 0, (), None)
    yield "a short secret", (b"", 0, 0, (), None)
    yield "a long secret", (bytes(1 << 20), 0, 0, (), None)
    yield "a secret of text", ("0" * 64, 0, 0, (), None)
    yield "none", None
    yield "nothing", ()
    yield "a list", [bytes(32), 0]
    yield "a number", 3
    yield "a dict", {}
    yield "a tensor", (torch.zeros(32), 0)
    deep: Any = ()
    for _ in range(50):
        deep = (deep,)
    yield "deep", deep


def forged(secret: bytes) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Requests with the secret and the wrong content."""
    yield "a header that is short", ((secret,), [])
    yield "a header of text", ((secret, "0", 0, (), None), [])
    yield "a number far ahead", ((secret, 1 << 40, 0, (), None), [])
    yield "a number from before", ((secret, -1, 0, (), None), [])
    yield "items that are none", ((secret, 0, 0, (), None), 5)
    yield "acknowledged that are lists", ((secret, 0, 0, ([],), None), [])


def mappings(canary: str) -> dict[str, dict[str, Any]]:
    """Recipes that run something."""
    command = ["touch", canary]
    return {
        "a shell by torch": {"_target_": "torch.utils.collect_env.run", "command": command},
        "a shell by distutils": {"_target_": "distutils.spawn.spawn", "cmd": command},
        "a shell by subprocess": {"_target_": "subprocess.run", "args": command},
        "through what we import": {"_target_": "torchfedrpc.rpc.processes.os.system", "command": f"touch {canary}"},
        "through what torch.nn imports": {"_target_": "torch.nn.functional.importlib.import_module", "name": "this"},
        "in another": {
            "_target_": "torch.nn.Sequential",
            "_args_": [{"_target_": "torch.utils.collect_env.run", "command": command}],
        },
        "by a resolver": {
            "_target_": "torch.nn.Linear",
            "in_features": f"${{oc.decode:'{{_target_: subprocess.run, args: [touch, {canary}]}}'}}",
            "out_features": 2,
        },
        "a script as main": {"_target_": "torchfedrpc.rpc.surroundings.adopt_main", "description": {"path": canary}},
        "the guard's end": {"_target_": "torchfedrpc.rpc.guard.remove"},
    }


def items(canary: str) -> Iterator[tuple[str, int, list[Any]]]:
    """Items with the secret: name, question, and what is asked."""
    question = 1 << 40
    for name, recipe in mappings(canary).items():
        client = f"forged {name}"
        kwargs = {"dataset": recipe, "indices": [], "model": recipe, "seed": 0}
        arguments = parcel_message(pack(((), {})), frozenset())
        question += 1
        yield (
            f"recipe {name}",
            question,
            [
                ("register", client, parcel_message(pack({**kwargs, "indices": _no_indices()}), frozenset()), 0),
                ("submit", question, ((question, client, "get_model_weights", None, "call", None), arguments, ())),
            ],
        )
    for verb, arguments in (
        ("submit", ("x",)),
        ("submit", (((1, 2), 3),)),
        ("advance", ([], {})),
        ("cancel", ([],)),
    ):
        question += 1
        yield f"malformed {verb} {arguments}", question, [(verb, question, *arguments)]


def _no_indices() -> Any:
    import numpy as np

    return np.zeros(0, dtype=np.int64)


class Peer:
    """An agent of torch RPC in a world of its own, whose other members it has made up."""

    def __init__(self, addresses: dict[str, str]) -> None:
        api: Any = rpc
        os.environ["TP_SOCKET_IFNAME"] = "lo"
        options = api.TensorPipeRpcBackendOptions(
            num_worker_threads=4, rpc_timeout=_TIMEOUT_S, _transports=["uv"], _channels=["basic"]
        )
        api.dist_autograd._init(0)
        self._store = Names(addresses)
        agent = api.TensorPipeAgent(self._store, "raw_peer", 0, 1 + len(addresses), options, {}, [])
        api.api._init_rpc_states(agent)
        self.outcomes: dict[str, Outcome] = {}

    def ask(self, name: str, to: str, function: Any, args: Any) -> None:
        """Invoke a function there, and note what became of it."""
        began = time.monotonic()
        try:
            became = _in_words(rpc.rpc_async(to, function, args=args, timeout=_TIMEOUT_S).wait())
        except Exception as error:
            became = f"{type(error).__name__}: {str(error)[:300]}"
        self.outcomes[name] = (became, time.monotonic() - began)
        assert time.monotonic() - began < _TIMEOUT_S, f"{name} was not answered"

    def ask_for_reference(self, name: str, to: str, function: Any, args: Any) -> None:
        """The same by a remote reference, of whose refusal RPC tells later, if at all."""
        with contextlib.suppress(RuntimeError):
            rpc.remote(to, function, args=args, timeout=_TIMEOUT_S)
        self.outcomes[name] = ("sent", 0.0)


def _in_words(value: Any) -> str:
    if value is None:
        return "nothing"
    _, parts, _ = value
    _, (flags, failure, *_) = parts[0]
    return f"answered {flags[0]} {failure and failure[:2]}"


def main() -> None:
    """Attack as one line of standard input says."""
    told = json.loads(sys.stdin.readline())
    canary, peer = told["canary"], Peer(told["addresses"])
    for victim in told["addresses"]:
        for name, function, args in functions(canary):
            peer.ask(f"{victim}: {name}", victim, function, args)
            peer.ask_for_reference(f"{victim}: {name} by reference", victim, function, args)
        order = [("cancel", 0, 0)]
        for name, header in headers():
            peer.ask(f"{victim}: serve, {name}", victim, endpoint.serve, (header, order))
            peer.ask(f"{victim}: acknowledge, {name}", victim, endpoint.acknowledge, (header,))
            peer.ask(f"{victim}: rref, {name}", victim, endpoint.rref, (header, "a"))
        for number in range(NUM_EMPTY):
            peer.ask(f"{victim}: empty {number}", victim, endpoint.serve, ((bytes(32), number, 0, (), None), []))
    for victim, (secret, number) in told["secrets"].items():
        for name, args in forged(bytes.fromhex(secret)):
            peer.ask(f"{victim}: forged, {name}", victim, endpoint.serve, args)
        for offset, (name, question, asked) in enumerate(items(canary)):
            header = (bytes.fromhex(secret), number + offset, 0, (), question)
            peer.ask(f"{victim}: forged, {name}", victim, endpoint.serve, (header, asked))
    print(json.dumps(peer.outcomes), flush=True)
    os._exit(0)  # references that were refused would make RPC's own shutdown fail


def attack(addresses: dict[str, str], secrets: dict[str, tuple[str, int]], canary: Path) -> dict[str, Outcome]:
    """Let a raw peer attack.

    Args:
        addresses: victim -> where its agent listens.
        secrets: victim -> the secret of requests to it, and the number of the next request.
        canary: what must not be made.
    """
    told = {"addresses": addresses, "secrets": secrets, "canary": str(canary)}
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment(),
        input=json.dumps(told) + "\n",
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes: dict[str, Outcome] = json.loads(done.stdout)
    return outcomes


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # RPC would abort the process, and hide why
