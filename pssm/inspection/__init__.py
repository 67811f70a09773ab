"""The anatomy of a NumPyro model, from one trace: its sites, their axes, and the methods that apply."""

from pssm.inspection.check import ModelCheck, check_model

__all__ = ["ModelCheck", "check_model"]
