"""The Dask cluster a run works on; nothing else imports distributed."""
