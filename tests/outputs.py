"""What a run left in its output folder, read for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from spxdask import BatchPipeline


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of each file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_per_image(folder: Path) -> pd.DataFrame:
    """Return the rows of all per-image tables in CSV, in the order of their names."""
    tables = [
        pd.read_csv(path, dtype={"target_id": str}, keep_default_na=False, na_values={"flux": [""]})
        for path in sorted(folder.glob("*.csv"))
    ]
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class OutputFolder:
    """The output folder of a run on disk, as its user finds it."""

    path: Path

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def per_image(self) -> Path:
        return self.path / "per_image"

    @property
    def lightcurves(self) -> Path:
        return self.path / "lightcurves"

    @property
    def buckets(self) -> Path:
        return self.path / "buckets"

    @property
    def state(self) -> Path:
        return self.path / "state"


def output_of(pipeline: BatchPipeline) -> OutputFolder:
    return OutputFolder(Path(pipeline.config.output_dir))
