"""Charts of a report in Vega-Lite's grammar, and the bundle of JavaScript that draws them.

A chart has no data: the page reads it from the chart's table. Colours are variables of the style sheet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments import extras
from torchfedrpc.private_files import make_private, replaced

Spec = dict[str, Any]

_COLORS = [f"var(--series-{number})" for number in range(1, 6)]
_DASHES = [[1, 0], [6, 3], [2, 2], [9, 3, 2, 3], [1, 4]]
_TICKS = [factor * 10**power for power in range(9) for factor in (1, 2, 5)]
_HEIGHT = 240
_BUNDLE = "import sys, vl_convert; sys.stdout.write(vl_convert.javascript_bundle())"

CONFIG: Mapping[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "aria": False,  # the chart has a label and a table; a thousand marks would be read out one by one
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titlePadding": 8,
        "gridColor": "var(--line)",
        "domainColor": "var(--line-strong)",
        "tickColor": "var(--line-strong)",
    },
    "axisBand": {"grid": False},
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": "var(--ink)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "labelLimit": 300,
        "symbolStrokeWidth": 2,
    },
}


def lines(names: Sequence[str], y_title: str, rounds: Sequence[float], *, from_zero: bool) -> Spec:
    """Return a line per series over the rounds; its axis begins at zero or near the smallest value."""
    scale = {"domain": [*names], "range": _cycle(_DASHES, names)}
    dashes = {"field": "series", "type": "nominal", "scale": scale, "legend": _legend(names, symbolType="stroke")}
    return _chart(
        {"type": "line", "strokeWidth": 2.2, "point": {"size": 36} if len(rounds) <= 30 else False},
        transform=[{"filter": "isValid(datum.value)"}],  # joins the points of a metric that not each round has
        x=_rounds(rounds),
        y={"field": "value", "type": "quantitative", "title": y_title, "scale": {"zero": from_zero}},
        color=_color("series", names, symbolType="stroke"),
        strokeDash=dashes,
        tooltip=[_tip("round"), _tip("series", "series"), _tip("value", y_title)],
    )


def bars(names: Sequence[str], y_title: str, rounds: Sequence[float]) -> Spec:
    """Return a bar per round, with the series stacked from the bottom up."""
    return _chart(
        {"type": "bar", "orient": "vertical", "binSpacing": 0},
        transform=[
            *_cells(rounds, 0.8),
            {"calculate": f"indexof({json.dumps([*names])}, datum.series)", "as": "level"},
        ],
        x=_rounds(rounds, "first"),
        x2={"field": "last"},
        y={"field": "value", "type": "quantitative", "title": y_title, "stack": "zero"},
        color=_color("series", names),
        order={"field": "level"},
        tooltip=[_tip("round"), _tip("series", "part"), _tip("value", y_title)],
    )


def client_bars(score: str, num_clients: int) -> Spec:
    """Return a bar per client, from the lowest score to the highest."""
    return _chart(
        {"type": "bar", "color": _COLORS[0]},
        x=_clients(num_clients),
        y={"field": "score0", "type": "quantitative", "title": score, "scale": {"zero": True}},
        tooltip=[_tip("client", "client"), _tip("score0", score), _tip("samples")],
    )


def class_map(num_clients: int, classes: Sequence[str]) -> Spec:
    """Return a map of the samples of each client and class; a stronger colour is more."""
    return _chart(
        {"type": "rect", "color": _COLORS[0]},
        height=max(120, min(400, 24 * len(classes))),
        x=_clients(num_clients),
        y={
            "field": "series",
            "type": "nominal",
            "sort": [*classes],
            "title": "class",
            "axis": _thinned(len(classes)),
        },
        opacity=_strength("samples"),
        tooltip=[_tip("client", "client"), _tip("series", "class"), _tip("value", "samples")],
    )


def busy_map(workers: Sequence[str], rounds: Sequence[float], *, with_events: bool) -> Spec:
    """Return a map of the time that each worker ran calls, per round.

    Args:
        workers: The workers, from the top down.
        rounds: The rounds, or the middles of blocks of them.
        with_events: Whether there are events, whose losses of workers are marked.
    """
    chart = _chart(
        {"type": "rect", "color": _COLORS[0]},
        height=_rows_height(len(workers)),
        transform=_cells(rounds, 1),
        x=_rounds(rounds, "first"),
        x2={"field": "last"},
        y={**_workers(workers), "field": "series"},
        opacity=_strength("busy, % of the round", domain=[0, 100]),
        tooltip=[_tip("round"), _tip("series", "worker"), _tip("value", "busy, %")],
    )
    if not with_events:
        return chart
    body = {key: chart.pop(key) for key in ("mark", "encoding", "transform")}
    lost = {
        "data": {"name": "events"},
        "transform": [{"filter": "datum.event == 'worker lost'"}],
        "mark": {"type": "point", "shape": "cross", "angle": 45, "size": 110, "filled": True, "opacity": 1},
        "encoding": {
            "x": {"field": "round", "type": "quantitative"},
            "y": {"field": "worker", "type": "nominal"},
            "color": {"value": "var(--alert)"},
            "tooltip": [_tip("round"), _tip("worker", "worker"), _tip("event", "event"), _tip("detail", "detail")],
        },
    }
    return {**chart, "layer": [body, lost]}


def call_slices(workers: Sequence[str], kinds: Sequence[str]) -> Spec:
    """Return the calls of a round, each a slice on the row of its worker while its method ran."""
    stages = [_tip(f"{stage}_ms", f"{stage}, ms") for stage in ("queue", "transfer", "run", "return")]
    return _chart(
        {"type": "bar", "stroke": "var(--surface)", "strokeWidth": 1, "height": {"band": 0.8}},
        height=_rows_height(len(workers)),
        transform=[{"calculate": "datum.start_ms + datum.run_ms", "as": "stop_ms"}],
        x={"field": "start_ms", "type": "quantitative", "title": "milliseconds since the start of the round"},
        x2={"field": "stop_ms"},
        y=_workers(workers),
        color=_color("kind", kinds),
        tooltip=[_tip("client", "client"), _tip("kind", "call"), *stages],
    )


def bundle() -> str | None:
    """Return a script that defines ``vegaEmbed``; None if its package is not installed.

    It is made in a process of its own, since that starts a JavaScript engine, and kept in the user's cache: making
    it takes a second.

    Raises:
        ConfigError: If it cannot be made.
    """
    if not extras.available("vl_convert"):
        return None
    with suppress(OSError, ConfigError, RuntimeError):  # no cache, or no private one, or no home
        return _cached().read_text(encoding="utf-8")
    command = [sys.executable, "-P", "-X", "utf8", "-c", _BUNDLE]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=True)
    except subprocess.SubprocessError as error:
        words = str(getattr(error, "stderr", None) or error).strip()
        raise ConfigError(f"vl_convert has made no bundle of vega for the report: {words[-500:]}") from error
    with suppress(OSError, ConfigError, RuntimeError), replaced(_cached()) as file:
        file.write(done.stdout.encode())
    return done.stdout


def _cached() -> Path:
    """Return the file of the bundle in the user's cache, whose folder is made private."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchfedrpc"
    make_private(folder)
    return folder / f"vega-{metadata.version('vl-convert-python')}.js"


