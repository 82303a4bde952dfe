"""`fast_bert`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.models.bert.modeling_bert import BertEmbeddings, BertEncoder, BertLayer, BertModel

from ..frontend.activations import activate_in_place
from ..frontend.casting import is_cast
from ..frontend.prepacking import prepack_for_training, prepack_weights
from ..frontend.training import check_optimizer, copy_together, prepare_training
from ..nn.fused_forward import fused_forward, restore_forwards
from ..nn.prepacked import Prepacked, restore_prepacked
from ..optim import masters_of
from .dropout import FastDropout
from .layer import FastLayer
from .model import FastBert, fuse_bert

DTYPES = (torch.float32, torch.bfloat16)
OWN = (FastBert, FastLayer, FastDropout)


def fast_bert(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    optimizer: Optimizer | None = None,
    unpad: bool = False,
    seed: int | str | None = None,
) -> Any:
    """A copy of a BERT model that computes faster; with an `optimizer`, the copy and a copy of the optimizer for it.

    - `model`: transformers' ``BertModel``, or a module with one as ``.bert``. Its state dict keeps its names.
    - `dtype`: float32 or bfloat16, of all parameters. With an `optimizer`, bfloat16 is that of linear layers and
      embeddings, whose float32 values the optimizer updates and the state dict holds, as `ipex_quant.optimize` does;
      train it under autocast or without. Without one, linear layers have packed copies of their weights, as there.
    - `unpad`: compute only the tokens that an ``attention_mask [B, L]`` does not hide. All hidden states of the others
      are 0, where stock BERT has values without a meaning.
    - `seed`: an integer, or its digits, for a generator of the dropout in ``.bert``, which otherwise is torch's.

    Call it after weights were loaded and before DistributedDataParallel. A decoder, or another model, computes as
    before, and a UserWarning says so. Raises ValueError for another `dtype` or `seed`; TypeError when ``.bert`` has
    embeddings, an encoder or layers of another class than transformers' own, and for an `optimizer` that is none;
    RuntimeError when the model has been optimized by this package in another way, or to train in another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: fast_bert computes in torch.float32 or torch.bfloat16, got {dtype}")
    check_optimizer(optimizer)
    number = read_seed(seed)
    bert = find_bert(model)
    if bert is None:
        warnings.warn(
            f"fast_bert: {type(model).__name__} is no BertModel of transformers and has none as .bert; "
            "it is returned as it is",
            stacklevel=2,
        )
        return model if optimizer is None else (model, optimizer)
    check_parts(model, bert, dtype)
    model, optimizer = copy_together(model, optimizer)
    restore_forwards(model, *OWN)
    restore_prepacked(model)
    cast(model, optimizer, dtype)
    if optimizer is None:
        prepack_weights(model)
        activate_in_place(model, None)
    else:
        prepack_for_training(model, dtype)
    bert = find_bert(model)
    if bert.config.is_decoder or bert.config.add_cross_attention:
        warnings.warn("fast_bert: a decoder, or one with cross-attention, keeps transformers' code", stacklevel=2)
    else:
        fuse_bert(bert, unpad, number)
    return model if optimizer is None else (model, optimizer)


def find_bert(model: Any) -> BertModel | None:
    """`model` or its ``.bert``, whichever is a ``BertModel``."""
    return next((each for each in (model, getattr(model, "bert", None)) if isinstance(each, BertModel)), None)


def check_parts(model: nn.Module, bert: BertModel, dtype: torch.dtype) -> None:
    """TypeError unless `bert` computes as transformers wrote it; RuntimeError if `model` was optimized before.

    What `fast_bert` made is taken again, except in float32 a model that it made to train in bfloat16.
    """
    own = (*OWN, Prepacked) if isinstance(fused_forward(bert), FastBert) else ()
    for name, module in model.named_modules():
        fused = fused_forward(module)
        foreign = type(module).__module__.startswith("ipex_quant.") or (fused and not isinstance(fused, own))
        trained = masters_of(module) and (dtype == torch.float32 or not own)
        if foreign or trained or is_cast(module):
            raise RuntimeError(
                f"fast_bert: {name or 'the model'} was optimized by ipex_quant before; give it the original model"
            )
    check_part("the model", bert, BertModel)
    check_part("embeddings", bert.embeddings, BertEmbeddings)
    check_part("encoder", bert.encoder, BertEncoder)
    for index, layer in enumerate(bert.encoder.layer):
        check_part(f"encoder.layer.{index}", layer, BertLayer)


def check_part(name: str, part: nn.Module, expected: type[nn.Module]) -> None:
    """TypeError unless `part`, called `name`, has the `forward` of the `expected` class."""
    if not isinstance(part, expected) or type(part).forward is not expected.forward:
        raise TypeError(f"{name}: fast_bert expected transformers' {expected.__name__}, got {type(part).__name__}")


def read_seed(seed: int | str | None) -> int | None:
    """`seed` as a number; ValueError if it is none."""
    try:
        return None if seed is None else int(seed)
    except ValueError:
        raise ValueError(f"seed: expected an integer, got {seed!r}") from None


def cast(model: nn.Module, optimizer: Optimizer | None, dtype: torch.dtype) -> None:
    """Give `model`, and the parameters that `optimizer` updates, the `dtype`, as `fast_bert` says."""
    if optimizer is None or dtype == torch.float32:
        model.to(dtype)
    if optimizer is not None:
        prepare_training(model, optimizer, dtype, stacklevel=4)
