"""The output folder of a run: layout, plan, ledger, lock, summary and status."""
