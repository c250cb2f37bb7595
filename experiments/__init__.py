"""The only folder that reads a config or a run folder: what the programs do, as functions that take values."""
