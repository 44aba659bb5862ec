"""Runs as large as a survey on one machine: their memory, CPU time and rate.

::

    python benchmarks/survey.py stubs     # 100,000 frames whose fetch and measurement are stubs
    python benchmarks/survey.py soak      # 2,000 real-size frames x 10,000 sources
    python benchmarks/survey.py overlap   # download with extraction, and each of them alone

In `stubs`, everything else is real: query, graph, limit of downloads, ledger, per-image tables,
shuffle and light curves. `soak` and `overlap` fetch a few files under many names from the
simulated archive. Each prints its results and writes them to benchmarks/results/, with a plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import workloads
from distributed import Client, WorkerPlugin
from matplotlib.figure import Figure

from spxdask import BatchConfig, BatchPipeline
from spxdask.run.ledger import Outcome
from spxdask.run.plan import table_name
from spxdask.science.level2.frame import open_frame
from spxdask.science.photometry import measure
from spxdask.simulate.archive import ArchivedFrame, SimulatedArchive
from spxdask.storage import open_store
from spxdask.tables.catalogue import read_catalogue
from spxdask.tables.per_image import encode_rows
from spxdask.tables.schema import PER_IMAGE

HERE = Path(__file__).parent
MB = 1e6


class Stubs(WorkerPlugin):
    """Makes workers wait instead of fetching frames, and invent rows instead of measuring.

    Number and length of the rows are those of real measurements.
    """

    name = "stubs"

    def __init__(self, seconds: float, rows: int, sources: int) -> None:
        self.seconds, self.rows, self.sources = seconds, rows, sources

    def setup(self, worker) -> None:
        from spxdask.stages import stream

        seconds, rows, sources = self.seconds, self.rows, self.sources
        ids = pa.array(np.arange(workloads.FIRST_ID, workloads.FIRST_ID + sources))
        ids = ids.cast(pa.string())

        def fetch_frame(observation, images, options, measure):
            rng = np.random.default_rng(abs(hash(observation.filename)) % (1 << 32))
            pause = seconds * rng.lognormal(-0.02, 0.2)
            time.sleep(pause)
            outcome = Outcome(
                stage="download",
                filename=observation.filename,
                status="done",
                seconds=pause,
                bytes=71_600_000,
                attempts=1,
                checksum="00000000",
            )
            return outcome, measure(observation)

        def extract_frame(observation, per_image, options):
            number = int(observation.obs_id.split("_")[2])
            rng = np.random.default_rng(number)
            first = number * rows % sources
            chosen = (first + np.arange(rows)) % sources
            columns = {
                "target_id": ids.take(pa.array(chosen)),
                "ra": rng.uniform(0, 360, rows),
                "dec": rng.uniform(-90, 90, rows),
                "obs_id": observation.obs_id,
                "band": observation.band,
                "mjd": observation.mjd,
            }
            for name in PER_IMAGE[6:]:
                whole = name == "flag"
                columns[name] = (
                    rng.integers(0, 1 << 22, rows) if whole else rng.lognormal(size=rows)
                )
            columns["filename"] = observation.filename
            content = encode_rows(columns, options.format)
            open_store(per_image).put(table_name(observation.filename, options.format), content)
            return Outcome(
                stage="extract",
                filename=observation.filename,
                status="done",
                seconds=0.05,
                bytes=len(content),
                rows=rows,
                recipe=options.recipe,
                catalogue=options.catalogue_fingerprint,
                sources_fingerprint="0" * 32,
                bounding_circle=(270.0, 66.56, 2.5),
            )

        stream.fetch_frame, stream.extract_frame = fetch_frame, extract_frame


class Cluster:
    """A scheduler and workers in separate processes, as on a cluster of machines."""

    def __init__(self, work: Path, workers: int, threads: int, memory: str) -> None:
        self._scheduler_file = work / "scheduler.json"
        self._scheduler_file.unlink(missing_ok=True)
        self._opened = ExitStack()
        log = self._opened.enter_context((work / "cluster.log").open("wb"))

        def start(*command: str) -> psutil.Process:
            process = subprocess.Popen(
                [sys.executable, "-m", *command, "--scheduler-file", str(self._scheduler_file)],
                stdout=log,
                stderr=log,
                cwd=work,
                env={
                    **os.environ,
                    "PYTHONPATH": str(HERE),
                    "MALLOC_TRIM_THRESHOLD_": str(32 << 20),
                    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
                },
            )
            self._opened.callback(process.wait)
            self._opened.callback(process.terminate)
            return psutil.Process(process.pid)

        self.scheduler = start(
            *("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"),
            *("--dashboard-address", "127.0.0.1:0"),
        )
        for _ in range(workers):
            start(
                *("distributed.cli.dask_worker", "--nthreads", str(threads), "--host", "127.0.0.1"),
                *("--memory-limit", memory, "--local-directory", str(work / "dask-scratch")),
                *("--no-dashboard", "--death-timeout", "60"),
            )
        self.client = Client(scheduler_file=str(self._scheduler_file), timeout="30s")
        self.client.wait_for_workers(workers, timeout=60)
        self.workers = [psutil.Process(pid) for pid in self.client.run(os.getpid).values()]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        self._opened.close()


class Watch:
    """A progress that records memory and the disk space of frames while frames end."""

    def __init__(self, cluster: Cluster, output: Path) -> None:
        self._cluster, self._output = cluster, output
        self.samples: list[dict] = []
        self.stages: dict[str, float] = {}
        self._ended, self._stage = 0, ""
        self._over = threading.Event()
        self._started = time.monotonic()
        self._cpu = self._cpu_seconds()
        threading.Thread(target=self._sample, daemon=True).start()

    def _cpu_seconds(self) -> dict[str, float]:
        processes = {"scheduler": self._cluster.scheduler, "client": psutil.Process()}
        return {name: sum(p.cpu_times()[:2]) for name, p in processes.items()}

    def cpu(self) -> dict[str, float]:
        return {name: now - self._cpu[name] for name, now in self._cpu_seconds().items()}

    def _sample(self) -> None:
        while not self._over.wait(1.0):
            kept = list(self._output.glob("images/*"))
            self.samples.append(
                {
                    "seconds": time.monotonic() - self._started,
                    "stage": self._stage,
                    "ended": self._ended,
                    "scheduler": self._cluster.scheduler.memory_info().rss / MB,
                    "client": psutil.Process().memory_info().rss / MB,
                    "worker": max(w.memory_info().rss for w in self._cluster.workers) / MB,
                    "frames_on_disk": sum(f.stat().st_size for f in kept) / MB,
                }
            )

    def start(self, stage: str, total: int, unit: str) -> None:
        self._stage, self._begun = stage, time.monotonic()
        if stage != "aggregate":
            self._ended = 0

    def advance(self, *, failed: bool = False) -> None:
        if self._stage == "frames":
            self._ended += 1

    def finish(self) -> None:
        self.stages[self._stage] = time.monotonic() - self._begun

    def close(self) -> None:
        self._over.set()


def many(number: int, files: list[Path]) -> list[ArchivedFrame]:
    """Return frames of the archive: a few files under many names."""
    base = [workloads.archived(i, path) for i, path in enumerate(files)]
    made = []
    for i in range(number):
        one = base[i % len(base)]
        obs_id = f"2025W51_1A_{i:06d}_1"
        begin = one.mjd_begin + 0.001 * i
        made.append(
            dataclasses.replace(
                one,
                obs_id=obs_id,
                uri=one.uri.replace(one.obs_id, obs_id),
                mjd_begin=begin,
                mjd_end=begin + 0.0013,
            )
        )
    return made


def config(work: Path, archive: SimulatedArchive, catalogue: Path, **options) -> BatchConfig:
    return BatchConfig(
        catalog_path=str(catalogue),
        center_ra=workloads.CENTER[0],
        center_dec=workloads.CENTER[1],
        radius=0.5,
        max_images=10_000_000,
        tap_url=archive.tap_url,
        archive_url=archive.archive_url,
        calibration="frame",
        **options,
    )


def growth(samples: list[dict], name: str) -> float:
    """Return the growth of memory, MB per thousand frames, from a line fitted to the later half.

    The earlier half is excluded because Dask's log of 100,000 transitions grows until it is
    full, which takes about 15,000 to 50,000 frames.
    """
    at = [s for s in samples if s["stage"] == "frames" and s["ended"]]
    at = at[len(at) // 2 :]
    if len(at) < 4:
        return float("nan")
    return float(np.polyfit([s["ended"] / 1000 for s in at], [s[name] for s in at], 1)[0])


def stubs(options: argparse.Namespace, work: Path) -> dict:
    n, sources = options.frames or 100_000, options.sources or 20_000
    catalogue = workloads.catalogue(work, sources)
    image = work / "empty.fits"
    image.write_bytes(b"")
    output = work / "out-stubs"
    shutil.rmtree(output, ignore_errors=True)
    threads = -(-options.at_once // 2)
    with (
        SimulatedArchive(many(n, [image]), maxrec=n + 1) as archive,
        Cluster(work, 2, threads, "2GB") as cluster,
    ):
        cluster.client.register_plugin(Stubs(options.seconds, options.rows, sources))
        watch = Watch(cluster, output)
        pipeline = BatchPipeline(
            config(
                work,
                archive,
                catalogue,
                output_dir=str(output),
                keep_images=False,
                max_download_workers=options.at_once,
            ),
            client=cluster.client,
            progress=watch,
        )
        summary = pipeline.run_all()
        cpu = watch.cpu()
        watch.close()
    assert summary.stages["aggregate"].rows == n * options.rows, summary
    at_work = summary.stages["extract"].seconds
    found = {
        "frames": n,
        "rows": n * options.rows,
        "sources": sources,
        "seconds of a stub": options.seconds,
        "at once": options.at_once,
        "stage seconds": watch.stages,
        "frames/s": n / at_work,
        "frames/s if only the stubs took time": options.at_once / options.seconds,
        "client CPU ms a frame": 1e3 * cpu["client"] / n,
        "scheduler CPU ms a frame": 1e3 * cpu["scheduler"] / n,
        "MB a thousand frames": {k: growth(watch.samples, k) for k in ("scheduler", "client")},
        "peak MB": {k: max(s[k] for s in watch.samples) for k in ("scheduler", "client", "worker")},
        "ledger MB": (output / "state/ledger.jsonl").stat().st_size / MB,
    }
    draw(watch.samples, ("scheduler", "client", "worker"), f"{n:,} frames, stubs", "survey-stubs")
    shutil.rmtree(output)
    return found


def soak(options: argparse.Namespace, work: Path) -> dict:
    n, sources = options.frames or 2_000, options.sources or 10_000
    files = [workloads.frame(work, workloads.exposure(i)) for i in range(4)]
    catalogue = workloads.catalogue(work, sources)
    output = work / "out-soak"
    shutil.rmtree(output, ignore_errors=True)
    with (
        SimulatedArchive(many(n, files), maxrec=n + 1) as archive,
        Cluster(work, 2, 3, "2GB") as cluster,
    ):
        watch = Watch(cluster, output)
        options_ = config(
            work,
            archive,
            catalogue,
            output_dir=str(output),
            keep_images=False,
            max_download_workers=options.at_once if options.at_once < 16 else 6,
        )
        pipeline = BatchPipeline(options_, client=cluster.client, progress=watch)
        summary = pipeline.run_all()
        watch.close()
    # The expected rows are measured from each file directly, without the pipeline.
    expected: Counter[str] = Counter()
    known = read_catalogue(catalogue)
    for i, path in enumerate(files):
        measured = measure(open_frame(path), known.ra, known.dec, options_.photometry)
        times = len(range(i, n, len(files)))
        for target in known.target_id.take(pa.array(measured.index)).to_pylist():
            expected[target] += times
    wrong = 0
    for target, rows in expected.items():
        with open(output / "lightcurves" / f"{target}.csv", "rb") as file:
            wrong += sum(1 for _ in file) - 1 != rows
    curves = len(os.listdir(output / "lightcurves"))
    found = {
        "frames": n,
        "sources": sources,
        "rows": summary.stages["aggregate"].rows,
        "light curves": curves,
        "light curves with a wrong number of rows": wrong + abs(curves - len(expected)),
        "stage seconds": watch.stages,
        "frames/s": n / summary.stages["extract"].seconds,
        "GB fetched": summary.stages["download"].bytes / 1e9,
        "most frames on disk, MB": max(s["frames_on_disk"] for s in watch.samples),
        "MB a thousand frames": {
            k: growth(watch.samples, k) for k in ("scheduler", "client", "worker")
        },
        "peak MB": {k: max(s[k] for s in watch.samples) for k in ("scheduler", "client", "worker")},
    }
    title = f"{n:,} frames of 71.6 MB x {sources:,} sources"
    draw(watch.samples, ("scheduler", "client", "worker"), title, "survey-soak")
    shutil.rmtree(output)
    return found


def overlap(options: argparse.Namespace, work: Path) -> dict:
    """Time runs whose archive has a fraction of the bandwidth that extraction could use.

    The archive runs on the same cores, and uses one of them to send some GB/s.
    """
    n, sources = options.frames or 60, options.sources or 10_000
    image = workloads.frame(work, workloads.exposure())
    size = image.stat().st_size
    catalogue = workloads.catalogue(work, sources)
    frames = many(n, [image])
    output = work / "out-overlap"

    def run(cluster: Cluster, bandwidth: float | None, *, keep: bool, only: str = "") -> float:
        shutil.rmtree(output, ignore_errors=True)
        with SimulatedArchive(frames, bandwidth=bandwidth) as archive:
            options_ = config(
                work,
                archive,
                catalogue,
                output_dir=str(output),
                keep_images=keep,
                max_download_workers=options.at_once if options.at_once < 16 else 6,
            )
            pipeline = BatchPipeline(options_, client=cluster.client)
            pipeline.run_query()
            if only == "extract":
                pipeline.run_download()
                return pipeline.run_extract().seconds
            if only == "download":
                return pipeline.run_download().seconds
            pipeline._run_frames("download", "extract")
            return pipeline.reports["extract"].seconds

    rows = []
    with Cluster(work, 2, 3, "4GB") as cluster:
        run(cluster, None, keep=False)
        extract = float(
            np.median([run(cluster, None, keep=True, only="extract") for _ in range(3)])
        )
        for factor in (0.125, 0.25, 0.5, 1.0):
            bandwidth = factor * n * size / extract
            download = n * size / bandwidth
            for keep in (False, True):
                both = run(cluster, bandwidth, keep=keep)
                rows.append(
                    {
                        "archive MB/s": bandwidth / MB,
                        "download alone, s": download,
                        "extract alone, s": extract,
                        "images kept": keep,
                        "both, s": both,
                        "beyond the slower": both / max(download, extract) - 1,
                    }
                )
                print(rows[-1], flush=True)
    shutil.rmtree(output)
    return {"frames": n, "sources": sources, "rows": rows}


def draw(samples: list[dict], names: tuple[str, ...], title: str, file: str) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    left = figure.subplots()
    seconds = [s["seconds"] for s in samples]
    for name in names:
        left.plot(seconds, [s[name] for s in samples], label=f"{name}, MB")
    left.set(xlabel="seconds", ylabel="memory [MB]", title=title, ylim=(0, None))
    right = left.twinx()
    right.plot(seconds, [s["ended"] for s in samples], "k:", label="frames")
    right.set(ylabel="frames ended", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(HERE / "results" / f"{file}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["stubs", "soak", "overlap"])
    parser.add_argument("--work", type=Path, default=Path("benchmark_data"), help="for the data")
    parser.add_argument("--frames", type=int, help="default: 100,000, 2,000 or 60")
    parser.add_argument("--sources", type=int, help="default: 20,000, or 10,000")
    parser.add_argument("--rows", type=int, default=20, help="a stub makes")
    parser.add_argument("--seconds", type=float, default=1.0, help="a stub takes")
    parser.add_argument("--at-once", type=int, default=400, help="stubs at once")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    found = {"stubs": stubs, "soak": soak, "overlap": overlap}[options.what](options, work)
    text = json.dumps(found, indent=2)
    print(text)
    (HERE / "results" / f"survey-{options.what}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
