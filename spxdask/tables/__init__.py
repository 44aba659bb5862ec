"""The tables that a run writes, and the catalogue that it reads."""
