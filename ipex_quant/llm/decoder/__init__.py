"""Decoder layers that run with few native calls, described by data for every family of models."""
