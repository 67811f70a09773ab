"""Fits: NumPyro's own samplers and optimisers in a loop that shows progress, saves, and can be interrupted."""
