"""The tables a run writes."""
