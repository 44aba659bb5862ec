"""Compare the speed of spxdask and its peer, and measure how spxdask scales.

One command does both::

    python benchmarks/run.py            # the table and the plot of docs/speed.md
    python benchmarks/run.py --quick    # takes up to five minutes

Each side runs in a separate process. They process the same files in turn, and report the time
of the work without that of starting up. The peer, spxquery 0.4.1, is installed into a separate
virtual environment, unless --peer-python names an interpreter that has it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import workloads
from matplotlib.figure import Figure

from spxdask.simulate.archive import SimulatedArchive

HERE = Path(__file__).parent
PEER = "spxquery==0.4.1"
# Both sides use one thread a process.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Side:
    """A process that runs the work of one side on command."""

    def __init__(self, python: str, script: str) -> None:
        self.process = subprocess.Popen(
            [python, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=ENVIRONMENT,
        )

    def call(self, name: str, **arguments) -> dict:
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}
        self.process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args} ended while it ran {name}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Row:
    """A row of the table."""

    work: str
    ours: list[float]
    peer: list[float] = field(default_factory=list)
    floor: float | None = None
    rows: int = 0
    peak_mb: float = 0.0
    target: str = ""
    notes: str = ""


def spread(seconds: list[float]) -> str:
    """Return a median with half of the interquartile range."""
    middle = float(np.median(seconds))
    unit, scale = ("ms", 1e3) if middle < 1 else ("s", 1.0)
    low, high = np.percentile(seconds, [25, 75])
    if len(seconds) == 1:
        return f"{middle * scale:.3g} {unit}"
    return f"{middle * scale:.3g} +- {(high - low) / 2 * scale:.2g} {unit}"


def table(rows: list[Row]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| work | ours | peer | ratio | asked | floor | rows/s | peak MB | rows compared |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = float(np.median(row.ours))
        ratio = f"**{np.median(row.peer) / ours:.1f}x**" if row.peer else "-"
        floor = f"{ours / row.floor:.2f} x {row.floor * 1e3:.3g} ms" if row.floor else "-"
        rate = f"{row.rows / ours:,.0f}" if row.rows else "-"
        lines.append(
            f"| {row.work} | {spread(row.ours)} | {spread(row.peer) if row.peer else '-'} | "
            f"{ratio} | {row.target} | {floor} | {rate} | {row.peak_mb:,.0f} | {row.notes} |"
        )
    return "\n".join(lines)


def in_turn(repeats: int, *runs: Callable[[], dict]) -> list[list[dict]]:
    """Run each function once to warm up, then all in turn `repeats` times; return the results."""
    for run in runs:
        run()
    return [
        list(results)
        for results in zip(*([run() for run in runs] for _ in range(repeats)), strict=True)
    ]


@contextmanager
def fresh_folders(work: Path, side: str) -> Iterator[Iterator[Path]]:
    """Yield an iterator over paths of new folders, and remove all of them at the end.

    They are not removed earlier, because ext4 creates files slowly after others were removed.
    """
    parent = work / f"out-{side}"
    shutil.rmtree(parent, ignore_errors=True)
    yield (parent / str(number) for number in itertools.count())
    shutil.rmtree(parent, ignore_errors=True)


def seconds(results: list[dict]) -> list[float]:
    return [result["seconds"] for result in results]


def compare_tables(ours: str, peer: str, n_on_frame: int) -> str:
    """Describe how the peer's table of a frame agrees with ours."""
    read = {"dtype": {"target_id": str}}
    a, b = (pd.read_csv(path, **read).set_index("target_id") for path in (ours, peer))
    common = a.index.intersection(b.index)
    only_ours, only_peer = len(a) - len(common), len(b) - len(common)
    a, b = a.loc[common], b.loc[common]
    background = np.abs(a["bg_level"] - b["bg_level"]).max()
    # The peer uses the product of two pixel scales as the area of a pixel, which is 0.08 % too
    # large, so that its aperture is smaller by half of that.
    ratio = np.nanmedian(b["flux"] / a["flux"])
    notes = [f"{len(common):,} in both", f"the peer's flux {100 * (ratio - 1):+.2f} %"]
    notes.append(f"background within {background:.0e}")
    if only_peer:
        notes.append(f"{only_peer:,} of the peer's are not on the frame")
    if only_ours:
        notes.append(f"{only_ours:,} only ours")
    assert len(a) >= n_on_frame - only_ours
    return ", ".join(notes)


def compare_curves(ours: str, peer: str) -> str:
    """Compare the numbers of light curves."""
    a, b = ({p.name for p in Path(folder).glob("*.csv")} for folder in (ours, peer))
    text = f"{len(a):,} curves, the peer {len(b):,}"
    return f"{text} whose ids collide in double precision" if len(a) > len(b) else text


