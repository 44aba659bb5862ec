"""A run as a HATS catalogue: a row a source, with its light curve as a nested column.

The parts of the run, each of which has all rows of some sources, are first sorted by place on the
sky, one by one, into temporary files. Then each partition of the catalogue is gathered from these.
In memory are a part or a partition, never the whole run.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spxdask import __version__
from spxdask.errors import ConfigError, RunFolderError
from spxdask.extras import HATS_EXTRA, import_extra
from spxdask.results.run import Run
from spxdask.results.sources import SOURCE_MEANINGS, summarise_part
from spxdask.storage import local_path, open_store
from spxdask.tables.quantities import ROW_MEANINGS, Meaning
from spxdask.text import format_count

__all__ = ["NESTED_COLUMN", "remove_catalogue", "write_hats"]

logger = logging.getLogger(__name__)

NESTED_COLUMN = "lightcurve"
INDEX, INDEX_ORDER = "_healpix_29", 29
BUILDER = "spxdask"
# Points of a partition, unless a single pixel of the finest order has more: some 200 bytes each.
POINTS_PER_PARTITION = 500_000
FINEST_ORDER = 14


def write_hats(
    folder: str | os.PathLike[str] | Run,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    points_per_partition: int = POINTS_PER_PARTITION,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the light curves of a run as a HATS catalogue, which `lsdb.open_catalog` opens.

    It has a row a source: ``id``, ``ra``, ``dec``, the numbers of points, mean total fluxes by
    band, constancy and times as `Run.sources` has them, and the nested column ``lightcurve``.

    Parameters
    ----------
    folder : path or Run
        The output folder of a run.
    path : path
        Folder of the catalogue, on disk or in an object store, which must not exist yet. It
        appears whole or, in an object store, without ``hats.properties`` until it is whole.
    name : str, optional
        Of the catalogue; default: the last part of the path.
    points_per_partition : int
        How many points a file has at the most, unless they lie closer than 13 arcsec.
    on_progress : callable, optional
        Is called with the number of parts and partitions done, and that of all.

    Raises
    ------
    MissingExtraError
        If the library hats is not installed.
    RunFolderError
        If there are no light curves, or no positions.
    ConfigError
        If the folder of the catalogue has files.
    """
    if points_per_partition < 1:
        raise ConfigError(option="points_per_partition", rule=">= 1", value=points_per_partition)
    import_extra("hats.io", HATS_EXTRA, "a HATS catalogue")
    run = folder if isinstance(folder, Run) else Run(folder)
    target = local_path(path)
    name = name or os.fspath(path).rstrip("/").rpartition("/")[2]
    if target is None:
        if open_store(path).exists("hats.properties"):
            raise ConfigError("there is a catalogue already: choose another path", path=path)
        with tempfile.TemporaryDirectory(prefix="spxdask-hats-") as temporary:
            _write(run, Path(temporary), name, points_per_partition, on_progress)
            _upload(Path(temporary) / "catalogue", os.fspath(path))
        return
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("is not an empty folder: choose another path", path=target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk, so that the catalogue gets its name in one step.
    work = _make_working_folder(target)
    try:
        _write(run, work, name, points_per_partition, on_progress)
        (work / "catalogue").rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_catalogue(path: Path) -> None:
    """Remove a catalogue that `write_hats` wrote on disk, and what killed writers left of one.

    Parameters
    ----------
    path : Path
        Folder of the catalogue; none need be there.

    Raises
    ------
    RunFolderError
        If there is a folder with anything else in it.
    """
    properties = path / "hats.properties"
    if properties.is_file() and f"hats_builder={BUILDER} " in properties.read_text():
        # In one step, so that no part of it remains under its name.
        path.rename(_make_working_folder(path))
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunFolderError("is in the way of the HATS catalogue: move it", path=path)
    for part in path.parent.glob(f".{path.name}.*.part"):
        shutil.rmtree(part)


def _make_working_folder(path: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))


