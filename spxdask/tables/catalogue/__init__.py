"""The user's catalogue: read from any table, its columns found, its rows checked."""

from spxdask.tables.catalogue.choices import CatalogueColumns
from spxdask.tables.catalogue.given import GivenCatalogue, is_catalogue
from spxdask.tables.catalogue.reading import CatalogueReader, encode_catalogue, read_catalogue
from spxdask.tables.catalogue.rows import SkippedRow, encode_skipped_rows

__all__ = [
    "CatalogueColumns",
    "CatalogueReader",
    "GivenCatalogue",
    "SkippedRow",
    "encode_catalogue",
    "encode_skipped_rows",
    "is_catalogue",
    "read_catalogue",
]
