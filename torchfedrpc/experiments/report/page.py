"""``report.html``: one page about a run that has everything it needs inside: style, script and data."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments import extras
from torchfedrpc.experiments.report import charts
from torchfedrpc.experiments.report.data import RunData
from torchfedrpc.experiments.report.sections import NOT_METRICS, Figure, Section, sections, shown_overrides
from torchfedrpc.federation.callbacks import Callback, Run
from torchfedrpc.private_files import replaced
from torchfedrpc.version import __version__

REPORT_FILE = "report.html"

_MISSING = "-"


def write_report(folder: Path, path: Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        folder: The run's output folder; the files in it that a report can show may all be missing.
        path: The report. Default: ``report.html`` in the folder.

    Returns:
        The path of the report.
    """
    page = make_page(RunData.read(folder), charts.bundle())
    path = folder / REPORT_FILE if path is None else path
    with replaced(path) as file:
        file.write(page.encode("utf-8", "replace"))
    return path


class Report(Callback):
    """Callback that writes the report of a run at its end, into the run's output folder."""

    may_fail: ClassVar[bool] = True

    async def on_run_end(self, run: Run, error: BaseException | None) -> None:
        """Write the report."""
        if run.output_dir is None:
            raise ConfigError("Report has no folder: set trainer.output_dir")
        await asyncio.to_thread(write_report, run.output_dir)


def make_page(run: RunData, bundle: str | None) -> str:
    """Return the page.

    Args:
        run: The run.
        bundle: The script that draws charts; None for a page with tables alone.
    """
    parts = sections(run)
    scripts = [] if bundle is None else [bundle, _own("report.js")]
    specs = {
        figure.name: {"spec": figure.spec, "series": figure.series, "events": figure.events}
        for section in parts
        for figure in section.figures
        if figure.spec is not None
    }
    body = [
        _head(run, scripts),
        _header(run, parts),
        '<main id="content">',
        "" if scripts else f"<p>The charts are tables here: {escape(extras.INSTALL_COMMAND)} brings charts.</p>",
        *(_section(section, with_charts=bool(scripts)) for section in parts),
        "</main>",
        f"<footer>Made by torchfedrpc {__version__} on {time.strftime('%Y-%m-%d %H:%M')}.</footer>",
    ]
    if scripts:
        data = json.dumps({"charts": specs, "config": charts.CONFIG}).replace("<", "\\u003c")
        body.append(f'<script type="application/json" id="charts">{data}</script>')
        body += [f"<script>{script}</script>" for script in scripts]
    return "\n".join(body) + "\n"


def _head(run: RunData, scripts: Sequence[str]) -> str:
    """Return the head, whose policy lets the browser run the page's own scripts and fetch nothing."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(_title(run))}</title>
<link rel="icon" href="data:,">
<style>
{_own("report.css")}</style>"""


def _header(run: RunData, parts: Sequence[Section]) -> str:
    word, text, is_well = _status(run)
    links = "".join(f'<li><a href="#{part.name}">{escape(part.title)}</a></li>' for part in parts)
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in _facts(run)
    )
    return f"""<a class="skip" href="#content">Skip to content</a>
<header>
<h1>{escape(_title(run))}</h1>
<p class="status{"" if is_well else " alert"}"><strong>{escape(word)}</strong> {escape(text)}</p>
<dl class="facts">{facts}</dl>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>"""


def _title(run: RunData) -> str:
    trainer, dataset = (
        str(run.config.get(group, {}).get("_target_", "")).rpartition(".")[2] for group in ("trainer", "dataset")
    )
    return f"{trainer or 'Federated run'} on {dataset}" if dataset else trainer or "Federated run"


def _status(run: RunData) -> tuple[str, str, bool]:
    """Return how the run ended: in a word or two, in more words, and whether it ended well."""
    where = " ".join([f"output folder {run.name}", *shown_overrides(run)])
    ending = run.trace.end["args"] if run.trace is not None and run.trace.end is not None else None
    if ending is not None and ending["error"] is not None:
        was_stopped = ending["error"].startswith(("CancelledError", "KeyboardInterrupt", "SystemExit"))
        word = "Interrupted" if was_stopped else "Failed"
        return (
            word,
            f"after {len(run.history)} rounds, {where}" + ("" if was_stopped else f": {ending['error']}"),
            False,
        )
    if ending is not None or run.has_model:
        return "Finished", where, True
    return "Not finished", f"rounds so far: {len(run.history)}, {where}", False