def _write(
    run: Run,
    work: Path,
    name: str,
    points_per_partition: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Write the catalogue to the folder ``catalogue`` of a working folder."""
    from hats.io import paths

    spilled, catalogue = work / "sorted", work / "catalogue"
    spilled.mkdir()
    catalogue.mkdir()
    parts = run.curves.parts
    pixels: list[np.ndarray] = []
    points: list[np.ndarray] = []
    schema: pa.Schema | None = None
    n_done = 0

    def report(n_partitions: int) -> None:
        nonlocal n_done
        n_done += 1
        if on_progress is not None:
            on_progress(n_done, len(parts) + n_partitions)

    for number, table in enumerate(_read_sorted(run)):
        schema = table.schema if schema is None else schema
        pixels.append(table[INDEX].to_numpy())
        points.append(table["points"].to_numpy())
        # Mapped into memory, any piece of such a file is there without being decoded.
        with (
            pa.OSFile(str(spilled / f"{number:06d}.arrow"), "wb") as out,
            pa.ipc.new_file(out, schema) as writer,
        ):
            writer.write_table(table.cast(schema).combine_chunks())
        report(0)
    if schema is None or not sum(map(len, pixels)):
        raise RunFolderError("there is no light curve of a source of the catalogue", path=run.path)
    files = sorted(spilled.iterdir())
    place = np.concatenate(pixels)
    order = np.argsort(place, kind="stable")
    weights = np.concatenate([[0], np.cumsum(np.concatenate(points)[order])])
    chosen = list(_divide(place[order], weights, points_per_partition))
    for pixel_order, pixel, first, last in chosen:
        pieces = []
        for file, sorted_pixels in zip(files, pixels, strict=True):
            low, high = np.searchsorted(sorted_pixels, (first, last))
            if high > low:
                with pa.memory_map(str(file)) as source:
                    pieces.append(pa.ipc.open_file(source).read_all().slice(low, high - low))
        found = pa.concat_tables(pieces)
        del pieces
        found = found.take(pc.sort_indices(found, [(INDEX, "ascending"), ("id", "ascending")]))
        _write_partition(
            found, paths.new_pixel_catalog_file(catalogue, _make_pixel(pixel_order, pixel))
        )
        del found
        report(len(chosen))
    shutil.rmtree(spilled)
    histogram = _count(place, max(pixel_order for pixel_order, *_ in chosen))
    _write_about(run, catalogue, name, [(o, p) for o, p, *_ in chosen], len(place), histogram)


def _make_pixel(order: int, pixel: int) -> Any:
    from hats.pixel_math import HealpixPixel

    return HealpixPixel(order, pixel)


def _read_sorted(run: Run) -> Iterator[pa.Table]:
    """Yield the rows of the catalogue for each part of a run, in order of their place."""
    from hats.pixel_math.spatial_index import compute_spatial_index

    sources = run.folder.saved_catalogue()
    if sources is None:
        raise RunFolderError(
            "positions of sources are not known, as there is no catalogue in state/", path=run.path
        )
    columns: list[str] | None = None
    n_unknown = 0
    for part in run.curves.parts:
        rows = run.curves.read_part(part, columns)
        if columns is None:
            columns = [name for name in rows.column_names if name != "target_id"]
        # What the summary reads and the run lacks is null.
        missing = [n for n in _SUMMARY_READS if n not in rows.column_names]
        whole = rows
        for name in missing:
            kind = pa.string() if name == "band" else pa.float64()
            whole = whole.append_column(name, pa.nulls(len(rows), kind))
        found = summarise_part(whole, run.channels)
        index = pc.index_in(found["id"], value_set=sources.target_id)
        is_known = pc.is_valid(index).to_numpy()
        index = index.fill_null(0).to_numpy()
        ra, dec = sources.ra[index], sources.dec[index]
        place = compute_spatial_index(ra, dec).astype(np.int64)
        arrays: dict[str, Any] = {
            INDEX: place,
            "id": found["id"].combine_chunks().cast(pa.string()),
            "ra": ra,
            "dec": dec,
            **{name: found[name] for name in _SUMMARY if name in found.column_names},
            NESTED_COLUMN: _nest(rows, found["points"].to_numpy(), columns),
        }
        order = np.argsort(place, kind="stable")
        n_unknown += int((~is_known).sum())
        yield pa.table(arrays).take(pa.array(order[is_known[order]]))
    if n_unknown:
        logger.warning(
            "%s: %s left out, as the catalogue of the run does not have %s",
            run.path,
            format_count(n_unknown, "light curve"),
            "its source" if n_unknown == 1 else "their sources",
        )


_SUMMARY_READS = ("psf_flux", "psf_flux_error", "aperture_correction", "neighbour_flux")
_SUMMARY = tuple(name for name in SOURCE_MEANINGS if name not in ("id", "ra", "dec"))


def _nest(rows: pa.Table, counts: np.ndarray, columns: list[str]) -> pa.Array:
    """Return rows as one struct of lists a source, as nested-pandas stores them."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    lists = [
        pa.ListArray.from_arrays(offsets, rows[name].combine_chunks().cast(rows[name].type))
        for name in columns
    ]
    return pa.StructArray.from_arrays(lists, names=columns)


