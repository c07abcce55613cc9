"""What a report says of a run: sections with figures, each of which has a table and perhaps a chart of it."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchfedrpc.experiments.report import charts
from torchfedrpc.experiments.report.data import MAX_ROWS, Record, RunData, TraceData, TracedRound, sample
from torchfedrpc.experiments.setting_names import by_numbers, flattened
from torchfedrpc.experiments.trace import STAGES

_MAX_CELLS = 20_000  # of a map of clients and classes
_MAX_COLUMNS = 60  # rounds of a map of workers
NOT_METRICS = {"round", "num_clients", "seconds", "bytes_sent", "bytes_received"}
_RECOVERY = {"worker lost", "worker left", "worker joined", "world formed", "replay ended"}
_SECRET = re.compile(r"password|secret|api_?key", re.IGNORECASE)
_USER_OF_URL = re.compile(r"://[^/\s@]*@")
_NO_TRACE = "There is no trace.json: trace=true writes one."


@dataclass(frozen=True)
class Column:
    """Column of a table.

    Attributes:
        key: Name of its values in a chart.
        title: What the reader sees.
        is_number: Whether it has numbers; None is a missing one.
    """

    key: str
    title: str
    is_number: bool = True


@dataclass(frozen=True)
class Figure:
    """Table, and perhaps a chart of it.

    Attributes:
        name: Id, unique in the report.
        caption: What it shows.
        columns: The columns of the table. The first cell of a row is its heading.
        rows: The rows of the table.
        spec: The chart, in Vega-Lite's grammar; None for a table alone.
        series: Column -> series, for a chart with a row per cell of these columns.
        events: Name of the figure whose rows the chart marks too.
        by_round: Whether the chart shows the rows of one round at a time.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    spec: Mapping[str, Any] | None = None
    series: Mapping[str, str] | None = None
    events: str | None = None
    by_round: bool = False


@dataclass(frozen=True)
class Section:
    """Part of a report: a heading, sentences, and figures."""

    name: str
    title: str
    text: str
    figures: Sequence[Figure] = ()


def sections(run: RunData) -> list[Section]:
    """Return the sections of a report."""
    return [_training(run), _clients(run), _partition(run), _timeline(run), _recovery(run), _costs(run), _config(run)]


def _training(run: RunData) -> Section:
    """Return a chart for each kind of metric, such as accuracy or client accuracy, with the centralised baseline."""
    names = [name for name in _keys(run.history) if name not in NOT_METRICS]
    names = [name for name in names if any(record.get(name) is not None for record in run.history)]
    kinds: dict[str, list[str]] = {}
    for name in names:
        words = name.split("_")
        kinds.setdefault(" ".join(words[:2]) if words[0] == "client" else words[-1], []).append(name)
    baseline = {record["round"]: record for record in run.baseline}
    records = sample(run.history, MAX_ROWS)
    figures = []
    for number, (kind, members) in enumerate(kinds.items()):
        titles = {name: name.replace("_", " ") for name in members}
        compared = [name for name in members if any(record.get(name) is not None for record in run.baseline)]
        titles |= {f"central {name}": f"{name.replace('_', ' ')}, centralised" for name in compared}
        rows = [
            [record["round"] + 1]
            + [record.get(name) for name in members]
            + [baseline.get(record["round"], {}).get(name) for name in compared]
            for record in records
        ]
        figures.append(_by_round(f"metric-{number}", f"{kind} by round", titles.values(), rows, kind.capitalize()))
    text = f"Global model after each round.{_sampled(run.history, records, 'rounds')}"
    if run.baseline:
        text += " Centralised: one model, trained on the data of all clients together for as many epochs."
    return Section("training", "Training", text if figures else "No round has ended with a metric.", figures)


def _by_round(name: str, caption: str, titles: Iterable[str], rows: Sequence[Sequence[Any]], y_title: str) -> Figure:
    """Return a chart with a line per column over the rounds, in the first column."""
    series = {f"value{number}": title for number, title in enumerate(titles)}
    columns = [Column("round", "round"), *(Column(key, title) for key, title in series.items())]
    values = {value for row in rows for value in row[1:] if value is not None}
    rounds = [row[0] for row in rows]
    spec = charts.lines([*series.values()], y_title, rounds, from_zero=len(values) < 2)
    return Figure(name, caption.capitalize(), columns, rows, spec, series)


