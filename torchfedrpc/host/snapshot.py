"""Snapshots: the state of a learner as bytes, from which another process can continue."""

from __future__ import annotations

import contextlib
import inspect
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchfedrpc.errors import SerializationError, SnapshotError, UntrustedTypeError
from torchfedrpc.host.attributes import REGISTRIES, attributes_of, made_anew, not_state_of, set_attributes
from torchfedrpc.host.object_parts import is_foundation, reachable
from torchfedrpc.host.shared_objects import SharedObjects
from torchfedrpc.host.state_comparison import Difference, first_difference
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.file import TensorFiles
from torchfedrpc.wire.file_pool import FilePool
from torchfedrpc.wire.packing import Parcel, pack
from torchfedrpc.wire.serializer import chunks_of, read

# Layout: magic, version of the format, checksum of the rest; then the fields, in the format of ParameterSerializer.
_MAGIC = b"TFRSNAP\x00"
_VERSION = 1
_HEADER = struct.Struct("<8sII")
_REMEDIES = {
    "attributes": "name {} in not_state if the constructor makes it anew, or define state_dict()/load_state_dict(), "
    "which carry what matters of it",
    "getstate": "leave it out of __getstate__(), or define state_dict()/load_state_dict(), which carry what matters",
    "state_dict": "leave it out of state_dict(), or put plain data there",
}


@dataclass(frozen=True)
class Snapshot:
    """A client's learner between two calls.

    Attributes:
        client_id: The learner's client.
        learner: ``module.qualname`` of the run's learner, as in its `LearnerSpec`.
        counts: Number of calls of each method; they seed later calls.
        state: From `capture`; None if the learner was not made.
    """

    client_id: str
    learner: str
    counts: dict[str, int]
    state: Any

    @property
    def made(self) -> bool:
        """Whether the learner was made."""
        return self.state is not None


def capture(learner: Any, client_id: str = "a client", shared: SharedObjects | None = None) -> Any:
    """Return a learner's state, for `taken`. It may alias the learner's objects: use it before the next call.

    It is ``state_dict()`` if the learner's class has that and ``load_state_dict``, else ``__getstate__()`` if the
    class defines that or ``__setstate__``, else all attributes except those in ``not_state``. Methods inherited from
    `torch.nn.Module` are not used, since they leave plain attributes out.

    Args:
        learner: The learner, which must not run meanwhile.
        client_id: Its client, for messages.
        shared: Shared objects of this process.

    Raises:
        ConfigError: If ``not_state`` is no collection of names.
        SnapshotError: If its own method raised (the cause) or is async, or ``not_state`` names no attribute.
    """
    name = f"{client_id}'s {type(learner).__qualname__}"
    kind = _kind_of_state(type(learner))
    if kind == "attributes":
        try:
            return kind, attributes_of(learner, shared)
        except SnapshotError:
            raise
        except RuntimeError as error:  # raised by torch for modules that are parametrized themselves
            raise SnapshotError(
                f"{name} cannot be captured: {error}; define state_dict() and load_state_dict()"
            ) from error
    if kind == "state_dict" and any(map(inspect.iscoroutinefunction, (learner.state_dict, learner.load_state_dict))):
        raise SnapshotError(
            f"state_dict() and load_state_dict() of {name} must not be async: make them plain methods"
        )
    method = learner.state_dict if kind == "state_dict" else learner.__getstate__
    try:
        content = method()
        if kind == "getstate" and not hasattr(type(learner), "__setstate__"):
            _split(content)
    except Exception as error:
        raise SnapshotError(f"{method.__name__}() of {name} failed: {type(error).__name__}: {error}") from error
    if kind == "getstate" and (left_out := not_state_of(type(learner))):
        if not isinstance(content, dict):
            raise SnapshotError(f"{name} has not_state, and its __getstate__() gives no dict: leave them out there")
        content = {key: value for key, value in content.items() if key not in left_out}
    return kind, content