def _divide(
    place: np.ndarray, weights: np.ndarray, limit: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield pixels with few enough points: order, pixel, and the range of their places.

    `place` are the places of the sources, sorted, `weights` the points before each of them.
    """
    waiting = [(0, pixel) for pixel in range(11, -1, -1)]
    while waiting:
        order, pixel = waiting.pop()
        shift = 2 * (INDEX_ORDER - order)
        first, last = pixel << shift, (pixel + 1) << shift
        low, high = np.searchsorted(place, (first, last))
        if low == high:
            continue
        if weights[high] - weights[low] <= limit or order == FINEST_ORDER or high - low == 1:
            yield order, pixel, first, last
        else:
            waiting += [(order + 1, 4 * pixel + child) for child in (3, 2, 1, 0)]


def _write_partition(table: pa.Table, path: Any) -> None:
    """Write a partition with the settings of the library."""
    from hats.io.file_io.file_io import get_parquet_write_table_kwargs

    options = get_parquet_write_table_kwargs(table.schema)
    pq.write_table(table, path.path, filesystem=path.fs, **options)


def _count(place: np.ndarray, order: int) -> tuple[int, np.ndarray]:
    """Return an order, and the number of sources in each of its pixels."""
    order = min(max(order, 8), 10)
    pixels = place >> (2 * (INDEX_ORDER - order))
    return order, np.bincount(pixels, minlength=12 * 4**order)


def _write_about(
    run: Run,
    catalogue: Path,
    name: str,
    pixels: list[tuple[int, int]],
    n_rows: int,
    histogram: tuple[int, np.ndarray],
) -> None:
    """Write what a catalogue says of itself, the properties last."""
    from hats.catalog import PartitionInfo
    from hats.catalog.dataset.table_properties import TableProperties
    from hats.io import paths
    from hats.io.file_io import write_fits_image
    from hats.io.parquet_metadata import (
        write_parquet_metadata,
        write_voparquet_in_common_metadata,
    )
    from hats.io.skymap import write_skymap

    found = write_parquet_metadata(catalogue)
    assert found == n_rows, "rows in are rows out"
    meanings = _find_meanings()
    write_voparquet_in_common_metadata(
        catalogue,
        # Units of the IVOA know no AB magnitudes.
        field_units={k: m.unit.removesuffix("(AB)") for k, m in meanings.items() if m.unit},
        field_ucds={k: m.ucd for k, m in meanings.items() if m.ucd},
        field_descriptions={k: m.description for k, m in meanings.items()},
    )
    PartitionInfo.from_healpix([_make_pixel(*pixel) for pixel in pixels]).write_to_file(
        catalog_path=catalogue
    )
    order, counts = histogram
    write_fits_image(counts, paths.get_point_map_file_pointer(catalogue))
    write_skymap(counts, catalogue)
    about = run.provenance
    properties = TableProperties(
        catalog_name=name,
        catalog_type="object",
        total_rows=n_rows,
        ra_column="ra",
        dec_column="dec",
        healpix_column=INDEX,
        healpix_order=INDEX_ORDER,
        skymap_order=order,
        moc_sky_fraction=float(np.mean(counts > 0)),
        hats_builder=f"{BUILDER} {__version__}",
        obs_title="SPHEREx light curves measured by spxdask",
        obs_regime="Infrared",
        obs_ack=about["acknowledgment"],
        bib_reference="; ".join(about["citation"]),
        spxdask_releases=" ".join(about["releases"]),
        spxdask_calibration="; ".join(f"{k}: {v}" for k, v in about["calibration"].items()),
        spxdask_configuration=about["configuration_digest"],
    )
    properties.to_properties_file(catalogue)


def _find_meanings() -> Mapping[str, Meaning]:
    """Return units, descriptions and UCDs of all columns, those of the light curve with a dot."""
    nested = {f"{NESTED_COLUMN}.{name}": meaning for name, meaning in ROW_MEANINGS.items()}
    own = Meaning("", "place on the sky: HEALPix, order 29, nested", "pos.healpix")
    curve = Meaning("", "rows of the light curve, a point each", "")
    return {**SOURCE_MEANINGS, **nested, INDEX: own, NESTED_COLUMN: curve}


def _upload(catalogue: Path, url: str) -> None:
    """Copy a catalogue to an object store, the properties last, without which it is none."""
    last = ("hats.properties", "properties")
    files = sorted(path for path in catalogue.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name in last):
        relative = path.relative_to(catalogue)
        store = open_store(url)
        for part in relative.parts[:-1]:
            store = store / part
        store.put(relative.name, path.read_bytes())
