"""A cable between two network namespaces that delays and drops frames, for kernels without netem; needs root.

Usage: python cable.py FIRST SECOND DELAY_S LOSS BYTES_PER_S FIREWALL

FIRST and SECOND are the tap devices that it makes, one for each end; the caller moves them into namespaces, brings
them up, and writes a line. It drops the share LOSS of all frames, and with FIREWALL=1 the TCP connections to ports
from 32768 on that come from SECOND.
"""

from __future__ import annotations

import collections
import fcntl
import os
import random
import select
import struct
import sys
import time

_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
_FRAME_BYTES = 2048
_QUEUE_BYTES = 256 << 10  # a home router's
_EPHEMERAL = 32768


class End:
    """One end, with the frames that are on their way out of it."""

    def __init__(self, name: str) -> None:
        self.descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _TAP_WITHOUT_HEADER))
        self.frames: collections.deque[tuple[float, bytes]] = collections.deque()  # when each is out, in order
        self.free_at = 0.0  # when the last of them has been put on the wire


def opens_connection(frame: bytes) -> bool:
    """Whether a frame asks for a TCP connection to an ephemeral port."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 6:
        return False
    segment = frame[14 + 4 * (frame[14] & 15) :]
    port, flags = int.from_bytes(segment[2:4], "big"), segment[13]
    return port >= _EPHEMERAL and flags & 0x12 == 0x02  # SYN without ACK


def carry(ends: list[End], delay_s: float, loss: float, bytes_per_s: float, *, firewall: bool) -> None:
    """Carry frames for ever."""
    draw = random.Random(7)
    poll = select.poll()
    for end in ends:
        poll.register(end.descriptor, select.POLLIN)
    while True:
        now = time.monotonic()
        due = [end.frames[0][0] for end in ends if end.frames]
        poll.poll(max(min(due) - now, 0.0) * 1000 if due else None)
        now = time.monotonic()
        for source, target in (ends, reversed(ends)):
            while True:
                try:
                    frame = os.read(source.descriptor, _FRAME_BYTES)
                except BlockingIOError:
                    break
                is_blocked = firewall and source is ends[1] and opens_connection(frame)
                is_full = (target.free_at - now) * bytes_per_s > _QUEUE_BYTES
                if not is_blocked and not is_full and draw.random() >= loss:
                    target.free_at = max(target.free_at, now) + len(frame) / bytes_per_s
                    target.frames.append((target.free_at + delay_s, frame))
            while source.frames and source.frames[0][0] <= now:
                os.write(source.descriptor, source.frames.popleft()[1])


if __name__ == "__main__":
    first, second, delay_s, loss, bytes_per_s, firewall = sys.argv[1:]
    ends = [End(first), End(second)]
    print("ready", flush=True)
    sys.stdin.readline()  # a line tells that both are up
    carry(ends, float(delay_s), float(loss), float(bytes_per_s), firewall=firewall == "1")