def reinstate(learner: Any, state: Any, client_id: str = "a client", shared: SharedObjects | None = None) -> None:
    """Give a newly made learner the state that `capture` took.

    Attributes become exactly the captured ones. Attributes in ``not_state``, and attributes that the learner's
    ``__getstate__`` leaves out, stay as the constructor made them, unless ``__setstate__`` changes them.

    Args:
        learner: The learner.
        state: From `capture`; it belongs to the learner afterwards.
        client_id: Its client, for messages.
        shared: Shared objects of this process.

    Raises:
        SnapshotError: If the learner does not accept the state; its exception is the cause.
    """
    try:
        kind, content = state
        if kind == "state_dict":
            learner.load_state_dict(content)
        elif kind == "attributes":
            set_attributes(learner, content, shared)
        elif hasattr(type(learner), "__setstate__"):
            learner.__setstate__(content)
        else:
            attributes, slots = _split(content)
            for name, value in (attributes | slots).items():
                object.__setattr__(learner, name, value)  # bypasses a __setattr__ that refuses it
    except SnapshotError:
        raise
    except Exception as error:
        raise SnapshotError(
            f"{client_id}'s {type(learner).__qualname__} cannot take the state of its snapshot "
            f"({type(error).__name__}: {error}): its class must be the one that the snapshot was taken of, and must "
            f"accept what it gave"
        ) from error


def taken(
    snapshot: Snapshot,
    allow: AllowList,
    learner: Any = None,
    shared: SharedObjects | None = None,
    device: torch.device | None = None,
    *,
    pool: FilePool | None = None,
    limit_bytes: int | None = None,
) -> Parcel:
    """Return a snapshot as bytes without header, which `seal` adds. They share no memory with the learner.

    The state is read back and compared with the live one: types, values, attributes, and which references share an
    object. So a state that could not be restored exactly raises an error now, and not after the loss of its worker.

    Args:
        snapshot: The snapshot, with a state from `capture`.
        allow: The types that `load` will allow.
        learner: The learner of the state; None for a state without learner.
        shared: Shared objects of this process.
        device: Device of this process's learners, besides the CPU. In another process its tensors go to the device of
            that one.
        pool: Has the memory file for a large snapshot, which other processes may map; None to send the bytes.
        limit_bytes: Size above which only the size is returned; None for no limit.

    Returns:
        A uint8 tensor [num_bytes], or the size as an int.

    Raises:
        SnapshotError: If the state cannot be pickled, cannot be read back, or is not equal. The error names the
            attribute.
    """
    try:
        parcel = pack(dict(vars(snapshot)), copy=False)
        if limit_bytes is not None and parcel.num_bytes > limit_bytes:
            return pack(parcel.num_bytes)
        chunks: list[bytes | memoryview] = [bytes(_HEADER.size), *chunks_of(parcel)]
        is_in_place = all(slot.is_cpu or slot.device == device for slot in parcel.slots)
        files, data = _joined(chunks, pool if parcel.is_large else None)
        # Read from the bytes and not from the learner's memory, to which a __setstate__ might write.
        rebuilt = _rebuilt(files, data, allow, device)
    except SerializationError as error:
        part, reason = _culprit(snapshot.state, allow, learner) or ("its whole", error)
        raise _refusal(snapshot, part, reason) from error
    if not is_in_place and (place := _elsewhere(snapshot.state, device)) is not None:
        reason = f"it has tensors on another device than {device or 'the CPU'}, to which they would come back"
        raise _refusal(snapshot, place, reason)
    if snapshot.state is not None and (found := _difference(snapshot.state, rebuilt, learner, shared)) is not None:
        raise _refusal(snapshot, repr(found.attribute.strip(".")), found)
    return replace(pack(data, copy=False), files=files)


def _joined(chunks: list[bytes | memoryview], pool: FilePool | None) -> tuple[TensorFiles | None, Tensor]:
    """Return the chunks of a snapshot as one tensor, in a memory file if there is room for it."""
    if pool is not None:
        with contextlib.suppress(OSError):  # there is no room: it is sent instead
            files = TensorFiles.of_bytes(chunks, pool)
            return files, files.tensors()[0]
    return None, torch.frombuffer(bytearray().join(chunks), dtype=torch.uint8)


