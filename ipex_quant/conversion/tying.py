"""Untying weights that are quantized from the embeddings they are tied to."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from .description import is_pretrained


def untie(model: nn.Module, quantized: Collection[str]) -> None:
    """Make transformers forget that parameters of the modules named `quantized` are tied to others.

    Call it while these modules still are float. The others of a tie stay tied; the configuration stays as it is, since
    models read its `tie_word_embeddings` for more than the tie. Models that are not transformers' are left alone.
    """
    if not is_pretrained(model):
        return
    quantized = set(quantized)
    for prefix, part in list(model.named_modules()):
        if is_pretrained(part):
            start = f"{prefix}." if prefix else ""
            ties = part.get_expanded_tied_weights_keys()
            kept = _without(ties, {name.removeprefix(start) for name in quantized if name.startswith(start)})
            if kept != ties:
                part._tied_weights_keys = kept
                part.all_tied_weights_keys = _without(part.all_tied_weights_keys, quantized)
    model.all_tied_weights_keys = _without(model.all_tied_weights_keys, quantized)


def _without(ties: dict[str, str], quantized: set[str]) -> dict[str, str]:
    """Ties ``{target: source}`` between the parameters of other modules; a quantized source hands over to a target."""
    kept, heirs = {}, {}
    for target, source in ties.items():
        if _owner(target) in quantized:
            continue
        if _owner(source) in quantized:
            source = heirs.setdefault(source, target)
        if source != target:
            kept[target] = source
    return kept


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