def _facts(run: RunData) -> Iterator[tuple[str, str, str]]:
    """Yield the figures at the top: name, value, and a note."""
    last = run.history[-1] if run.history else {}
    names = [name for name in ("test_accuracy", *last) if name not in NOT_METRICS and last.get(name) is not None]
    if names:
        metric = names[0]
        central = run.baseline[-1].get(metric) if run.baseline else None
        note = f"centralised {central:.3f}" if central is not None else ""
        yield metric.replace("_", " ").capitalize(), f"{last[metric]:.3f}", note
    planned = run.config.get("trainer", {}).get("num_rounds", len(run.history))
    yield "Rounds", str(len(run.history)), f"of {planned}"
    if run.trace is not None and run.trace.starts:
        start = run.trace.starts[-1]["args"]
        cohort = last.get("num_clients")
        note = f"{cohort} in the last round, " if cohort is not None else ""
        yield "Clients", str(start["num_clients"]), f"{note}{start['mode']} mode"
    elif run.clients:
        yield "Clients", str(len(run.clients)), ""
    if run.history:
        seconds = sum(record["seconds"] for record in run.history)
        yield "Time of rounds", _duration(seconds), f"{_duration(seconds / len(run.history))} each"
        sent, received = (sum(record[name] for record in run.history) for name in ("bytes_sent", "bytes_received"))
        if sent or received:
            yield (
                "Traffic",
                f"{(sent + received) / 1e6:.1f} MB",
                f"{sent / 1e6:.1f} sent, {received / 1e6:.1f} received",
            )
    if run.trace is not None:
        lost = sum(instant["name"] == "worker lost" for instant in run.trace.instants)
        yield "Workers lost", str(lost), ""


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{seconds / 3600:.1f} h"


def _section(section: Section, *, with_charts: bool) -> str:
    figures = [_figure(figure, with_charts=with_charts) for figure in section.figures]
    charts = [text for text, figure in zip(figures, section.figures, strict=True) if not _is_wide(figure)]
    wide = [text for text, figure in zip(figures, section.figures, strict=True) if _is_wide(figure)]
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    return f"""<section id="{section.name}" aria-labelledby="{section.name}-title">
<h2 id="{section.name}-title">{escape(section.title)}</h2>
{text}
{f'<div class="charts">{"".join(charts)}</div>' if charts else ""}
{"".join(wide)}
</section>"""


def _figure(figure: Figure, *, with_charts: bool) -> str:
    caption = escape(figure.caption)
    has_chart = with_charts and figure.spec is not None
    table = _table(figure)
    if not has_chart:
        return f'<figure id="{figure.name}"><figcaption>{caption}</figcaption>{table}</figure>'
    controls = ""
    if figure.by_round:
        controls = (
            '<div class="controls" hidden><button type="button">Previous</button>'
            "<label>Round <select></select></label>"
            '<button type="button">Next</button></div>'
        )
    label = f"Chart: {caption}. The table below it has the values."
    return f"""<figure id="{figure.name}" data-chart="{figure.name}"><figcaption>{caption}</figcaption>{controls}
<div class="chart" role="img" aria-label="{label}" hidden></div>
<details><summary>Table: {caption}</summary>{table}</details></figure>"""


def _table(figure: Figure) -> str:
    caption = escape(figure.caption)
    head = "".join(
        f'<th scope="col" data-key="{column.key}"{_of_number(column.is_number)}>{escape(column.title)}</th>'
        for column in figure.columns
    )
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<th scope="row"{_of_number(column.is_number)}>{_cell(value)}</th>'
            if number == 0
            else f"<td{_of_number(column.is_number)}>{_cell(value)}</td>"
            for number, (column, value) in enumerate(zip(figure.columns, row, strict=True))
        )
        + "</tr>"
        for row in figure.rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="Table: {caption}" tabindex="0"><table>'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _of_number(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _cell(value: Any) -> str:
    if value is None:
        return _MISSING
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return escape(str(value))


def _is_wide(figure: Figure) -> bool:
    return figure.name in ("scores", "classes", "busy", "calls", "events", "workers", "settings")


def _own(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
