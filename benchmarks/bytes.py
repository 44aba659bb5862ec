"""Frames read by rows and whole: time, bytes and requests a frame, over links like the archive's.

::

    python benchmarks/bytes.py            # all links, layouts, sources and windows: 25 minutes
    python benchmarks/bytes.py --quick    # a part of them, in five minutes
    python benchmarks/bytes.py --survey   # the tables again, from the results of the last run

The simulated archive is limited in bandwidth, for all connections together, and waits before each
answer. Each cell is a run of download and extraction without aggregation, with frames not kept, on
a cluster of two workers that is there already. The results go to benchmarks/results/bytes.json,
with a plot, and as tables into docs/speed.md and docs/survey.md; those of a quick run do not.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import workloads
from distributed import Client, LocalCluster
from matplotlib.figure import Figure

from spxdask import BatchConfig, BatchPipeline, PhotometryConfig
from spxdask.simulate.archive import ArchivedFrame, SimulatedArchive

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MB = 1e6
# Bytes a second and seconds a request.
LINKS = {"bucket": (20e6, 0.02), "irsa": (2e6, 0.15)}
LAYOUTS: dict[str, dict[str, Any]] = {"qr2": {}, "qr3": {"release": "qr3", "version": 30}}
SOURCES = (0, 1, 3, 10, 100, 1000)
WINDOWS = (50, 30)
WAYS = ("rows", "auto")
CONNECTIONS = 8
# A run lasts about so long, and has at least and at most so many frames.
SECONDS_A_RUN = 12.0
FEWEST_FRAMES, MOST_FRAMES = 2, 60
# Whole frames take the same time whatever is measured in them.
WHOLE_FRAMES = 2
# Frames that see a field of one degree about the north ecliptic pole.
SURVEY_FRAMES = 24_000
SURVEY_SOURCES = (3, 30, 300)


def make_frames(number: int, layout: str, file: Path, first: int) -> list[ArchivedFrame]:
    """Return one file under many names, of the same place at other times."""
    base = ArchivedFrame.of(workloads.exposure(**LAYOUTS[layout]), file)
    made = []
    for i in range(first, first + number):
        obs_id = f"2025W51_1A_{i:06d}_1"
        begin = base.mjd_begin + 0.001 * i
        made.append(
            dataclasses.replace(
                base,
                obs_id=obs_id,
                uri=base.uri.replace(base.obs_id, obs_id),
                mjd_begin=begin,
                mjd_end=begin + 0.0013,
            )
        )
    return made


def make_catalogue(folder: Path, sources: int) -> Path:
    """Return sources on the frame; for none, one that is just beside it."""
    if sources:
        return workloads.catalogue(folder, sources)
    path = folder / "catalogue-beside.csv"
    ra, dec = workloads.exposure().wcs().all_pix2world([1000.0], [-8.0], 0)
    path.write_text(f"targetid,ra,dec\nbeside,{ra[0]:.6f},{dec[0]:.6f}\n")
    return path


def run(
    client: Client,
    work: Path,
    frames: list[ArchivedFrame],
    link: str,
    way: str,
    sources: int,
    window: int,
) -> dict[str, float]:
    """Return time, bytes and requests a frame."""
    bandwidth, latency_s = LINKS[link]
    output = work / "out-bytes"
    shutil.rmtree(output, ignore_errors=True)
    with SimulatedArchive(frames, bandwidth=bandwidth, latency_s=latency_s) as archive:
        config = BatchConfig(
            catalog_path=str(make_catalogue(work, sources)),
            output_dir=str(output),
            keep_images=False,
            read=way,
            max_download_workers=CONNECTIONS,
            max_images=len(frames),
            tap_url=archive.tap_url,
            archive_url=archive.archive_url,
            calibration="frame",
            photometry=PhotometryConfig(window_size=window),
        )
        pipeline = BatchPipeline(config, client=client)
        found = pipeline.run_query()
        assert len(found) == len(frames), f"{len(found)} of {len(frames)} frames found"
        before = dict(archive.traffic)
        reports = pipeline._run_frames("download", "extract")
        parts = [
            tuple(np.subtract(archive.traffic[kind], before[kind])) for kind in ("file", "range")
        ]
    report = reports["download"]
    assert report.done == len(frames), report.failed
    n = len(frames)
    return {
        "frames": n,
        "seconds": report.seconds / n,
        "MB": float(sum(sent for _, sent in parts) / n / MB),
        "requests": float(sum(answers for answers, _ in parts) / n),
        "by rows": report.by_rows,
        "rows": reports["extract"].rows / n,
        "file MB": frames[0].path.stat().st_size / MB,
    }


def measure_cells(client: Client, work: Path, options: argparse.Namespace) -> list[dict]:
    """Measure all cells, the whole frames of each link and layout once."""
    cells = []
    sources = (0, 1, 10, 1000) if options.quick else SOURCES
    windows = WINDOWS[:1] if options.quick else WINDOWS
    layouts = ("qr2",) if options.quick else tuple(LAYOUTS)
    seconds = 4.0 if options.quick else SECONDS_A_RUN
    counter = itertools.count(1, 1000)
    for layout in layouts:
        file = workloads.frame(work, workloads.exposure(**LAYOUTS[layout]))
        # Compiled loops, imports and the layout of frames are not measured.
        warm = make_frames(4, layout, file, next(counter))
        run(client, work, warm, "bucket", "rows", 100, 30)
        for link in LINKS:
            n_whole = 2 if options.quick else WHOLE_FRAMES
            frames = make_frames(n_whole, layout, file, next(counter))
            whole = run(client, work, frames, link, "whole", 10, windows[0])
            print(f"{link:7} {layout} whole: {describe(whole)}", flush=True)
            for n_sources, window in itertools.product(sources, windows):
                if options.quick and link == "irsa" and n_sources > 10:
                    continue
                cell: dict[str, Any] = {
                    "link": link,
                    "layout": layout,
                    "sources": n_sources,
                    "window": window,
                    "whole": whole,
                }
                # What a frame takes at most if nothing but bytes took time.
                share = 1 - np.exp(-n_sources * (window + 8) / 2040)
                guess = max(share * whole["seconds"], 0.05)
                n = int(np.clip(seconds / guess, FEWEST_FRAMES, MOST_FRAMES))
                for way in WAYS:
                    # Other names, so that nothing is known of these frames.
                    frames = make_frames(n, layout, file, next(counter))
                    cell[way] = run(client, work, frames, link, way, n_sources, window)
                cells.append(cell)
                print(
                    f"{link:7} {layout} {n_sources:5} sources, window {window}: "
                    f"rows {describe(cell['rows'])}; auto {describe(cell['auto'])}",
                    flush=True,
                )
    return cells


def describe(found: dict[str, float]) -> str:
    """Return a measurement in words."""
    return f"{found['seconds']:.3g} s, {found['MB']:.3g} MB, {found['requests']:.3g} requests"


def compare(cell: dict[str, Any]) -> dict[str, float]:
    """Return how much faster rows are than whole frames, and auto than the better of the two."""
    whole, rows, auto = (cell[way]["seconds"] for way in ("whole", "rows", "auto"))
    return {"rows": whole / rows, "auto": auto / min(whole, rows)}


def write_table(cells: list[dict]) -> list[str]:
    """Return the lines of the table for docs/speed.md."""
    lines = [
        "| link | layout | sources | window | whole | by rows | faster | MB | requests | auto |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in cells:
        whole, rows, ratio = cell["whole"], cell["rows"], compare(cell)
        lines.append(
            f"| {cell['link']} | {cell['layout'].upper()} | {cell['sources']:,} "
            f"| {cell['window']} | {whole['seconds']:.2f} s | {rows['seconds']:.2f} s "
            f"| {ratio['rows']:.1f}x | {rows['MB']:.3g} of {whole['MB']:.3g} "
            f"| {rows['requests']:.0f} | {cell['auto']['seconds']:.2f} s, {ratio['auto']:.2f}x |"
        )
    return lines


def find_break_even(cells: list[dict]) -> list[str]:
    """Return from how many sources on rows save nothing, for each link and layout."""
    lines = []
    keys = sorted({(cell["link"], cell["layout"], cell["window"]) for cell in cells})
    for link, layout, window in keys:
        some = [c for c in cells if (c["link"], c["layout"], c["window"]) == (link, layout, window)]
        some = [cell for cell in some if cell["sources"]]
        ratios = [compare(cell)["rows"] for cell in some]
        name = f"{link}, {layout.upper()}, window of {window} pixels"
        if min(ratios) > 1.1:
            lines.append(f"- {name}: rows are faster by {min(ratios):.1f} or more at all numbers")
            continue
        logs = np.log([cell["sources"] for cell in some])
        # From the most sources down, as ratios fall with them.
        at = np.exp(np.interp(1.1, ratios[::-1], logs[::-1]))
        lines.append(f"- {name}: rows save less than a tenth from about {at:.0f} sources on")
    return lines


def estimate_survey(cells: list[dict]) -> list[str]:
    """Return what frames of a field cost, for sources that are on each of them.

    Bytes and seconds a frame are interpolated between the numbers of sources that were measured.
    """
    lines = [
        "| link | sources | bytes | of | time, auto | time, whole frames |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for link in LINKS:
        some = [c for c in cells if c["link"] == link and c["layout"] == "qr2"]
        some = [c for c in some if c["window"] == WINDOWS[0] and c["sources"]]
        if not some:
            continue
        logs = np.log([cell["sources"] for cell in some])

        def interpolate(name: str, way: str, n: int, logs: Any = logs, some: Any = some) -> float:
            values = np.log([cell[way][name] for cell in some])
            return float(np.exp(np.interp(np.log(n), logs, values)))

        whole = some[0]["whole"]
        for n in SURVEY_SOURCES:
            gigabytes = interpolate("MB", "auto", n) * SURVEY_FRAMES / 1e3
            all_gigabytes = whole["MB"] * SURVEY_FRAMES / 1e3
            hours = interpolate("seconds", "auto", n) * SURVEY_FRAMES / 3600
            lines.append(
                f"| {link} | {n} | {gigabytes:,.0f} GB | {all_gigabytes:,.0f} GB "
                f"| {hours:,.1f} h | {whole['seconds'] * SURVEY_FRAMES / 3600:,.0f} h |"
            )
    return lines


def draw(cells: list[dict]) -> None:
    """Plot how much faster frames are by rows, against the number of sources."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for link, layout, window in sorted({(c["link"], c["layout"], c["window"]) for c in cells}):
        some = [c for c in cells if (c["link"], c["layout"], c["window"]) == (link, layout, window)]
        some = [cell for cell in some if cell["sources"]]
        label = f"{link}, {layout.upper()}, {window} pixels"
        sources = [cell["sources"] for cell in some]
        axes[0].loglog(sources, [compare(c)["rows"] for c in some], "o-", label=label)
        axes[1].loglog(sources, [c["rows"]["MB"] for c in some], "o-")
    axes[0].axhline(1.0, color="0.5", lw=0.8)
    axes[0].set(xlabel="sources on the frame", ylabel="time of whole frames / by rows")
    axes[1].set(xlabel="sources on the frame", ylabel="MB a frame")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(RESULTS / "bytes.png", dpi=110)


