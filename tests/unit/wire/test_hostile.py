"""Hostile input: nothing of it runs, each is an error of ours, and whoever read it goes on."""

from __future__ import annotations

import asyncio
import io
import pickle
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import hostile
import pytest
import torch
from conftest import opened
from hostile import CORPUS, PARCELS, Victim, harm

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import SerializationError, SnapshotError, UntrustedTypeError
from torchfedrpc.executors.remote import RemoteLearners
from torchfedrpc.host import snapshot
from torchfedrpc.host.call import Call, Outcome, Registration
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.rpc.guard import GuardedUnpickler
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import Parcel, pack
from torchfedrpc.wire.serializer import ParameterSerializer

ALLOW = AllowList([hostile.HERE])
SAMPLE = [
    "os.system",
    "getattr chain",
    "attributes of a trusted class",
    "an array of objects on foreign memory",
    "an exception of arguments that are none",
    "LONG_BINPUT far away",
    "BYTEARRAY8 of an exabyte",
    "deep tuples as a key",
]
TRAVELLING = [
    name for name in PARCELS if name.startswith(("a view", "views", "fewer", "more"))
]  # the sender lets them

corpus = pytest.mark.parametrize("name", CORPUS)
sample = pytest.mark.parametrize("name", SAMPLE)  # where the same reader is behind another door


@pytest.fixture(autouse=True)
def _no_harm() -> Iterator[None]:
    seconds, kilobytes = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert harm() == []
    assert time.process_time() - seconds < 3  # half a second on a machine that has nothing else to do
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kilobytes < 200_000


def test_the_corpus_is_large_and_its_carriers_are_sound() -> None:
    assert len(CORPUS) >= 100
    head = pack({"w": torch.zeros(4)}).head
    assert hostile.parcel(head).open(ALLOW)["w"].tolist() == [0.0] * 4
    assert ParameterSerializer.deserialize(hostile.serialized(head))["w"].tolist() == [0.0] * 4
    with pytest.raises(SnapshotError, match="something else than a snapshot"):
        snapshot.load(hostile.snapshot_of(head), ALLOW)


@pytest.mark.parametrize("name", ["os.system", "eval", "trusted function"])
def test_elsewhere_the_corpus_would_run(name: str) -> None:
    pickle.loads(CORPUS[name])
    assert harm() != []
    hostile.CANARY.unlink(missing_ok=True)
    hostile.ran.clear()


# Each way by which a pickle comes in.


@corpus
def test_a_hostile_request_is_an_error_and_runs_nothing(name: str) -> None:
    with pytest.raises(SerializationError):
        hostile.parcel(CORPUS[name]).open(ALLOW)


@sample
def test_a_hostile_answer_is_an_error_that_says_whose(name: str) -> None:
    call = Call(1, "client_1", "train", pack(((), {})))
    with pytest.raises(SerializationError, match=r"the result of client_1\.train on worker1 cannot be read"):
        Outcome("value", hostile.parcel(CORPUS[name])).result(call, ALLOW, "worker1")


@sample
def test_a_hostile_exception_arrives_as_text_alone(name: str) -> None:
    failure = Failure("ValueError", "what it said", "", hostile.serialized(CORPUS[name]))
    error = failure.restore(ALLOW, "in client_1.train")
    assert type(error) is tfr.RemoteError
    assert any("did not arrive" in note for note in error.__notes__)


@sample
def test_hostile_bytes_are_an_error_and_run_nothing(name: str) -> None:
    with pytest.raises(SerializationError):
        ParameterSerializer.deserialize(hostile.serialized(CORPUS[name]), trusted_modules=[hostile.HERE])


@sample
def test_a_hostile_table_of_bytes_is_an_error_and_runs_nothing(name: str) -> None:
    data = hostile.serialized(b"\x80\x05N.", table=CORPUS[name])
    with pytest.raises(SerializationError):
        ParameterSerializer.deserialize(data, trusted_modules=[hostile.HERE])


@sample
def test_a_hostile_snapshot_is_an_error_and_runs_nothing(name: str) -> None:
    with pytest.raises((SnapshotError, UntrustedTypeError)):
        snapshot.load(hostile.snapshot_of(CORPUS[name]), ALLOW)


@corpus
def test_rpc_itself_refuses_it(name: str) -> None:
    with pytest.raises(pickle.UnpicklingError):
        GuardedUnpickler(io.BytesIO(CORPUS[name])).load()


@pytest.mark.parametrize("make", PARCELS.values(), ids=PARCELS)
def test_a_forged_parcel_is_an_error(make: Callable[[], Parcel]) -> None:
    with pytest.raises(SerializationError):
        make().open(ALLOW)


# The setting of states.


