"""The note about the recipe that made a quantized model, which is saved with the model."""

from __future__ import annotations

from torch import nn

_ATTRIBUTE = "_ipex_quant_recipe"
LONGEST = 500
"""Most characters of a note."""


def note_recipe(model: nn.Module, note: str) -> None:
    """Attach `note` to `model`: the recipe's name, and its cost in quality if measured."""
    setattr(model, _ATTRIBUTE, note)


def recipe_note(model: nn.Module) -> str | None:
    """The note that `note_recipe` attached to `model`, or to the model it was loaded from; None without one."""
    return getattr(model, _ATTRIBUTE, None)


def check_note(note: object) -> str | None:
    """`note`, read from a configuration; ValueError unless it is None or one line of at most `LONGEST` characters."""
    if note is not None and not (isinstance(note, str) and len(note) <= LONGEST and note.isprintable()):
        raise ValueError(f"quantization_config.recipe: expected null or at most {LONGEST} characters of one line")
    return note
