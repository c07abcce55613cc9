"""Interactive sessions: classes that are typed in work in local and pseudo mode, and nowhere else."""

from __future__ import annotations

import base64
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from processes import environment
from workers import listening, make_token

from torchfedrpc.rpc.handshake import dial

CLASSES = """
import asyncio, dataclasses, enum, functools, math, os, signal, sys, threading
import torch
from torch import nn
import torchfedrpc as tfr

SCALE = 3

class Kind(enum.Enum):
    SOFT = 1

@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    kind: Kind = Kind.SOFT

class Odd(Exception):
    def __init__(self, number):
        super().__init__(number)
        self.double = 2 * number

def scaled(value):
    return math.sqrt(4) * value * SCALE

class Base:
    def __init__(self, client_id, rate=0.5):
        self.model = nn.Linear(2, 1)
        self.last = Batch(torch.rand(2))
        self.rate = rate

class Learner(Base):
    def train(self, batch):
        self.last = dataclasses.replace(batch, x=scaled(batch.x) * self.rate + self.last.x)
        return self.last

    def fail(self):
        raise Odd(self.last.x.sum().item())

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

class Total:
    def __init__(self):
        self.x = torch.zeros(2)

    def add(self, batch):
        self.x = self.x + batch.x

    def merge(self, other):
        self.x = self.x + other.x

    def finish(self):
        return self.x

class WithLock:
    lock = threading.Lock()  # which is no matter, since no learner uses it
"""

# Every object that has the name of a class in its pickle: arguments, results, exceptions, reducers and states, which
# travel in snapshots, evictions and replays.
DO_ALL = """
async def do_all(runtime, faults=tfr.testing.Faults()):
    results = []
    learner = functools.partial(Learner, rate=0.25)
    runtime = {**runtime, "max_resident_learners": 1}
    async with tfr.LearnerProxy(learner, ["a", "b", "c"], runtime=runtime) as proxy, faults.injected(proxy):
        for _ in range(3):
            results += (await proxy.clients().train(Batch(torch.ones(2)))).values()
        snapshots = {client_id: data async for client_id, data in proxy.snapshots()}
        results.append(await proxy.client("b").train(Batch(torch.zeros(2))))
        await proxy.restore(snapshots)
        results.append((await proxy.clients().reduce("train", Total(), batch=Batch(torch.ones(2)))).value)
        try:
            await proxy.client("c").fail()
        except Odd as error:
            results += [error.args, error.double, "with source" if "raise Odd" in str(error.__cause__) else ""]
        print(proxy.mode, "lost", proxy.stats()["workers_lost"])
    print("result", results)
"""
IN_ALL_MODES = """
{run}(do_all({{"execution_mode": "local"}}))
{run}(do_all({{"num_processes": 2}}))
{run}(do_all({{"num_processes": 1}}, tfr.testing.Faults().kill("worker1", at_call=5)))
"""


def as_typed(code: str) -> str:
    """The code as one types it: an empty line ends each block, and is nowhere else."""
    lines: list[str] = []
    for line in filter(None, code.splitlines()):
        if lines and lines[-1].startswith(" ") and not line.startswith(" "):
            lines.append("")
        lines.append(line)
    return "\n".join([*lines, "", ""])


