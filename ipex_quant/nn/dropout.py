"""Removing dropout from a model."""

from __future__ import annotations

from torch import nn

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def replace_dropout_with_identity(model: nn.Module, for_training: bool = False) -> nn.Module:
    """Replace every dropout inside `model` that is in evaluation mode by an ``nn.Identity``, in place; return `model`.

    The identity has the attribute `p` of the dropout, for code that reads it. With `for_training`, dropouts in training
    mode are replaced too, and `p` is 0, so that such code drops nothing either. Subclasses of torch's dropouts stay.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and type(module) in _DROPOUTS and (for_training or not module.training):
            identity = nn.Identity().train(module.training)
            identity.p = 0.0 if for_training else module.p
            model.set_submodule(name, identity)
    return model