def _chart(mark: Spec, *, height: int = _HEIGHT, transform: Sequence[Spec] = (), **encoding: Any) -> Spec:
    return {
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"name": "rows"},
        "transform": [*transform],
        "mark": mark,
        "encoding": encoding,
    }


def _rounds(rounds: Sequence[float], field: str = "round") -> Spec:
    distance = next(step for step in _TICKS if (rounds[-1] - rounds[0]) / step <= 12)
    ticks = list(range(distance, int(rounds[-1]) + 1, distance))
    axis = {"values": ticks, "format": "d", "grid": False}
    scale = {"nice": False, "zero": False}
    return {"field": field, "type": "quantitative", "title": "round", "axis": axis, "scale": scale}


def _cells(rounds: Sequence[float], width: float) -> list[Spec]:
    """Return what makes cells around the rounds, as wide as this share of their distance."""
    half = width / 2 * ((rounds[-1] - rounds[0]) / (len(rounds) - 1) if len(rounds) > 1 else 1)
    return [
        {"calculate": f"datum.round - {half}", "as": "first"},
        {"calculate": f"datum.round + {half}", "as": "last"},
    ]


def _clients(num_clients: int) -> Spec:
    return {"field": "client", "type": "nominal", "title": "client", "sort": None, "axis": _thinned(num_clients)}


def _workers(workers: Sequence[str]) -> Spec:
    scale = {"domain": [*workers]}
    return {"field": "worker", "type": "nominal", "title": None, "scale": scale, "axis": _thinned(len(workers))}


def _thinned(num_labels: int) -> Spec:
    if num_labels > 40:
        return {"labels": False, "ticks": False}
    return {"labelLimit": 120, "labelOverlap": True, "ticks": False}


def _rows_height(num_rows: int) -> int:
    return max(60, min(480, (28 if num_rows <= 16 else 12) * num_rows))


def _color(field: str, names: Sequence[str], **legend: Any) -> Spec:
    scale = {"domain": [*names], "range": _cycle(_COLORS, names)}
    return {"field": field, "type": "nominal", "scale": scale, "legend": _legend(names, **legend)}


def _legend(names: Sequence[str], **settings: Any) -> Spec | None:
    return settings if len(names) > 1 else None


def _strength(title: str, domain: Sequence[float] | None = None) -> Spec:
    scale = {"range": [0, 1], **({"domain": [*domain]} if domain else {"domainMin": 0})}
    return {"field": "value", "type": "quantitative", "title": title, "scale": scale, "legend": {"title": title}}


def _tip(field: str, title: str | None = None) -> Spec:
    return {"field": field, "title": title or field, "type": "nominal"}


def _cycle(values: Sequence[Any], names: Sequence[str]) -> list[Any]:
    return [values[number % len(values)] for number in range(len(names))]
