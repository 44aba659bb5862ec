"""The archive: names, releases, TAP and transfers."""
