"""Calibration: the data, the walk over a network's blocks, and the one optimisation loop."""