@pytest.mark.parametrize(
    "name",
    [name for name in CORPUS if name.startswith(("attributes of", "dict state of")) and "by way of" not in name],
)
def test_to_change_what_a_process_has_in_common_is_told_as_that(name: str) -> None:
    with pytest.raises(UntrustedTypeError, match=r"in common|which pickling never does|may not travel|may travel"):
        hostile.parcel(CORPUS[name]).open(ALLOW)


def test_an_instance_of_a_trusted_class_takes_attributes() -> None:
    head = hostile.whole(hostile.called(hostile.TRUSTED) + hostile.keyed(rounds=b"K\x03") + b"b")
    received = hostile.parcel(head).open(ALLOW)
    assert (type(received), received.rounds) == (hostile.Trusted, 3)


def test_as_many_objects_as_one_likes_may_lie_beside_each_other() -> None:
    rows = [(f"{number}", {"n": number}) for number in range(30_000)]
    assert pack(rows).open(ALLOW) == rows


def test_objects_that_refer_to_each_other_are_not_deep() -> None:
    root = hostile.Trusted()
    root.children = [hostile.Trusted() for _ in range(1500)]  # type: ignore[attr-defined]
    for child in root.children:  # type: ignore[attr-defined]
        child.parent, child.content = root, [[] for _ in range(40)]
    received = pack(root).open(ALLOW)
    assert received.children[-1].parent is received


# A host goes on.


@pytest.fixture(scope="module")
def host() -> Iterator[LearnerHost]:
    host = LearnerHost(LearnerSpec.of(Victim, 0, RuntimeConfig(execution_mode="local"))[0])
    host.register(Registration("client_1", pack({})))
    yield host
    assert host.close()


def answered(host: LearnerHost, call: Call) -> Outcome:
    future: Future[Outcome] = Future()
    host.submit(call, future.set_result)
    return future.result(timeout=20)


HOSTILE_ARGUMENTS: dict[str, Callable[[], Parcel]] = PARCELS | {
    name: lambda name=name: hostile.parcel(CORPUS[name]) for name in CORPUS
}


@pytest.mark.parametrize("name", HOSTILE_ARGUMENTS)
def test_a_host_answers_with_the_error_and_serves_the_next_call(host: LearnerHost, name: str) -> None:
    number = 2 * list(HOSTILE_ARGUMENTS).index(name)
    outcome = answered(host, Call(number, "client_1", "echo", HOSTILE_ARGUMENTS[name]()))
    assert (outcome.kind, outcome.never_ran) == ("failed", True)
    assert outcome.failure is not None
    assert outcome.failure.type_name in (
        f"{cls.__module__}.{cls.__name__}" for cls in (SerializationError, UntrustedTypeError)
    )
    following = answered(host, Call(number + 1, "client_1", "echo", pack(((name,), {}))))
    assert following.result(Call(number + 1, "client_1", "echo", pack(None)), ALLOW, "here") == ((name,), {})


@pytest.mark.parametrize("name", SAMPLE)
def test_a_host_whose_learner_cannot_be_made_goes_on_too(host: LearnerHost, name: str) -> None:
    number = -1 - SAMPLE.index(name)
    host.register(Registration(name, hostile.parcel(CORPUS[name])))
    assert answered(host, Call(number, name, "echo", pack(((), {})))).kind == "failed"
    following = Call(number - 100, "client_1", "echo", pack(((1,), {})))
    assert answered(host, following).result(following, ALLOW, "here") == ((1,), {})


# A worker goes on.


@pytest.fixture(scope="module")
def workers(runner: asyncio.Runner) -> Iterator[tfr.LearnerProxy]:
    runtime = {"execution_mode": "pseudo", "num_processes": 1}
    with opened(runner, tfr.LearnerProxy(Victim, ["client_1", "client_2"], runtime=runtime)) as proxy:
        yield proxy


@pytest.mark.parametrize("name", SAMPLE + TRAVELLING)
async def test_a_worker_refuses_it_and_serves_the_next_call(
    workers: tfr.LearnerProxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parcel = HOSTILE_ARGUMENTS[name]()
    with monkeypatch.context() as patch:
        patch.setattr(RemoteLearners, "take_arguments", lambda self, args, kwargs: parcel)
        with pytest.raises(SerializationError):
            await workers.custom_method("client_1", "echo", 1)
    assert await workers.custom_method("client_1", "harm") == []
    assert await workers.custom_method("client_2", "harm") == []


@pytest.mark.parametrize("name", ["os.system", "eval", "trusted function"])
async def test_a_hostile_worker_reaches_nothing_in_the_driver(workers: tfr.LearnerProxy, name: str) -> None:
    with pytest.raises(UntrustedTypeError, match=r"the result of client_1\.reply on .* cannot be read"):
        await workers.custom_method("client_1", "reply", name)
    assert await workers.custom_method("client_1", "harm") == []