def report(cells: list[dict], *, is_quick: bool = False) -> None:
    """Print the tables, and write them into the documentation, with the plot."""
    parts = (write_table(cells), find_break_even(cells), estimate_survey(cells))
    table, break_even, survey = ("\n".join(lines) for lines in parts)
    print(table, break_even, survey, sep="\n\n")
    if is_quick:
        return
    fill_in("speed", "bytes", f"{table}\n\n{break_even}")
    fill_in("survey", "survey", survey)
    draw(cells)


def fill_in(page: str, name: str, text: str) -> None:
    """Replace what a page of the documentation has between two comments."""
    path = HERE.parent / "docs" / f"{page}.md"
    block = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
    path.write_text(block.sub(lambda match: f"{match[1]}{text}\n{match[2]}", path.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("benchmark_data"), help="for the data")
    parser.add_argument("--quick", action="store_true", help="a part, within five minutes")
    parser.add_argument("--survey", action="store_true", help="only the tables, of the last run")
    options = parser.parse_args()
    results = RESULTS / "bytes.json"
    if options.survey:
        report(json.loads(results.read_text())["cells"])
        return
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=3, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        cells = measure_cells(client, work, options)
    found = {
        "links": {
            name: {"bytes/s": bandwidth, "seconds a request": latency_s}
            for name, (bandwidth, latency_s) in LINKS.items()
        },
        "quick": options.quick,
        "cells": cells,
    }
    if options.quick:
        results = work / "bytes-quick.json"
    results.write_text(json.dumps(found, indent=2) + "\n")
    report(cells, is_quick=options.quick)


if __name__ == "__main__":
    main()