def _clients(run: RunData) -> Section:
    """Return the score of the final model by each client."""
    scored = [record for record in run.clients if record.get("scores")]
    title = "Clients"
    if not scored:
        return Section("clients", title, "No client has scored the final model, as client_scores=true lets them.")
    names = sorted(_keys(record["scores"] for record in scored), key=lambda name: name != "accuracy")
    first = names[0]
    ranked = sorted(scored, key=lambda record: record["scores"].get(first, float("-inf")))
    shown = sample(ranked, MAX_ROWS)
    columns = [Column("client", "client", False), Column("samples", "samples")]
    columns += [Column(f"score{number}", name.replace("_", " ")) for number, name in enumerate(names)]
    rows = [
        [record["client"], record["num_samples"], *(record["scores"].get(name) for name in names)] for record in shown
    ]
    values = [record["scores"][first] for record in ranked if first in record["scores"]]
    text = (
        f"The final model, scored by the `evaluate` of each client's learner.{_sampled(ranked, shown, 'clients')} "
        f"{first.capitalize()}: lowest {_short(values[0])}, median {_short(values[len(values) // 2])}, highest "
        f"{_short(values[-1])}."
    )
    spec = charts.client_bars(first, len(shown))
    return Section("clients", title, text, [Figure("scores", f"{first.capitalize()} by client", columns, rows, spec)])


