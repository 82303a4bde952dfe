"""What a quantized model remembers of the recipe that made it, and saves with itself."""

from __future__ import annotations

from torch import nn

_ATTRIBUTE = "_ipex_quant_recipe"
LONGEST = 500
"""Characters of a note."""


def note_recipe(model: nn.Module, note: str) -> None:
    """Let `model` remember `note`: the recipe's name, and what it costs where that was measured."""
    setattr(model, _ATTRIBUTE, note)


def recipe_note(model: nn.Module) -> str | None:
    """What `note_recipe` noted of `model`, also before it was saved; None for another model."""
    return getattr(model, _ATTRIBUTE, None)


def check_note(note: object) -> str | None:
    """`note` as a configuration has it; ValueError when it is none."""
    if note is not None and not (isinstance(note, str) and len(note) <= LONGEST and note.isprintable()):
        raise ValueError(f"quantization_config.recipe: expected null or at most {LONGEST} characters of one line")
    return note
