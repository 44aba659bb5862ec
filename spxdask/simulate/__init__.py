"""The simulated survey: Level 2 files with known truth, and an archive that serves them."""
