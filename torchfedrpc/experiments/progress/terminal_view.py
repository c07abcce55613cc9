"""Live view of a run on a terminal, drawn by rich: rounds, calls, stragglers and workers."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.terminal_theme import MONOKAI
from rich.text import Text

from torchfedrpc.events import Event, Subscriber
from torchfedrpc.experiments.progress.lines import describe_metrics
from torchfedrpc.experiments.progress.run_status import RunStatus
from torchfedrpc.experiments.sizes import size_text

_PERIOD_S = 0.25
_NUM_ROWS = 8  # of workers; more are counted
_WIDTH = 100  # of a picture, in characters


class TerminalView:
    """View of a run that is redrawn four times a second; its last state stays visible after the run.

    Lines that are printed or logged during the run, such as the loss of a worker, appear above it. The cursor stays
    visible, so a process that is killed leaves the terminal as it was.

    Args:
        stream: A terminal.
        stats: `LearnerProxy.stats` of the run. Default: The view has neither bytes nor workers.
    """

    def __init__(self, stream: TextIO, stats: Callable[[], Mapping[str, Any]] | None = None) -> None:
        self._console = Console(file=stream)
        self._status = RunStatus()
        self._workers = Workers()
        self._stats = stats or dict
        self._exit = ExitStack()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Subscriber:
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._exit.enter_context(_handlers_redirected(self._console))
        self._live.start()
        self._console.show_cursor(True)
        self._draw_later()
        return self._show

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._live.update(Group(*round_lines(self._status, self._console.width)), refresh=True)
        self._live.stop()
        self._exit.close()

    def _show(self, event: Event) -> None:
        self._status.add(event)

    def _draw_later(self) -> None:
        self._live.update(view_of(self._status, self._stats(), self._workers, self._console.width), refresh=True)
        self._timer = asyncio.get_running_loop().call_later(_PERIOD_S, self._draw_later)


class Workers:
    """Workers' busy shares, from one drawing to the next."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[float, float]] = {}

    def busy_share(self, worker: str, busy_s: float) -> float | None:
        """Return the share of the time since the last call that a worker was busy; None at the first call."""
        now = time.monotonic()
        before_s, before_busy_s = self._before.get(worker, (now, busy_s))
        self._before[worker] = now, busy_s
        return None if now == before_s else min(max((busy_s - before_busy_s) / (now - before_s), 0.0), 1.0)


def view_of(status: RunStatus, stats: Mapping[str, Any], workers: Workers, width: int) -> RenderableType:
    """Return the whole view."""
    lines: list[RenderableType] = round_lines(status, width)
    parts = [
        f"{status.num_in_flight} calls in flight"
        + (f" for {longest:.0f} s" if (longest := status.longest_s) > 1 else ""),
        f"{status.num_calls} done",
    ]
    if stats:
        parts += [f"sent {size_text(stats['bytes_sent'])}", f"received {size_text(stats['bytes_received'])}"]
    if stats.get("workers_lost"):
        parts.append(f"workers lost: {stats['workers_lost']}")
    lines.append(Text("   ".join(parts)))
    if late := status.stragglers():
        calls = ", ".join(f"{call.client_id} {call.method} {seconds:.0f} s" for call, seconds in late)
        lines.append(Text(f"stragglers: {calls}", style="yellow"))
    if stats:
        lines.append(_table(stats["workers"], workers))
    return Group(*lines)


def round_lines(status: RunStatus, width: int) -> list[RenderableType]:
    """Return the bar of rounds, and the metrics of the last one."""
    line = Table.grid(padding=(0, 1))
    left = "" if status.seconds_left is None else f"{status.seconds_left:.0f} s left"
    bar = ProgressBar(total=status.num_rounds or 1, completed=status.num_done, width=min(40, width // 3))
    line.add_row(Text("rounds", style="bold"), bar, f"{status.num_done}/{status.num_rounds}", left)
    metrics = [] if status.ended is None else describe_metrics(status.ended)
    return [line, Text("   ".join(metrics))] if metrics else [line]


def _table(workers: Mapping[str, Mapping[str, Any]], busy: Workers) -> Table:
    """Return a row for each worker, with the columns that are known of it."""
    formats: dict[str, Callable[[str, Any], str | None]] = {
        "state": lambda label, value: str(value),
        "learners": lambda label, value: str(value),
        "queue": lambda label, value: str(value),
        "memory_bytes": lambda label, value: size_text(value),
        "busy_s": lambda label, value: None if (share := busy.busy_share(label, value)) is None else f"{share:.0%}",
    }
    shown = [name for name in formats if any(name in facts for facts in workers.values())]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("worker")
    for name in shown:
        title = name.removesuffix("_bytes").removesuffix("_s")
        table.add_column(title, justify="left" if name == "state" else "right")
    for label, facts in list(workers.items())[:_NUM_ROWS]:
        cells = [None if facts.get(name) is None else formats[name](label, facts[name]) for name in shown]
        table.add_row(label, *(cell or "-" for cell in cells))
    if len(workers) > _NUM_ROWS:
        table.add_row(f"and {len(workers) - _NUM_ROWS} more", style="dim")
    return table


@contextmanager
def _handlers_redirected(console: Console) -> Iterator[None]:
    """Let handlers of the root logger that write to a terminal write above the view."""
    redirected = []
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and getattr(handler.stream, "isatty", bool)():
            redirected.append((handler, handler.setStream(FileProxy(console, handler.stream))))
    try:
        yield
    finally:
        for handler, stream in redirected:
            handler.setStream(stream)


def save_picture(view: RenderableType, path: Path, *, title: str = "torchfedrpc") -> None:
    """Draw a view as a picture of a terminal.

    Args:
        view: The result of `view_of`, or a group of it and lines above it.
        path: The file: ``.svg``, or ``.png``, which needs vl-convert-python.
        title: The title of the terminal's window.
    """
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(view)
    svg = console.export_svg(title=title, theme=MONOKAI, unique_id="terminal")
    svg = re.sub(r"@font-face\s*{.*?}", "", svg, flags=re.DOTALL)  # which would be loaded from the network
    if path.suffix == ".svg":
        path.write_text(svg, encoding="utf-8")
        return
    import vl_convert  # noqa: PLC0415 - optional

    path.write_bytes(vl_convert.svg_to_png(svg, scale=2))