def typed(code: str, *flags: str, program: tuple[str, ...] = (sys.executable, "-")) -> str:
    """What an interpreter prints that reads the code from its standard input."""
    done = subprocess.run(
        [*program, *flags], input=code, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("program", "run"),
    [
        ((sys.executable, "-"), "asyncio.run"),
        ((sys.executable, "-i"), "asyncio.run"),
        ((sys.executable, "-m", "asyncio"), "await "),
        ((sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner"), "await "),
    ],
    ids=["stdin", "python", "asyncio", "ipython"],
)
def test_classes_of_a_session_travel_with_the_same_bits_in_local_and_pseudo_mode(
    program: tuple[str, ...], run: str
) -> None:
    needs("cloudpickle")
    if "IPython" in program:
        needs("IPython")
    output = typed(as_typed(CLASSES + DO_ALL + IN_ALL_MODES.format(run=run)), program=program)
    results = [line.partition("result ")[2] for line in output.splitlines() if "result " in line]
    assert len(results) == 3, output
    assert results[0] == results[1] == results[2]
    assert "tensor" in results[0]
    assert "pseudo lost 1" in output


CALL_ONCE = """
async def call_once(learner, runtime):
    try:
        async with tfr.LearnerProxy(learner, ["a"], runtime=runtime) as proxy:
            print("result", await proxy.client("a").go())
    except Exception as error:
        print("refused", type(error).__name__, error)
"""


def test_what_cannot_be_pickled_is_named_with_the_remedy() -> None:
    needs("cloudpickle")
    output = typed(
        CLASSES
        + CALL_ONCE
        + """
LOCK = threading.Lock()

class Plain:
    def __init__(self, client_id):
        pass

class Global(Plain):
    def go(self):
        with LOCK:
            return 1

class Attribute(Plain):
    lock = threading.RLock()

class Default(Plain):
    def go(self, lock=threading.Lock()):
        return 2

class New(Plain):
    def go(self):
        return WithLock()

for learner in (Global, Attribute, Default, New):
    asyncio.run(call_once(learner, {"num_processes": 1}))
asyncio.run(call_once(Global, "local"))
"""
    )
    refused = [line for line in output.splitlines() if line.startswith("refused")]
    assert "the global LOCK (a lock), which cannot be pickled" in refused[0]
    assert "Attribute.lock (a RLock)" in refused[1]
    assert "the learner Default cannot be sent" in refused[2]
    assert "WithLock.lock (a lock)" in refused[3]
    assert all("ConfigError" in line and "make it in the learner's constructor" in line for line in refused)
    assert "result 1" in output


def test_a_session_without_cloudpickle_says_how_to_install_it_and_works_locally() -> None:
    output = typed(
        "import sys; sys.modules['cloudpickle'] = None\n"
        + CLASSES
        + CALL_ONCE
        + "Learner.go = lambda self: 5\n"
        + 'asyncio.run(call_once(Learner, "local"))\nasyncio.run(call_once(Learner, {"num_processes": 1}))\n'
    )
    assert "result 5" in output
    assert "refused ConfigError" in output
    assert "pip install 'torchfedrpc[notebook]'" in output


def test_a_class_that_is_defined_again_takes_effect_at_the_next_opening() -> None:
    needs("cloudpickle")
    output = typed(
        CALL_ONCE
        + """
import asyncio, torchfedrpc as tfr

def define(number):
    class Learner:
        def __init__(self, client_id):
            pass
        def go(self, value=None):
            return number if value is None else value
    Learner.__qualname__ = "Learner"
    return Learner

async def main(runtime):
    global Learner
    Learner = define(1)
    proxy = tfr.LearnerProxy(Learner, ["a", "b"], runtime=runtime)
    async with proxy:
        print("before", await proxy.client("a").go())
        Learner = define(2)
        print("after", await proxy.client("a").go(), await proxy.client("b").go())
    async with proxy:
        print("again", await proxy.client("a").go(), await proxy.client("b").go())
        if proxy.mode == "pseudo":
            global Later
            Later = type("Later", (), {"__module__": "__main__"})
            try:
                await proxy.client("a").go(Later())
            except tfr.UntrustedTypeError as error:
                print("refused", error)

for runtime in ("local", {"num_processes": 1}):
    asyncio.run(main(runtime))
"""
    )
    lines = output.splitlines()
    assert lines.count("before 1") == lines.count("after 1 1") == lines.count("again 2 2") == 2, output
    assert "refused __main__.Later may not travel" in output
    assert "when the proxy is opened (open it again)" in output


def test_workers_that_the_session_did_not_start_refuse_its_classes(tmp_path: Path) -> None:
    needs("cloudpickle")
    token = make_token(tmp_path)
    with listening(token) as (_, address):
        runtime = {"client_endpoints": {"a": address}, "token_file": token}
        mixed = {**runtime, "client_endpoints": {"b": address}, "execution_mode": "pseudo", "num_processes": 1}
        output = typed(
            CLASSES
            + CALL_ONCE.replace('["a"]', '["a", "b"]')
            + f"for runtime in ({runtime!r}, {mixed!r}):\n    asyncio.run(call_once(Learner, runtime))\n"
        )
    refused = [line for line in output.splitlines() if line.startswith("refused")]
    assert len(refused) == 2, output
    assert all("ConfigError" in line and "move them to a module" in line for line in refused)


class Canary:
    """Its pickle, where it is loaded, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


async def test_a_worker_that_listens_refuses_forged_classes_of_a_session(tmp_path: Path) -> None:
    token, path = make_token(tmp_path), tmp_path / "loaded"
    data = base64.b64encode(pickle.dumps(Canary(path))).decode()
    with listening(token) as (worker, address):
        link, _ = await dial(address, Path(token).read_bytes(), {"role": "driver", "program": "x"}, timeout_s=30)
        try:
            answer = await link.request({"do": "take_session", "data": data}, "worker1")
            assert "classes that are defined in an interactive session" in answer["error"]
            spec = {"module": "__main__", "qualname": "L", "seed": 0, "runtime": {}}
            prepare = {"do": "prepare", "spec": spec, "label": "w", "local_index": 0, "main": None, "settings": {}}
            answer = await link.request(prepare, "worker1")
            assert "cannot find the learner __main__.L" in answer["error"]
        finally:
            link.stop()
        assert worker.process.poll() is None
    assert not path.exists()
