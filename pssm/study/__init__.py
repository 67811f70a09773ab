"""One model, every method: compare, report, distribute."""
