"""Calls, outcomes and parcels as tuples of plain values, bytes and plain tensors, which torch RPC carries fast."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import torch

from torchfedrpc.errors import SerializationError
from torchfedrpc.host.call import Batch, Call, CallKind, Outcome, OutcomeKind
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.file import Address, TensorFiles
from torchfedrpc.wire.memory_file import NO_ROOM
from torchfedrpc.wire.packing import Packed, Parcel, Unreadable
from torchfedrpc.wire.shared import shared_values
from torchfedrpc.wire.tensors import PlainTensors, fence

_KINDS = frozenset(get_args(CallKind))
_OUTCOMES: dict[str, OutcomeKind] = {kind: kind for kind in get_args(OutcomeKind)}
_OTHER_FORM = "what arrived is not of the form that this version of torchfedrpc sends"

MappedDevices = frozenset[torch.device]  # devices that the world's device map connects with the peer


def parcel_message(parcel: Packed | None, covered: MappedDevices) -> Any:
    """Return a parcel as a tuple. Slots on a device that no map covers are staged through host memory."""
    if parcel is None:
        return None
    assert isinstance(parcel, Parcel)
    if not parcel.slots:
        return parcel.head, parcel.views, [], None
    staged = [slot.is_cuda and slot.device not in covered for slot in parcel.slots]
    if parcel.ready is not None and (parcel.is_common or any(staged)):
        parcel.ready.wait()
    slots = [slot.cpu() if through else slot for slot, through in zip(parcel.slots, staged, strict=True)]
    if parcel.is_common:  # of the calls in one request: tensors on one memory would arrive on one memory
        with PlainTensors():
            slots = [slot.clone() for slot in slots]
    return parcel.head, parcel.views, slots, staged if any(staged) else None


def read_parcel(message: Any, device: torch.device | None, *, move_all: bool = False) -> Parcel | Unreadable | None:
    """Return the parcel of a message. Call this on the thread of RPC, whose CUDA streams are behind the transfer.

    An error, such as a device that is out of memory, is raised when the parcel is opened.

    Args:
        message: From `parcel_message`, as it arrived.
        device: Device for slots that were staged through host memory; None leaves them there.
        move_all: Whether slots that arrived on another GPU are moved to ``device`` too.
    """
    if message is None:
        return None
    try:
        head, views, slots, staged = message
        if not (isinstance(head, bytes) and all(isinstance(slot, torch.Tensor) for slot in slots)):
            raise SerializationError("what arrived is no parcel of torchfedrpc's")
        slots = [_taken(slot) for slot in slots]
        if device is not None and device.type == "cuda":
            slots = [
                slot.to(device) if (move_all and slot.is_cuda) or (staged and staged[index]) else slot
                for index, slot in enumerate(slots)
            ]
        return Parcel(head, views, slots, fence(slots))
    except Exception as error:
        return Unreadable(error)


def file_message(parcel: Packed, addresses: list[Address]) -> Any:
    """Return a parcel as a tuple. Its slots are in memory files that the receiver can open."""
    assert isinstance(parcel, Parcel)
    return parcel.head, parcel.views, addresses


def read_files(message: Any, pid: int | None) -> Parcel | Unreadable:
    """Return the parcel of a message, in memory files of a process on this machine.

    Args:
        message: From `file_message`, as it arrived.
        pid: The process; None if this process cannot open its files.

    Raises:
        OSError: If the files do not exist, for example since the process has ended.
        SerializationError: If they are other files, or the message has another form.
    """
    if pid is None:
        raise SerializationError("this process does not look into others")
    match message:
        case (bytes(head), views, list(addresses) | tuple(addresses)):
            pass
        case _:
            raise SerializationError(_OTHER_FORM)
    try:
        files = TensorFiles.at(addresses, pid)
        return Parcel(head, views, files.tensors(), files=files)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return Unreadable(SerializationError(f"there is no room to map the memory of process {pid}: {error}"))


def _taken(received: torch.Tensor) -> torch.Tensor:
    """Take the memory of a tensor that has arrived, and leave RPC's own reference to the tensor without memory.

    RPC's thread drops that reference when it gets the GIL again. On a busy machine this is after the method has run.
    """
    slot = received.detach()
    rest: Any = received  # torch's type stubs lack set_() without arguments, which drops the memory
    rest.set_()
    return slot


def call_message(call: Call, covered: MappedDevices, common: Packed | None = None) -> Any:
    """Return a call as a tuple, without its arguments if they are the common ones."""
    timeout_s = None if call.run_timeout_s is None else float(call.run_timeout_s)  # the guard refuses numpy's
    fields = (call.call_id, call.client_id, call.method, timeout_s, call.kind, call.number)
    if call.arguments is common:
        return fields, None, None
    return fields, parcel_message(call.arguments, covered), _numbers(call.arguments)


def _numbers(arguments: Packed) -> tuple[int, ...]:
    """Return the numbers of the shared values that arguments refer to."""
    if not isinstance(arguments, Parcel) or not arguments.apart:
        return ()
    return tuple([value.number for value in shared_values(arguments)])


def read_call(
    message: Any, device: torch.device, common: tuple[Packed, tuple[int, ...]] | None = None
) -> tuple[Call, tuple[int, ...]]:
    """Return the call of a message, and the numbers of the shared values that its arguments refer to.

    Args:
        message: From `call_message`, as it arrived.
        device: Device of the worker.
        common: The arguments of calls without any in the message, and the numbers.

    Raises:
        SerializationError: If the message has another form.
    """
    match message:
        case (
            (int(call_id), str(client_id), str(method), float() | None as timeout_s, kind, int() | None as number),
            arguments,
            numbers,
        ) if kind in _KINDS:
            if arguments is None and numbers is None and common is not None:
                return Call(call_id, client_id, method, common[0], timeout_s, kind, number), common[1]
            if type(arguments) is type(numbers) is tuple and {*map(type, numbers)} <= {int}:
                parcel = read_parcel(arguments, device)
                assert parcel is not None
                return Call(call_id, client_id, method, parcel, timeout_s, kind, number), numbers
    raise SerializationError(_OTHER_FORM)


def batch_message(batch: Batch, covered: MappedDevices) -> Any:
    """Return a batch as a tuple. Arguments that calls have in common with the first call are in it once."""
    timeout_s = None if batch.timeout_s is None else float(batch.timeout_s)
    fields = (batch.call_id, batch.num_places, batch.is_watched, timeout_s)
    common = batch.common
    calls = [(place, call_message(call, covered, common)) for place, call in batch.calls]
    return fields, parcel_message(batch.prototype, covered), parcel_message(common, covered), _numbers(common), calls


def read_batch(message: Any, device: torch.device) -> tuple[Batch, list[tuple[int, ...]]]:
    """Return the batch of a message, and for each call the numbers of the shared values that its arguments refer to.

    Raises:
        SerializationError: If the message has another form.
    """
    match message:
        case (
            (int(call_id), int(num_places), bool(is_watched), float() | None as timeout_s),
            tuple() as prototype,
            tuple() as arguments,
            tuple(common_numbers),
            list(calls),
        ) if {*map(type, common_numbers)} <= {int}:
            pass
        case _:
            raise SerializationError(_OTHER_FORM)
    parcel = read_parcel(arguments, device)
    assert parcel is not None
    if isinstance(parcel, Parcel) and parcel.slots and len(calls) > 1:
        parcel = replace(parcel, is_common=True)
    common = parcel, common_numbers
    read: list[tuple[int, Call]] = []
    numbers: list[tuple[int, ...]] = []
    for part in calls:
        match part:
            case (int(place), parts) if 0 <= place < num_places:
                call, of_call = read_call(parts, device, common)
            case _:
                raise SerializationError(_OTHER_FORM)
        read.append((place, call))
        numbers.append(of_call)
    reducer = read_parcel(prototype, device)
    assert reducer is not None
    return Batch(call_id, reducer, num_places, tuple(read), is_watched, timeout_s), numbers


def outcome_message(outcome: Outcome, covered: MappedDevices) -> Any:
    """Return an outcome as a tuple. The files of its value must exist until it is read."""
    failure, parcel = outcome.failure, outcome.parcel
    parts = failure and (failure.type_name, failure.message, failure.traceback, failure.body)
    files = parcel.files if isinstance(parcel, Parcel) else None
    flags = (outcome.kind, outcome.never_ran, outcome.cut_off, outcome.seconds, files is not None, outcome.stamps)
    of_calls = [(place, outcome_message(one, covered)) for place, one in outcome.of_calls]
    if parcel is None:
        return flags, parts, None, of_calls
    if files is not None:
        return flags, parts, file_message(parcel, files.addresses()), of_calls
    return flags, parts, parcel_message(parcel, covered), of_calls


def report_message(call: Call, number: int, progress: Packed) -> Any:
    """Return the progress that a method reports, as a tuple. Its tensors are staged through host memory."""
    return call.call_id, call.client_id, call.method, number, parcel_message(progress, frozenset())


def read_report(message: Any) -> tuple[Call, int, Packed]:
    """Return the call, the number of the report among its reports, and the progress.

    Raises:
        SerializationError: If the message has another form.
    """
    match message:
        case (int(call_id), str(client_id), str(method), int(number), tuple() as parts):
            progress = read_parcel(parts, None)
            assert progress is not None
            return Call(call_id, client_id, method, progress), number, progress
    raise SerializationError(_OTHER_FORM)


def read_outcome(message: Any, home: torch.device | None, pid: int | None = None) -> Outcome:
    """Return the outcome of a message.

    Args:
        message: From `outcome_message`, as it arrived.
        home: Device for slots that were staged through host memory; None leaves them there.
        pid: The worker's process if this process can open its memory files, else None.

    Raises:
        OSError: See `read_files`.
        SerializationError: See `read_files`.
    """
    match message:
        case (
            (str(kind), bool(never_ran), bool(cut_off), int() | float() as seconds, bool(is_in_files), stamps),
            parts,
            content,
            list(of_calls),
        ) if (settled := _OUTCOMES.get(kind)) is not None and math.isfinite(seconds) and _are_stamps(stamps):
            failure = _read_failure(parts)
        case _:
            raise SerializationError(_OTHER_FORM)
    if is_in_files:
        parcel: Packed | None = read_files(content, pid)
        if isinstance(parcel, Parcel) and parcel.files is not None:
            parcel.files.close()  # it is mapped
            parcel = replace(parcel, files=None)
    else:
        parcel = read_parcel(content, home, move_all=True)
    ended = tuple(_read_ended(one) for one in of_calls)
    return Outcome(settled, parcel, failure, never_ran, cut_off, seconds=seconds, stamps=stamps, of_calls=ended)


def _are_stamps(stamps: Any) -> bool:
    """Whether this is the field of an outcome's `Stamps`."""
    if stamps is None:
        return True
    return type(stamps) is tuple and [*map(type, stamps)] == [float, float, float] and math.isfinite(sum(stamps))


def _read_ended(message: Any) -> tuple[int, Outcome]:
    match message:
        case (int(place), (_, _, None, []) as outcome):  # without a value or outcomes of its own
            return place, read_outcome(outcome, None)
    raise SerializationError(_OTHER_FORM)


def _read_failure(message: Any) -> Failure | None:
    match message:
        case None:
            return None
        case (str(type_name), str(text), str(traceback), bytes() | None as body):
            return Failure(type_name, text, traceback, body)
    raise SerializationError(_OTHER_FORM)
