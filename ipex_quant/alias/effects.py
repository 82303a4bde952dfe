"""What importing IPEX changed in torch, and its users' scripts rely on."""

from __future__ import annotations

from contextlib import ExitStack


def apply() -> ExitStack:
    """Make the changes; closing the result takes them back."""
    return ExitStack()
