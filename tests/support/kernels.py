"""A notebook's kernel, to which a test gives cells."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from processes import environment


@dataclass
class Result:
    """What a cell gave.

    Attributes:
        text: What it printed, and its value.
        error: The type of its exception; empty if it raised none.
        message: The message of its exception.
        seconds: The time from its request to its reply.
        displays: The contents of its displays, with their updates, as plain text.
    """

    text: str = ""
    error: str = ""
    message: str = ""
    seconds: float = 0.0
    displays: list[str] = field(default_factory=list)


class Kernel:
    """A kernel of this interpreter. The end of its block shuts it down.

    Args:
        folder: Its working directory.
    """

    def __init__(self, folder: Path) -> None:
        from jupyter_client.manager import KernelManager

        self.folder = folder
        variables = {name: value for name, value in environment().items() if name != "PYTEST_CURRENT_TEST"}
        self._manager: Any = KernelManager(kernel_name="python3")
        self._manager.start_kernel(cwd=str(folder), env=variables)
        self.client: Any = self._manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    @property
    def pid(self) -> int:
        """The process id of the kernel."""
        return int(self._manager.provisioner.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.stop_channels()
        if self._manager.has_kernel:
            self._manager.shutdown_kernel()

    def begin(self, code: str) -> str:
        """Request a cell; returns its id for `end`."""
        return str(self.client.execute(code))

    def interrupt(self) -> None:
        """Interrupt the running cell, as the button of a notebook does."""
        self._manager.interrupt_kernel()

    def restart(self) -> None:
        """Restart the kernel."""
        self._manager.restart_kernel(now=True)
        self.client.wait_for_ready(timeout=60)

    def shutdown(self) -> None:
        """Ask the kernel to end, as the menu of a notebook does."""
        self._manager.shutdown_kernel()

    def kill(self) -> None:
        """End the kernel by SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def messages(self, cell: str, timeout_s: float = 60.0) -> Iterator[tuple[str, Any]]:
        """Yield the types and contents of a cell's messages, until it has ended."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                self.interrupt()
                raise AssertionError(f"the cell has not ended within {timeout_s:.0f} s") from None
            if message["parent_header"].get("msg_id") != cell:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return
            yield kind, content

    def until_printed(self, cell: str, text: str, timeout_s: float = 60.0) -> str:
        """Wait until a cell has printed a text; returns what it has printed."""
        printed = ""
        for kind, content in self.messages(cell, timeout_s):
            if kind == "error":
                raise AssertionError("\n".join(content["traceback"]))
            printed += content.get("text", "") if kind == "stream" else ""
            if text in printed:
                return printed
        raise AssertionError(f"the cell has ended without {text!r}: {printed}")

    def end(self, cell: str, timeout_s: float = 60.0) -> Result:
        """Wait for the end of a cell."""
        began, result = time.monotonic(), Result()
        for kind, content in self.messages(cell, timeout_s):
            if kind == "stream":
                result.text += content["text"]
            elif kind == "execute_result":
                result.text += content["data"]["text/plain"]
            elif kind in ("display_data", "update_display_data"):
                result.displays.append(content["data"].get("text/plain", ""))
            elif kind == "error":
                result.error, result.message = content["ename"], content["evalue"]
        result.seconds = time.monotonic() - began
        return result

    def run(self, code: str, timeout_s: float = 60.0) -> Result:
        """Run a cell, and wait for its end."""
        return self.end(self.begin(code), timeout_s)


def close_client_loop() -> None:
    """Close the event loop that the clients of kernels have made."""
    from jupyter_core.utils import ensure_event_loop

    ensure_event_loop().close()
    asyncio.set_event_loop(None)