def _rebuilt(files: TensorFiles | None, data: Tensor, allow: AllowList, device: torch.device | None) -> Any:
    """Return the state that a snapshot restores; its tensors may lie in the snapshot.

    A file is mapped once more for this. A page is copied only if a method like ``__setstate__`` writes to it.
    """
    if files is not None:
        again = files.tensors()[0]
        with contextlib.suppress(SerializationError):  # for example if a method resizes a tensor
            parcel = read(again.numpy().data[_HEADER.size :], gpu=_gpu(device), in_place=True)
            return parcel.open(allow)["state"]
    return read(data.numpy().data[_HEADER.size :], gpu=_gpu(device)).open(allow)["state"]


def seal(data: Tensor) -> memoryview:
    """Write the header of a snapshot from `taken`, with the checksum. Returns the bytes, in the same memory.

    The checksum takes as long as two copies, so it is computed when the snapshot leaves memory, and not while the
    learner waits.
    """
    view = data.numpy().data
    _HEADER.pack_into(view, 0, _MAGIC, _VERSION, zlib.crc32(view[_HEADER.size :]))
    return view


def dump(snapshot: Snapshot, allow: AllowList, learner: Any = None) -> bytearray:
    """Return a snapshot as bytes: `taken` and `seal` in one step."""
    return bytearray(seal(taken(snapshot, allow, learner).open(allow)))


def dump_counts(client_id: str, learner: str, counts: Mapping[str, int]) -> bytes:
    """Return a snapshot without state as bytes."""
    parcel = pack(dict(vars(Snapshot(client_id, learner, dict(counts), None))))
    _, data = _joined([bytes(_HEADER.size), *chunks_of(parcel)], None)
    return bytes(seal(data))


def load(data: bytes | bytearray | memoryview, allow: AllowList, device: torch.device | None = None) -> Snapshot:
    """Read a snapshot; it shares no memory with the bytes.

    Args:
        data: The bytes, from `seal`.
        allow: The types that they may contain.
        device: Device for tensors that were on a GPU; None for the CPU.

    Raises:
        UntrustedTypeError: If a type is outside the allow-list. This is no `SnapshotError`, since the bytes are
            intact and the reader's ``runtime.trusted_modules`` decides.
        SnapshotError: If the bytes are damaged, are no snapshot, or have another version of the format.
    """
    try:
        view = memoryview(data).cast("B")
    except TypeError as error:
        raise SnapshotError(
            f"a snapshot is bytes as proxy.snapshots() gives them, not {type(data).__name__}"
        ) from error
    if len(view) < _HEADER.size or view[: len(_MAGIC)] != _MAGIC:
        raise SnapshotError("these bytes are no snapshot, or cut short: give those that proxy.snapshots() gave")
    _, version, checksum = _HEADER.unpack_from(view)
    if version != _VERSION:
        raise SnapshotError(
            f"this snapshot has format {version} and this version of torchfedrpc reads format {_VERSION}: "
            f"restore it with the version that took it"
        )
    payload = view[_HEADER.size :]
    if zlib.crc32(payload) != checksum:
        raise SnapshotError("this snapshot is damaged, its checksum differs: take another")
    try:
        fields = read(payload, gpu=_gpu(device)).open(allow)
    except UntrustedTypeError as error:
        raise UntrustedTypeError(
            f"this snapshot holds a type that runtime.trusted_modules does not cover: {error}"
        ) from error
    except Exception as error:
        raise SnapshotError(
            f"this snapshot cannot be read: {error}; its learner's classes may have changed"
        ) from error
    return _snapshot_of(fields)


def check_belongs(snapshot: Snapshot, client_id: str, learner: str) -> None:
    """Check that a snapshot belongs to a client and a learner class.

    Args:
        snapshot: The snapshot to restore.
        client_id: The client to restore.
        learner: ``module.qualname`` of the run's learner.

    Raises:
        SnapshotError: If it belongs to another client or class.
    """
    if snapshot.client_id != client_id:
        raise SnapshotError(
            f"this is a snapshot of {snapshot.client_id!r} and not of {client_id!r}: restore each to its own client"
        )
    if snapshot.learner != learner:
        raise SnapshotError(
            f"this snapshot of {client_id!r} is of a {snapshot.learner}, and the run's learner is {learner}: "
            f"open the proxy with the learner that it was taken of"
        )