def _partition(run: RunData) -> Section:
    """Return how many samples of each class each client has."""
    title = "Partition"
    if not run.clients:
        return Section(
            "partition", title, "There is no clients.jsonl, which torchfedrpc writes at the start of a run."
        )
    classes = _keys(record.get("classes", {}) for record in run.clients)
    shown = sample(run.clients, max(2, min(MAX_ROWS, _MAX_CELLS // (len(classes) or 1))))
    columns = [Column("client", "client", False), Column("samples", "samples")]
    series = {f"class{number}": name for number, name in enumerate(classes)}
    columns += [Column(key, name) for key, name in series.items()]
    rows = [
        [record["client"], record["num_samples"], *(record.get("classes", {}).get(name) for name in classes)]
        for record in shown
    ]
    sizes = sorted(record["num_samples"] for record in run.clients)
    text = (
        f"{len(sizes)} clients have {sizes[0]} to {sizes[-1]} training samples, "
        f"{_short(sum(sizes) / len(sizes))} on average.{_sampled(run.clients, shown, 'clients')}"
    )
    spec = charts.class_map(len(shown), classes) if classes else None
    caption = "Samples by client and class" if classes else "Samples by client"
    return Section("partition", title, text, [Figure("classes", caption, columns, rows, spec, series or None)])


def _timeline(run: RunData) -> Section:
    """Return how busy the workers were, and which calls they ran in some rounds."""
    trace = run.trace
    if trace is None:
        return Section("timeline", "Timeline", _NO_TRACE)
    figures = [*_busy_map(trace), *_call_slices(trace)]
    return Section(
        "timeline",
        "Timeline",
        "When workers ran calls of learners. Perfetto (ui.perfetto.dev) shows trace.json call by call."
        if figures
        else "The trace has no round that ended.",
        figures,
    )


def _busy_map(trace: TraceData) -> Iterator[Figure]:
    ended = {number: traced for number, traced in sorted(trace.rounds.items()) if traced.end_us is not None}
    workers = sorted(_keys(traced.args.get("busy_s", {}) for traced in ended.values()), key=by_numbers)
    if not ended or not workers:
        return
    step = -(-len(ended) // _MAX_COLUMNS)
    numbers = list(ended)
    rows = []
    for first in range(0, len(numbers), step):
        block = [ended[number] for number in numbers[first : first + step]]
        seconds = sum(_seconds(traced) for traced in block) or 1.0
        busy = [
            100 * sum(traced.args.get("busy_s", {}).get(worker, 0.0) for traced in block) / seconds
            for worker in workers
        ]
        rows.append([numbers[first] + 1 + (len(block) - 1) / 2, *busy])
    series = {f"worker{number}": worker for number, worker in enumerate(workers)}
    columns = [Column("round", "round"), *(Column(key, f"{worker}, %") for key, worker in series.items())]
    caption = "Share of each round in which a worker ran calls" + (f" (means of {step} rounds)" if step > 1 else "")
    has_events = bool(_recoveries(trace))
    spec = charts.busy_map(workers, [row[0] for row in rows], with_events=has_events)
    yield Figure("busy", caption, columns, rows, spec, series, events="events" if has_events else None)


def _call_slices(trace: TraceData) -> Iterator[Figure]:
    rows = []
    kinds: dict[str, None] = {}
    for number, traced in sorted(trace.rounds.items()):
        for call in traced.calls:
            args = call["args"]
            kind = f"{args['method']}: {args['error']}" if "error" in args else args["method"]
            kinds[kind] = None
            stages = [args["queue_us"], args["transfer_us"], call["dur"], args["return_us"]]
            start = call["ts"] - traced.begin_us
            rows.append(
                [number + 1, call["worker"], args["client"], kind, start / 1e3, *(stage / 1e3 for stage in stages)]
            )
    if not rows:
        return
    workers = sorted({row[1] for row in rows}, key=by_numbers)
    columns = [
        Column("round", "round"),
        Column("worker", "worker", False),
        Column("client", "client", False),
        Column("kind", "call", False),
        Column("start_ms", "start, ms"),
        *(Column(f"{stage}_ms", f"{stage}, ms") for stage in STAGES),
    ]
    num_rounds = len({row[0] for row in rows})
    caption = "Calls of a round, by worker"
    if num_rounds < len(trace.rounds):
        caption += f" ({num_rounds} of {len(trace.rounds)} rounds)"
    yield Figure("calls", caption, columns, rows, charts.call_slices(workers, [*kinds]), by_round=True)


def _recovery(run: RunData) -> Section:
    """Return what became of workers: losses, replacements, replays and new worlds."""
    title = "Losses and recoveries"
    trace = run.trace
    if trace is None:
        return Section("recovery", title, _NO_TRACE)
    found = _recoveries(trace)
    lost = sum(instant["name"] == "worker lost" for instant in found)
    text = f"Workers lost: {lost}." if lost else "No worker was lost."
    if len(trace.starts) > 1:
        text += f" The run was resumed {len(trace.starts) - 1} times, from its last checkpoint each time."
    if not found:
        return Section("recovery", title, text)
    shown = sample(found, MAX_ROWS)
    begins = sorted(traced.begin_us for traced in trace.rounds.values())
    start = trace.starts[0]["ts"] if trace.starts else found[0]["ts"]
    columns = [
        Column("time", "time, s"),
        Column("round", "round"),
        Column("event", "event", False),
        Column("worker", "worker", False),
        Column("detail", "detail", False),
    ]
    rows = [
        [
            (instant["ts"] - start) / 1e6,
            bisect.bisect(begins, instant["ts"]),
            instant["name"],
            instant["args"].get("worker", ""),
            ", ".join(f"{key} {_text(value)}" for key, value in instant["args"].items() if key != "worker"),
        ]
        for instant in shown
    ]
    text += _sampled(found, shown, "events")
    return Section("recovery", title, text, [Figure("events", "Events of workers", columns, rows)])


def _costs(run: RunData) -> Section:
    """Return time and bytes, by round, by stage of calls and by worker."""
    figures = [*_stages(run), *_times(run), *_traffic(run), *_stage_sums(run), *_workers(run)]
    text = (
        "Stages of calls, added up over all clients: queue is waiting for a worker and for earlier calls, transfer "
        "and return are the ways to the worker and back, run is the method."
    )
    return Section("costs", "Time and bytes", text, figures)


def _stages(run: RunData) -> Iterator[Figure]:
    rows = [[number + 1, *sums.values()] for number, sums in sample(_stage_seconds(run), MAX_ROWS)]
    if rows:
        yield _stacked("stages", "Seconds of calls by stage and round", STAGES, rows, "seconds, all calls")


def _stage_sums(run: RunData) -> Iterator[Figure]:
    of_rounds = [sums for _, sums in _stage_seconds(run)]
    totals = {stage: sum(sums[stage] for sums in of_rounds) for stage in STAGES}
    total = sum(totals.values())
    if total:
        columns = [Column("stage", "stage", False), Column("seconds", "seconds"), Column("share", "share, %")]
        rows = [[stage, seconds, 100 * seconds / total] for stage, seconds in totals.items()]
        yield Figure("stage-sums", "Seconds of calls by stage", columns, rows)


def _stage_seconds(run: RunData) -> list[tuple[int, dict[str, float]]]:
    """Return the seconds of each stage for each round that has ended."""
    rounds = sorted(run.trace.rounds.items()) if run.trace is not None else []
    return [(number, traced.args["stages"]) for number, traced in rounds if "stages" in traced.args]


def _times(run: RunData) -> Iterator[Figure]:
    rows = [[record["round"] + 1, record.get("seconds")] for record in sample(run.history, MAX_ROWS)]
    if rows:
        yield _stacked("seconds", "Seconds of rounds", ["seconds"], rows, "seconds")


def _traffic(run: RunData) -> Iterator[Figure]:
    names = ("bytes_sent", "bytes_received")
    if any(record.get(name) for record in run.history for name in names):
        rows = [
            [record["round"] + 1, *((record.get(name) or 0) / 1e6 for name in names)]
            for record in sample(run.history, MAX_ROWS)
        ]
        titles = ("driver to workers", "workers to driver")
        yield _stacked("traffic", "Megabytes by round", titles, rows, "MB")


def _stacked(name: str, caption: str, titles: Sequence[str], rows: Sequence[Sequence[Any]], y_title: str) -> Figure:
    series = {f"value{number}": title for number, title in enumerate(titles)}
    columns = [Column("round", "round"), *(Column(key, title) for key, title in series.items())]
    spec = charts.bars(titles, y_title, [row[0] for row in rows])
    return Figure(name, caption, columns, rows, spec, series)


def _workers(run: RunData) -> Iterator[Figure]:
    """Return the numbers of each worker that was there at the end, and the time in which each one was busy."""
    if run.trace is None:
        return
    busy: dict[str, float] = {}
    for args in [traced.args for traced in run.trace.rounds.values()]:
        for worker, seconds in args.get("busy_s", {}).items():
            busy[worker] = busy.get(worker, 0.0) + seconds
    at_end = run.trace.end["args"].get("workers", {}) if run.trace.end else {}
    names = sorted({*busy, *at_end} - {""}, key=by_numbers)
    if not names:
        return
    columns = [
        Column("worker", "worker", False),
        Column("machine", "machine", False),
        Column("busy", "busy, s"),
        Column("sent", "received, MB"),
        Column("received", "returned, MB"),
        Column("memory", "memory, MB"),
    ]
    rows = []
    for name in names:
        stats = at_end.get(name, {})
        sizes = [_scaled(stats.get(key), 1e-6) for key in ("bytes_sent", "bytes_received", "memory_bytes")]
        rows.append([name, stats.get("machine") or "", busy.get(name), *sizes])
    known = [number for number in range(len(columns)) if any(row[number] not in (None, "") for row in rows)]
    shown = [[row[number] for number in known] for row in rows]
    yield Figure("workers", "Workers", [columns[number] for number in known], shown)


def _config(run: RunData) -> Section:
    columns = [Column("key", "setting", False), Column("value", "value", False)]
    rows = [[key, _shown(key, value)] for key, value in flattened(run.config)]
    if not rows:
        return Section("configuration", "Configuration", "There is no config.yaml.")
    figures = [Figure("settings", "Settings of the run", columns, rows)]
    return Section("configuration", "Configuration", _origin(run), figures)


def _origin(run: RunData) -> str:
    """Return where, when and by which versions the run was made, and the settings of its command line."""
    versions = ", ".join(f"{name} {version}" for name, version in run.job.get("versions", {}).items())
    made = [f"Begun on {run.job.get('machine')} at {run.job.get('begun')}, with {versions}."] if versions else []
    given = [f"From the command line: {' '.join(shown_overrides(run))}."] if run.overrides else []
    return " ".join(made + given)


def shown_overrides(run: RunData) -> list[str]:
    """Return the settings of the command line without what gives access."""
    pairs = [override.partition("=") for override in run.overrides]
    return [f"{key}{sign}{_shown(key, value)}" for key, sign, value in pairs]


def _recoveries(trace: TraceData) -> list[Record]:
    return [instant for instant in trace.instants if instant["name"] in _RECOVERY]


def _seconds(traced: TracedRound) -> float:
    return ((traced.end_us or traced.begin_us) - traced.begin_us) / 1e6


def _sampled(items: Sequence[Any], shown: Sequence[Any], noun: str) -> str:
    return f" {len(shown)} of {len(items)} {noun} are shown." if len(shown) < len(items) else ""


def _keys(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys of mappings in the order in which they come."""
    return list(dict.fromkeys(key for record in records for key in record))


def _scaled(value: Any, factor: float) -> float | None:
    return value * factor if isinstance(value, int | float) else None


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "null" if value is None else str(value)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _shown(key: str, value: Any) -> str:
    """Return a setting without what gives access: the user in a URL, and passwords and keys."""
    if value is not None and _SECRET.search(key):
        return "(hidden)"
    return _USER_OF_URL.sub("://...@", _text(value))
