"""Removing dropout from a model for inference."""

from __future__ import annotations

from torch import nn

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def replace_dropout_with_identity(model: nn.Module) -> nn.Module:
    """Replace every dropout inside `model` that is in evaluation mode by an ``nn.Identity`` with its `p`, in place.

    Code that reads `p` finds what it found before. Subclasses of torch's dropouts stay. Returns `model`.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and type(module) in _DROPOUTS and not module.training:
            identity = nn.Identity().eval()
            identity.p = module.p
            model.set_submodule(name, identity)
    return model
