"""SPHEREx Level 2 files."""
