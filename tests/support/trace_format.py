"""Chrome's trace event format: what makes a file of it valid, and what Perfetto needs to draw it."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_KEYS = {
    "M": {"name", "pid", "args"},
    "B": {"name", "pid", "tid", "ts"},
    "E": {"pid", "tid", "ts"},
    "X": {"name", "pid", "tid", "ts", "dur"},
    "i": {"name", "pid", "tid", "ts", "s"},
    "b": {"name", "cat", "id", "pid", "tid", "ts"},
    "e": {"name", "cat", "id", "pid", "tid", "ts"},
}


def load(path: Path) -> list[Event]:
    """Read a trace as the format defines it: an array whose closing bracket may be missing."""
    text = path.read_text(encoding="ascii").rstrip()
    events: list[Event] = json.loads(text if text.endswith("]") else text.rstrip(",") + "]", parse_constant=_refuse)
    return events


def check(events: list[Event]) -> None:
    """Check all events: their phases and keys, the nesting of slices on each track, and the name of each track."""
    for event in events:
        assert event["ph"] in _KEYS, event
        assert event.keys() >= _KEYS[event["ph"]], event
        for key in ("ts", "dur", "pid", "tid"):
            assert type(event.get(key, 0)) is int, event
            assert event.get(key, 0) >= 0, event
    _check_names(events)
    _check_slices([event for event in events if event["ph"] == "X"])
    _check_pairs(events, "B", "E", ("pid", "tid"))
    _check_pairs(events, "b", "e", ("pid", "cat", "id"))


def process_names(events: list[Event]) -> dict[int, str]:
    """Return process -> name."""
    named = [event for event in events if event["ph"] == "M" and event["name"] == "process_name"]
    names = {event["pid"]: event["args"]["name"] for event in named}
    assert len(set(names.values())) == len(names) == len(named), "two processes with one name, or a name twice"
    return names


def _check_names(events: list[Event]) -> None:
    assert {event["pid"] for event in events} == set(process_names(events))
    threads = {(event["pid"], event["tid"]) for event in events if event["name" if "name" in event else "ph"]}
    named = {(event["pid"], event["tid"]) for event in events if event.get("name") == "thread_name"}
    assert threads == named


def _check_slices(slices: list[Event]) -> None:
    """Slices of a track follow each other."""
    tracks = defaultdict(list)
    for event in slices:
        tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        spans.sort()
        for (_, end), (begin, _) in itertools.pairwise(spans):
            assert end <= begin


def _check_pairs(events: list[Event], begin: str, end: str, key: tuple[str, ...]) -> None:
    """Each begin has its end, not before it; the last begins of a run that was killed have none."""
    open_since: dict[tuple[Any, ...], int] = {}
    for event in events:
        place = tuple(event.get(name) for name in key)
        if event["ph"] == begin:
            open_since[place] = event["ts"]
        elif event["ph"] == end:
            assert open_since.pop(place) <= event["ts"]
    assert begin == "B" or not open_since


def _refuse(constant: str) -> None:
    raise AssertionError(f"JSON has no {constant}")