def bench_extract(ours: Side, peer: Side, work: Path, repeats: int, quick: bool) -> list[Row]:
    image = workloads.frame(work, workloads.exposure())
    rows = []
    cases = [(10, 0, "10x, 2 floors"), (100, 0, "15x"), (1000, 0, "50x, 2.5 floors")]
    if not quick:
        cases += [(10_000, 0, "90x"), (1000, 1_000_000, "60x")]
    for n, elsewhere, target in cases:
        catalogue = workloads.catalogue(work, n, elsewhere)
        ours.call("load", catalogue=catalogue)
        peer.call("load", catalogue=catalogue)
        folders = work / "extract-ours", work / "extract-peer"
        for folder in folders:
            folder.mkdir(exist_ok=True)
        arguments = {"image": image, "catalogue": catalogue}
        floors, mine, theirs = in_turn(
            3 if n == 10_000 else repeats,
            partial(ours.call, "floor", image=image),
            partial(ours.call, "extract", folder=folders[0], **arguments),
            partial(peer.call, "extract", folder=folders[1], **arguments),
        )
        name = f"extract, {n:,} sources on the frame"
        rows.append(
            Row(
                work=name + (f" of {elsewhere:,} all-sky" if elsewhere else ""),
                ours=seconds(mine),
                peer=seconds(theirs),
                floor=float(np.median(seconds(floors))),
                rows=mine[-1]["rows"],
                peak_mb=mine[-1]["peak_mb"],
                target=target,
                notes=compare_tables(mine[-1]["table"], theirs[-1]["table"], n),
            )
        )
        print(table(rows).splitlines()[-1], flush=True)
    compressed = workloads.frame(work, workloads.exposure(1, release="qr3", version=30))
    catalogue = workloads.catalogue(work, 1000)
    (mine,) = in_turn(
        repeats,
        partial(
            ours.call,
            "extract",
            image=compressed,
            catalogue=catalogue,
            folder=work / "extract-ours",
        ),
    )
    rows.append(
        Row(
            work="extract, 1,000 sources, QR3 (compressed flags)",
            ours=seconds(mine),
            rows=mine[-1]["rows"],
            peak_mb=mine[-1]["peak_mb"],
            notes=f"the peer has none; {mine[-1]['rows']:,} rows",
        )
    )
    return rows


def bench_psf(ours: Side, work: Path, repeats: int, quick: bool) -> list[Row]:
    """Compare extraction with PSF and calibration products, and without either."""
    ours.call("calibrate", products=workloads.products(work), cache=work / "cache", band="D3")
    folder = work / "extract-ours"
    folder.mkdir(exist_ok=True)
    cases = [("qr2", 10), ("qr2", 1000), ("qr2", 10_000), ("qr3", 10), ("qr3", 10_000)]
    if not quick:
        cases += [("qr2", 100_000)]
    rows = []
    for release, n in cases:
        version = {"release": "qr3", "version": 30} if release == "qr3" else {}
        number = 1 if release == "qr3" else 0
        image = workloads.frame(work, workloads.exposure(number, **version))
        catalogue = workloads.catalogue(work, n)
        ours.call("load", catalogue=catalogue)
        arguments = {"image": image, "catalogue": catalogue, "folder": folder, "release": release}
        without, with_psf = in_turn(
            repeats,
            partial(ours.call, "extract", psf="none", **arguments),
            partial(ours.call, "extract", psf="nearest", **arguments),
        )
        # The two take turns, so that pairs of them met the same load of the machine.
        pairs = np.array([seconds(with_psf), seconds(without)])
        ratio, more = np.median(pairs[0] / pairs[1]), np.median(pairs[0] - pairs[1])
        target = {10: "3 ms more", 10_000: "1.6 x without"}.get(n, "")
        rows.append(
            Row(
                work=f"extract with PSF and products, {n:,} sources, {release.upper()}",
                ours=seconds(with_psf),
                rows=with_psf[-1]["rows"],
                peak_mb=with_psf[-1]["peak_mb"],
                target=target,
                notes=f"{ratio:.2f} x, {1e3 * more:+.1f} ms to that without",
            )
        )
        print(table(rows).splitlines()[-1], flush=True)
    return rows