def _kind_of_state(cls: type) -> str:
    """Return how the state of a learner class is captured."""
    own = getattr(cls, "state_dict", None)
    if callable(own) and own is not nn.Module.state_dict and callable(getattr(cls, "load_state_dict", None)):
        return "state_dict"
    says_itself = any(
        not is_foundation(base) for base in cls.__mro__ if {"__getstate__", "__setstate__"} & vars(base).keys()
    )
    return "getstate" if says_itself else "attributes"


def _split(content: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return attributes and slots of a plain object's state, which pickle has as a dict, None, or a pair of these."""
    attributes, slots = content if isinstance(content, tuple) and len(content) == 2 else (content, None)
    attributes, slots = ({} if part is None else part for part in (attributes, slots))
    if not isinstance(attributes, dict) or not isinstance(slots, dict):
        raise TypeError(f"it gave {type(content).__name__} instead of a dict: define __setstate__ beside it")
    return attributes, slots


def _snapshot_of(fields: Any) -> Snapshot:
    """Check the fields and return them as a snapshot; a forged snapshot may have a valid checksum."""
    match fields:
        case {"client_id": str(), "learner": str(), "counts": dict(counts), "state": None | (_, _)} if len(
            fields
        ) == 4 and all(type(name) is str and type(count) is int and count >= 0 for name, count in counts.items()):
            return Snapshot(**fields)
    raise SnapshotError("these bytes hold something else than a snapshot: give those that proxy.snapshots() gave")


# The part of a state that cannot be captured.


def _parts(state: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes or keys of a state with their names; the state itself if it has none."""
    kind, content = state
    if kind == "attributes":
        content = content["values"], content["slots"]
    parts = [part for part in content if part is not None] if isinstance(content, tuple) else [content]
    if not all(isinstance(part, dict) for part in parts):
        yield "its state", content
        return
    for part in parts:
        for name, value in part.items():
            if name in REGISTRIES and isinstance(value, dict):  # of a module: its entries are named
                yield from ((repr(own), of_module) for own, of_module in value.items())
            yield repr(name), value


def _difference(state: Any, rebuilt: Any, learner: Any, shared: SharedObjects | None) -> Difference | None:
    kind, content = state
    if kind != "attributes":
        return first_difference(content, rebuilt[1], owner=learner)
    apart = made_anew(learner, shared) if learner is not None else []
    live, other = ({**part["values"], **part["slots"]} for part in (content, rebuilt[1]))
    return first_difference(live, other, owner=learner, apart=apart, are_attributes=True)


def _refusal(snapshot: Snapshot, part: str, cause: object) -> SnapshotError:
    """Return the error of a state that cannot be captured, with the remedy."""
    kind = snapshot.state[0] if snapshot.state is not None else "state_dict"
    untrusted = "or " if isinstance(cause, UntrustedTypeError) else ""
    error = SnapshotError(
        f"the state of {snapshot.client_id} ({snapshot.learner}) cannot be captured because of {part}: {cause}; "
        f"{untrusted}{_REMEDIES[kind].format(part)}"
    )
    error.attribute = part
    return error


def _culprit(state: Any, allow: AllowList, learner: Any) -> tuple[str, object] | None:
    """Return the first part of a state that cannot travel by itself, and the reason; None if each part can."""
    for part, value in _parts(state) if state is not None else ():
        try:
            pack(value, copy=False).open(allow)
        except SerializationError as error:
            if learner is not None and any(one is learner for one in reachable(value)):
                return part, f"it refers to the learner itself ({error})"
            return part, error
    return None


def _gpu(device: torch.device | None) -> torch.device | None:
    return device if device is not None and device.type == "cuda" else None


def _elsewhere(state: Any, device: torch.device | None) -> str | None:
    """Return the first attribute with tensors on another GPU, unless load_state_dict() decides where they go."""
    if state[0] == "state_dict":
        return None
    for part, value in _parts(state):
        if not all(slot.is_cpu or slot.device == device for slot in pack(value, copy=False).slots):
            return part
    return None
