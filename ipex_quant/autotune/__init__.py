"""Finding the best recipe within an accuracy budget."""

from .tuner import autotune

__all__ = ["autotune"]
