"""Dask clusters: those that spxdask starts or connects to, and the work that it sends them."""
