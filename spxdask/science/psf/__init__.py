"""The point spread function: its models, and the fluxes of all sources of a frame by it."""
