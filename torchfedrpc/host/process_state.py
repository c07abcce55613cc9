"""State of a process that its calls share: lock, random streams, settings, shared objects, deadlines."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from torchfedrpc.host.activity import Activity
from torchfedrpc.host.call import Report
from torchfedrpc.host.deadlines import Deadlines
from torchfedrpc.host.faults import Saboteur
from torchfedrpc.host.mailbox import Job
from torchfedrpc.host.randomness import RandomStreams
from torchfedrpc.host.shared_objects import SharedObjects
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.host.torch_settings import OpenedSettings, adopt_settings
from torchfedrpc.wire.file_pool import FilePool
from torchfedrpc.wire.packing import Packed, Parcel, Reference, home_device, pack

_SNAPSHOT_BYTES = 128 << 20  # of idle files: the driver maps a learner's last snapshot while the next one is taken


class ProcessState:
    """State of a process that its calls share.

    Args:
        spec: The run.
        device: Device that `current_call` returns, unless ``devices`` has several.
        devices: Devices that the learners of the driver's process have in turn. With ``isolation=none``, which passes
            tensors as they are, all learners have the first.
        in_driver: Whether this is the driver's process, whose random streams are restored between calls.
        report: Receives the progress that methods report.
        activity: Shows the running calls to another process; None in the driver.

    Attributes:
        seed: The run's seed.
        allow: The types that may travel in this run.
        device: Device of this process's learners; the first if they have several GPUs.
        gpus: The GPUs that the learners have in turn; empty unless they are several.
        by_value: Whether results and reports are copied.
        in_driver: Whether this is the driver's process.
        is_alone: Whether one call runs at a time, so that it has settings and random streams to itself.
        settings: The settings with which calls begin.
        streams: The global random generators.
        shared: Objects that the learners of a GPU share, by `Mailbox.device`.
        method_lock: Lock between sync methods and steps of async methods.
        deadlines: Clocks of methods and of steps of streams.
        activity: Shows the running calls to another process; None in the driver.
        saboteur: Injects faults, in a test; else None.
        shows_files: Whether the driver can open memory files of this process, which large results then use.
        snapshot_pool: Memory files of large snapshots.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        device: torch.device | None = None,
        *,
        devices: Sequence[torch.device] = (),
        in_driver: bool = False,
        report: Report | None = None,
        activity: Activity | None = None,
    ) -> None:
        self.seed = spec.seed
        self.allow = spec.allow_list()
        self.by_value = not in_driver or spec.runtime.isolation != "none"
        self.device = device or next(iter(devices), torch.device("cpu"))
        self.gpus = tuple(devices) if len(devices) > 1 and self.by_value else ()
        self._home = _home(spec.runtime.device_map) if self.gpus else None
        self.in_driver = in_driver
        self.is_alone = spec.runtime.max_concurrent_calls == 1
        self.settings = OpenedSettings.of_this_process(spec.runtime.torch_threads)
        # A device that cannot be used fails here, and not on the host's threads. Other GPUs get their CUDA contexts,
        # which take memory, from the first learners there: a run may have fewer clients than GPUs.
        torch.empty(0, device=self.device)
        self.streams = RandomStreams(self.gpus or (self.device,))
        self.shared = {one: SharedObjects() for one in self.gpus or (None,)}
        self.method_lock = MethodLock()
        self.deadlines = Deadlines()
        self.activity = activity
        self.saboteur: Saboteur | None = None
        self.shows_files = False
        self.snapshot_pool = FilePool(_SNAPSHOT_BYTES)
        self._file_pool = FilePool()
        self._report = report
        self._reporting = threading.Lock()  # a method may report from several threads

    def take_value(self, obj: Any) -> Packed:
        """Pack an object as it is now."""
        return pack(obj) if self.by_value else Reference(obj)

    def take_result(self, obj: Any) -> Packed:
        """Pack the result of a method."""
        return pack(obj, in_files=self.shows_files, pool=self._file_pool) if self.by_value else Reference(obj)

    def home_of(self, *arguments: Packed | None) -> torch.device | None:
        """Return the device to which a result's tensors on GPUs go; None leaves them where they are.

        If learners have several GPUs, it is the same as with workers: the GPU of the first tensor on one among the
        arguments, else the driver's current GPU as of the opening of the proxy, or the CPU with ``device_map=none``.
        """
        return next((gpu for parcel in arguments if (gpu := home_device(parcel)) is not None), self._home)

    def send_report(self, job: Job, progress: Any) -> None:
        """Send progress of a job to the driver."""
        value = self.take_value(progress)
        if job.mailbox.device is not None and isinstance(value, Parcel):
            value = value.on(torch.device("cpu"))  # as the progress that workers send
        value.copy().open(self.allow)  # a type that may not travel raises in the method, not in the driver
        with self._reporting:
            if self._report is not None:
                self._report(job.call, job.num_reports, value)
            job.num_reports += 1

    def prepare_thread(self) -> None:
        """Give the calling thread, which will run calls, the settings and the device of the process."""
        adopt_settings(self.settings.values, of_thread_only=True)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def close(self) -> None:
        """End the clocks, and release the memory files of results."""
        self.deadlines.close()
        self.snapshot_pool.close()
        self._file_pool.close()


def _home(device_map: str) -> torch.device:
    """Return the device of results without a GPU among the arguments, if the driver has GPUs."""
    return torch.device("cpu") if device_map == "none" else torch.device("cuda", torch.cuda.current_device())


class MethodLock:
    """A fair lock, granted in the order of the requests.

    Sync methods share it; steps of async methods have it alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._next_ticket = 0
        self._serving = 0
        self._num_sharing = 0
        self._exclusive = False

    def enter(self, *, exclusive: bool) -> None:
        """Wait for the lock."""
        with self._lock:
            ticket = self._next_ticket
            self._next_ticket += 1
            while ticket != self._serving or self._exclusive or (exclusive and self._num_sharing):
                self._changed.wait()
            self._serving += 1
            if exclusive:
                self._exclusive = True
            else:
                self._num_sharing += 1
            self._notify()

    def leave(self, *, exclusive: bool) -> None:
        """Release the lock."""
        with self._lock:
            if exclusive:
                self._exclusive = False
            else:
                self._num_sharing -= 1
            self._notify()

    def _notify(self) -> None:
        if self._serving != self._next_ticket:
            self._changed.notify_all()
