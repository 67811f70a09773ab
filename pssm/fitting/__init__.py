"""Fits: one loop that shows progress, saves and can be interrupted; engines for NUTS, SVI and MCLMC; their records."""
