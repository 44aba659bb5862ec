"""The four stages: query, download, extract, aggregate."""
