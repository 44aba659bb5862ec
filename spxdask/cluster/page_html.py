"""The page about a run as HTML, from plain data."""

from __future__ import annotations

import html
import time
from typing import Any

from spxdask.text import format_count, format_duration

__all__ = ["format_page"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; color: #222;
       padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin: 1.5em 0 .3em }
progress { width: 100%; height: 1.2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15em 1.5em .15em 0; text-align: left; font-weight: normal }
th { color: #777; border-bottom: 1px solid #ccc } td.n, th.n { text-align: right }
.failed { color: #a00 } .quiet { color: #777 } code { font-size: .9em }
svg { display: block; margin: .6em 0 } svg text { font-size: 11px; fill: #777 }
"""
PLOT_WIDTH, PLOT_HEIGHT = 620, 90


def format_page(state: dict[str, Any], root: str | None) -> str:
    """Return the page.

    Parameters
    ----------
    state : dict
        As `spxdask.cluster.page.Monitor.describe_state` returns it.
    root : str or None
        What leads from the page to where the dashboard is, such as ``../``; None for a file
        that stays when the scheduler has gone, and is not loaded again.

    Returns
    -------
    str
        HTML.
    """
    runs = "".join(map(_format_run, state["runs"])) or "<p>No run has reported yet.</p>"
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>"
        + ", ".join(f"{n:,} {state}" for state, n in counts.items() if n)
        + "</td></tr>"
        for name, counts in state["tasks"].items()
    )
    tasks = f"<h2>Tasks now</h2><table>{rows}</table>" if rows else ""
    reload, links = "", ""
    if root is not None:
        reload = '<meta http-equiv="refresh" content="2">'
        links = (
            f"<p>{format_count(state['workers'], 'worker')}, "
            f"{format_count(state['threads'], 'thread')}; "
            f'<a href="{root}status">dashboard</a>, <a href="{root}spxdask/state.json">as JSON</a>'
            "</p>"
        )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{reload}
<title>{_format_title(state["runs"])}</title><style>{STYLE}</style></head><body>
<h1>spxdask</h1>
{links}
{runs}{tasks}</body></html>"""


def _format_title(runs: list[dict[str, Any]]) -> str:
    """Return the text of the tab: how far the run is that reported last."""
    if not runs:
        return "spxdask"
    stage = min(runs, key=lambda run: run["seconds_since_report"])["stages"][-1]
    ended, total = stage["done"] + stage["failed"], stage["total"]
    share = "done" if stage["state"] == "ended" else f"{100 * ended // max(total, 1)} %"
    return f"{share} {html.escape(str(stage['stage']))} - spxdask"


def _format_run(run: dict[str, Any]) -> str:
    current = run["stages"][-1]
    words = [html.escape(str(run["process"]))]
    if run.get("seconds_elapsed") is not None:
        words.append(f"{format_duration(run['seconds_elapsed'])} elapsed")
    if current["state"] == "running":
        if run.get("finish_time"):
            words.append(f"this stage ends at about {_format_clock(run['finish_time'])}")
        words.append(f"last report {format_duration(run['seconds_since_report'])} ago")
    gone = ""
    if current["state"] == "client gone":
        gone = "<p class=failed>The client has disconnected; the same command resumes the run.</p>"
    head = "<tr><th>stage</th><th></th><th class=n>done</th><th class=n>of</th><th class=n>failed"
    head += "</th><th class=n>GB</th></tr>"
    rows = "".join(map(_format_row, run["stages"]))
    return (
        f"<h2>{html.escape(str(run['output']))}</h2><p>{', '.join(words)}</p>{gone}"
        f"<table>{head}{rows}</table>{_format_current(current, run.get('throughput') or [])}"
        + "".join(map(_format_failures, run["stages"]))
    )


def _format_clock(seconds: float) -> str:
    """Return a time of the near future as a clock of the place where the page is made has it."""
    far = abs(seconds - time.time()) > 12 * 3600
    return time.strftime("%Y-%m-%d %H:%M" if far else "%H:%M", time.localtime(seconds))


def _format_row(stage: dict[str, Any]) -> str:
    failed = f"<span class=failed>{stage['failed']:,}</span>" if stage["failed"] else "0"
    size = f"{stage['bytes'] / 1e9:.3g}" if stage.get("bytes") else ""
    return (
        f"<tr><td><b>{html.escape(str(stage['stage']))}</b></td>"
        f"<td class=quiet>{html.escape(str(stage['state']))}</td><td class=n>{stage['done']:,}</td>"
        f"<td class=n>{stage['total']:,} {html.escape(str(stage['unit']))}</td>"
        f"<td class=n>{failed}</td><td class=n>{size}</td></tr>"
    )


def _format_current(stage: dict[str, Any], throughput: list[tuple[float, float]]) -> str:
    """Return bar, rate and plot of the stage that is at work, or was the last."""
    unit = html.escape(str(stage["unit"]))
    ended, total = stage["done"] + stage["failed"], stage["total"]
    failed = f", <span class=failed>{stage['failed']:,} failed</span>" if stage["failed"] else ""
    rate = ""
    if stage.get("per_second"):
        left = format_duration(stage["seconds_left"])
        rate = f", {total - ended:,} pending at {stage['per_second']:.2f} {unit}/s, {left} left"
    waiting = html.escape(stage.get("waiting") or "")
    waiting = f"<p class=failed>{waiting}</p>" if waiting else ""
    return f"""<p>{stage["done"]:,} of {total:,} {unit} done{failed}{rate}<br>
<progress value="{ended}" max="{max(total, 1)}"></progress></p>{waiting}
{_plot_throughput(throughput, unit)}"""


def _plot_throughput(points: list[tuple[float, float]], unit: str) -> str:
    """Return a plot of units a second against the time since the stage began."""
    if len(points) < 3:
        return ""
    end, top = points[-1][0], max(rate for _, rate in points)
    if not (end > 0 and top > 0):
        return ""
    line = " ".join(
        f"{PLOT_WIDTH * t / end:.1f},{PLOT_HEIGHT * (1 - rate / top):.1f}" for t, rate in points
    )
    return (
        f'<svg width="{PLOT_WIDTH + 90}" height="{PLOT_HEIGHT + 18}" role="img" '
        f'aria-label="{unit} a second against time">'
        f'<rect width="{PLOT_WIDTH}" height="{PLOT_HEIGHT}" fill="#f6f6f6"/>'
        f'<polyline points="{line}" fill="none" stroke="#357" stroke-width="1.5"/>'
        f'<text x="{PLOT_WIDTH + 5}" y="10">{top:.3g} {unit}/s</text>'
        f'<text x="{PLOT_WIDTH + 5}" y="{PLOT_HEIGHT}">0</text>'
        f'<text x="0" y="{PLOT_HEIGHT + 14}">0</text>'
        f'<text x="{PLOT_WIDTH}" y="{PLOT_HEIGHT + 14}" text-anchor="end">'
        f"{format_duration(end)}</text></svg>"
    )


def _format_failures(stage: dict[str, Any]) -> str:
    if not stage["failures"]:
        return ""
    name = html.escape(str(stage["stage"]))
    items = "".join(f"<li><code>{html.escape(str(f))}</code></li>" for f in stage["failures"])
    return f"<p class=failed>Last failures of {name}:</p><ul>{items}</ul>"
