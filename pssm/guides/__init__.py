"""Guides for models with state paths."""

from pssm.guides.auto import AutoStateSpace

__all__ = ["AutoStateSpace"]