def bench_aggregate(ours: Side, peer: Side, work: Path, quick: bool) -> list[Row]:
    ours.call("start_cluster", processes=2)
    rows = []
    cases = (
        [(200_000, 5_000, 5_000)]
        if quick
        else [(1_000_000, 5_000, 5_000), (20_000_000, 100_000, 10_000)]
    )
    for n, sources, per_frame in cases:
        tables_ = workloads.per_image_tables(work, n, sources, per_frame)
        with fresh_folders(work, "ours") as mine_in, fresh_folders(work, "peer") as theirs_in:

            def our_turn(tables_=tables_, into=mine_in) -> dict:
                return ours.call("aggregate", per_image=tables_, folder=next(into))

            def their_turn(tables_=tables_, into=theirs_in) -> dict:
                return peer.call("aggregate", per_image=tables_, folder=next(into))

            runs = [our_turn] if n > 1_000_000 else [our_turn, their_turn]
            mine, *theirs = in_turn(1 if n > 1_000_000 else 5, *runs)
            assert mine[-1]["rows"] == n
            rows.append(
                Row(
                    work=f"aggregate, {n:,} rows, {sources:,} sources, 2 workers",
                    ours=seconds(mine),
                    peer=seconds(theirs[0]) if theirs else [],
                    rows=n,
                    peak_mb=max(result["worker_peak_mb"] for result in mine),
                    target="15x" if theirs else "1.3 x the time a row, 2 GB",
                    notes=compare_curves(mine[-1]["lightcurves"], theirs[0][-1]["lightcurves"])
                    if theirs
                    else f"{mine[-1]['sources']:,} curves",
                )
            )
        print(table(rows).splitlines()[-1], flush=True)
    ours.call("stop_cluster")
    return rows


def bench_run(ours: Side, peer: Side, work: Path, quick: bool) -> list[Row]:
    n_frames, n_sources = (8, 200) if quick else (60, 1000)
    image = workloads.frame(work, workloads.exposure())
    catalogue = workloads.catalogue(work, n_sources)
    options = {
        "catalog_path": str(catalogue),
        "center_ra": workloads.CENTER[0],
        "center_dec": workloads.CENTER[1],
        "radius": 0.5,
        "max_download_workers": 4,
    }
    # Each frame needs a file of its own, because the header has the id of the exposure.
    files = []
    for number in range(n_frames):
        path = work / workloads.exposure(number).filename
        if not path.exists():
            data = bytearray(image.read_bytes())
            for key in (b"OBSID   = '",):
                start = data.index(key) + len(key)
                name = workloads.exposure(number).obs_id.encode()
                data[start : start + len(name)] = name
            path.write_bytes(data)
        files.append(workloads.archived(number, path))
    rows = []
    with (
        SimulatedArchive(files) as archive,
        fresh_folders(work, "ours") as mine_in,
        fresh_folders(work, "peer") as theirs_in,
    ):
        options |= {"tap_url": archive.tap_url, "archive_url": archive.archive_url}

        def run(side: Side, into: Iterator[Path], **more) -> Callable[[], dict]:
            return lambda: side.call("run_all", folder=next(into), **options, **more)

        ours.call("start_cluster", processes=2)
        warm = in_turn(
            1 if quick else 3,
            run(ours, mine_in),
            run(ours, mine_in, keep_images=False),
            run(peer, theirs_in),
        )
        ours.call("stop_cluster")
        (cold,) = in_turn(1 if quick else 3, run(ours, mine_in))
        theirs = warm.pop()
        cases = (
            (warm[0], "", "10x"),
            (warm[1], ", frames not kept", ""),
            (cold, ", and to start and stop the cluster", ""),
        )
        for results, more, target in cases:
            rows.append(
                Row(
                    work=f"run_all, {n_frames} frames x {n_sources:,} sources{more}",
                    ours=seconds(results),
                    peer=seconds(theirs),
                    rows=results[-1]["rows"],
                    peak_mb=results[-1]["peak_mb"],
                    target=target,
                    notes=compare_curves(results[-1]["lightcurves"], theirs[-1]["lightcurves"]),
                )
            )
            print(table(rows).splitlines()[-1], flush=True)
    return rows


