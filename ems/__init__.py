"""Empirical model statistics (EMS): what DPM-Solver-v3 measures on a model, once."""
