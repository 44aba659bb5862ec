"""Frames, photometry and the catalogue: arrays in, arrays out, and nothing of Dask."""