def bench_scaling(ours: Side, work: Path, quick: bool) -> dict[str, list[tuple[float, float]]]:
    """Return (size, value) pairs for the plot."""
    image = workloads.frame(work, workloads.exposure())
    folder = work / "extract-ours"
    folder.mkdir(exist_ok=True)
    scaling: dict[str, list[tuple[float, float]]] = {}

    def extract_ms(catalogue: Path) -> float:
        (results,) = in_turn(
            5,
            partial(ours.call, "extract", image=image, catalogue=catalogue, folder=folder),
        )
        return 1e3 * float(np.median(seconds(results)))

    points = scaling["sources on the frame"] = []
    for n in (10, 100, 1000, 10_000) if quick else (10, 100, 1000, 10_000, 100_000):
        catalogue = workloads.catalogue(work, n)
        ours.call("load", catalogue=catalogue)
        points.append((n, extract_ms(catalogue)))
    points = scaling["sources in the catalogue"] = []
    loading = scaling["seconds to load the catalogue"] = []
    for n in (1000, 10_000, 100_000) if quick else (1000, 10_000, 100_000, 1_000_000, 10_000_000):
        catalogue = workloads.catalogue(work, 1000, n - 1000)
        fresh = Side(sys.executable, "side_ours.py")
        loaded = fresh.call("load", catalogue=catalogue)
        fresh.close()
        loading.append((n, loaded["seconds"], loaded["peak_mb"]))
        points.append((n, extract_ms(catalogue)))
    points = scaling["processes"] = []
    catalogue = workloads.catalogue(work, 1000)
    for n in (1, 2):
        ours.call("start_cluster", processes=n)
        images = [str(image)] * 40
        took = ours.call("frames_per_second", images=images, catalogue=catalogue, folder=folder)
        points.append((n, len(images) / took["seconds"]))
    points = scaling["rows to aggregate"] = []
    cases = [(100_000, 5_000, 5_000), (200_000, 5_000, 5_000)]
    if not quick:
        cases += [
            (1_000_000, 5_000, 5_000),
            (5_000_000, 25_000, 10_000),
            (20_000_000, 100_000, 10_000),
        ]
    with fresh_folders(work, "ours") as into:
        for n, sources, per_frame in cases:
            tables_ = workloads.per_image_tables(work, n, sources, per_frame)

            def run(tables_=tables_) -> dict:
                return ours.call("aggregate", per_image=tables_, folder=next(into))

            (results,) = in_turn(1 if n > 1_000_000 else 3, run)
            points.append((n, n / float(np.median(seconds(results)))))
    ours.call("stop_cluster")
    return scaling


def plot(scaling: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Plot the scaling with the size of each input, one panel for each."""
    panels = [
        ("sources on the frame", "ms a frame", "log", "log"),
        ("sources in the catalogue", "ms a frame, 1,000 on it", "log", "linear"),
        ("processes", "frames/s, 1,000 sources on each", "linear", "linear"),
        ("rows to aggregate", "rows/s, 2 processes", "log", "linear"),
    ]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    for number, (name, label, across, up) in enumerate(panels):
        axes = figure.add_subplot(2, 2, number + 1)
        axes.plot(*zip(*scaling[name], strict=True), "o-")
        axes.set(xlabel=name, ylabel=label)
        axes.set(xscale=across, yscale=up)
        if name == "processes":
            axes.set_xticks([1, 2])
        top = 1.1 * max(value for _, value in scaling[name])
        axes.set_ylim(10 if up == "log" else 0, 2 * top if up == "log" else top)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def peer_python(work: Path) -> str:
    """Return the interpreter of an environment with the peer; make it if necessary."""
    folder = work / "peer"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", PEER], check=True)
    return str(python)


def machine() -> str:
    """Return one line that describes the machine."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{len(os.sched_getaffinity(0))} cores of {model}, {platform.system()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, within five minutes")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["extract", "psf", "aggregate", "run", "scaling"],
        help="some parts",
    )
    parser.add_argument("--peer-python", help="interpreter that has spxquery; default: install it")
    parser.add_argument("--work", type=Path, default=Path("benchmark_data"), help="for the data")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="for table and plot")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    parts = options.only or ["extract", "psf", "aggregate", "run", "scaling"]
    ours = Side(sys.executable, "side_ours.py")
    peer = None
    if {"extract", "aggregate", "run"} & {*parts}:
        peer = Side(options.peer_python or peer_python(work), "side_peer.py")
    about = ours.call("about")
    beside = "no other program"
    if peer:
        other = peer.call("about")
        beside = f"spxquery {other['version']} on Python {other['python']}"
    head = (
        f"{date.today()}, {machine()}; spxdask {about['version']} on Python {about['python']}, "
        f"{beside}; medians and half the interquartile range, page cache warm, "
        "one thread a process."
    )
    print(head, flush=True)
    rows = []
    if "extract" in parts:
        rows += bench_extract(ours, peer, work, options.repeats, options.quick)
    if "psf" in parts:
        rows += bench_psf(ours, work, options.repeats, options.quick)
    if "aggregate" in parts:
        rows += bench_aggregate(ours, peer, work, options.quick)
    if "run" in parts:
        rows += bench_run(ours, peer, work, options.quick)
    options.results.mkdir(parents=True, exist_ok=True)
    if rows:
        text = f"{head}\n\n{table(rows)}\n"
        (options.results / "table.md").write_text(text)
        print(f"\n{text}")
    if "scaling" in parts:
        scaling = bench_scaling(ours, work, options.quick)
        (options.results / "scaling.json").write_text(json.dumps(scaling, indent=1) + "\n")
        plot(scaling, options.results / "scaling.png")
        print(json.dumps(scaling, indent=1))
    ours.close()
    if peer:
        peer.close()


if __name__ == "__main__":
    main()
