"""`optimize`: make any torch model faster on CPUs, for inference or training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..conversion.example import Example
from ..errors import ArgumentError
from ..nn.dropout import replace_dropout_with_identity as drop_dropout
from ..nn.fused_forward import restore_forwards
from ..nn.memory_format import auto_channels_last, use_channels_last
from ..nn.prepacked import restore_prepacked
from ..numerics.scheme import FLOAT_DTYPES
from .activations import activate_in_place
from .attention import use_native_attention
from .casting import cast_for_inference
from .concat_linear import concat_linears
from .folding import fold
from .graph_mode import CompiledForward, use_graphs
from .kernel_selection import select_kernels
from .options import Options
from .prepacking import prepack_for_training, prepack_lstms, prepack_weights
from .training import check_optimizer, copy_together, prepare_training


def optimize(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    optimizer: Optimizer | None = None,
    level: str = "O1",
    inplace: bool = False,
    conv_bn_folding: bool | None = None,
    linear_bn_folding: bool | None = None,
    weights_prepack: bool | None = None,
    replace_dropout_with_identity: bool | None = None,
    optimize_lstm: bool | None = None,
    split_master_weight_for_bf16: bool | None = None,
    fuse_update_step: bool | None = None,
    auto_kernel_selection: bool | None = None,
    sample_input: Any = None,
    graph_mode: bool | None = None,
    concat_linear: bool | None = None,
) -> Any:
    """Optimize `model` for inference or, in training mode and with its `optimizer`, for training.

    Returns the model, or with an optimizer both. `level` "O1" makes the optimizations that are True below, "O0" none;
    an option that is not None counts instead. Modules keep their class, names and parameters, except that dropouts and
    folded BatchNorms become an ``nn.Identity``; they may be copied, saved, loaded, traced, scripted, compiled,
    differentiated, and optimized again. Graphs that ``torch.jit.trace`` makes of transformers models optimized for
    inference are for inference: the native attention in them passes no gradients.

    For inference:

    - `dtype` bfloat16 or float16: parameters of convolutions, linear layers, embeddings, LSTMs and attention are cast.
      Call such a model under ``torch.autocast``, or with inputs of that dtype; prepacked layers take float32 ones too.
    - `conv_bn_folding`, `linear_bn_folding` (True): a BatchNorm is folded into the layer before it, if nothing else
      reads that layer's output.
    - `replace_dropout_with_identity` (True).
    - `weights_prepack` (True): linear layers and convolutions compute with copies of their weights in oneDNN's layout,
      which are made in the first calls and follow changes of the parameters (`ipex_quant.nn.prepacked`). On CPUs that
      multiply no bfloat16 or float16 they compute in float32. It costs the memory of these copies. An activation module
      that alone reads a layer's results writes over them.
    - `optimize_lstm` (True): LSTMs do the same on such CPUs; elsewhere torch's are oneDNN's.
    - `concat_linear` (False): linear layers with one parent that read one tensor are one matrix product.
    - `auto_kernel_selection` (False): layers for which prepacking is slower in a run of `sample_input` do without. No
      kernel is selected without a `sample_input`, and a warning says so.
    - `graph_mode` (False): the model runs as graphs that ``torch.compile`` makes, or, with a warning, as it is.

    For training:

    - `dtype` bfloat16 or float16: parameters of convolutions, linear layers and embeddings are cast. Their float32
      values are what the optimizer updates and the state dict holds.
    - `split_master_weight_for_bf16` (True): such a value is the bfloat16 parameter and the 16 bits that it lacks, for
      SGD, Adam, AdamW, Adagrad, Lamb and Lars; for other optimizers, with a warning, a copy.
    - `fuse_update_step` (True): these optimizers update in one pass over memory; others, with a warning, as they do.

    At "O1", weights of convolutions are laid out channels last, if `auto_channels_last` is on, and transformers models
    use the native attention for inference.

    Without `inplace`, the result is a copy. A model that cannot be copied is changed in place, with a warning. A
    ScriptModule is returned as it is. `sample_input`, a tensor, a tuple of positional or a dict of keyword arguments,
    is run where shapes, or what reads a tensor, must be known.

    Raises RuntimeError for an unknown `level`; ValueError for another `dtype`, a `sample_input` that does not fit, a
    model in training mode without an optimizer, and an optimizer with a model in evaluation mode (these two are
    AssertionErrors too); TypeError if `model` is no module or `optimizer` no optimizer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_optimizer(optimizer)
    if isinstance(model, torch.jit.ScriptModule):
        return model if optimizer is None else (model, optimizer)
    if model.training and optimizer is None:
        raise ArgumentError("optimizer: the optimizer should be given for training mode; call model.eval() to infer")
    if not model.training and optimizer is not None:
        raise ArgumentError("optimizer: expected None for a model in evaluation mode; call model.train() to train")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype: expected torch.float32, torch.bfloat16, torch.float16 or None, got {dtype}")
    options = Options.of(
        level,
        conv_bn_folding=conv_bn_folding,
        linear_bn_folding=linear_bn_folding,
        weights_prepack=weights_prepack,
        replace_dropout_with_identity=replace_dropout_with_identity,
        optimize_lstm=optimize_lstm,
        split_master_weight_for_bf16=split_master_weight_for_bf16,
        fuse_update_step=fuse_update_step,
        auto_kernel_selection=auto_kernel_selection,
        graph_mode=graph_mode,
        concat_linear=concat_linear,
    )
    with torch.inference_mode(False):  # tensors of inference mode can be neither loaded into nor trained
        return _optimize(model, optimizer, dtype, options, inplace, _example(sample_input))


def _optimize(
    model: nn.Module,
    optimizer: Optimizer | None,
    dtype: torch.dtype | None,
    options: Options,
    inplace: bool,
    example: Example | None,
) -> Any:
    if not inplace:
        model, optimizer = _copied(model, optimizer)
    restore_prepacked(model)
    restore_forwards(model, CompiledForward)
    if options.channels_last and auto_channels_last():
        use_channels_last(model)
    if optimizer is None:
        _optimize_inference(model, dtype, options, example)
    else:
        model, optimizer = _optimize_training(model, optimizer, dtype, options)
    if options.graph_mode:
        use_graphs(model)
    return model if optimizer is None else (model, optimizer)


def _optimize_inference(model: nn.Module, dtype: torch.dtype | None, options: Options, example: Example | None) -> None:
    if options.conv_bn_folding or options.linear_bn_folding:
        fold(model, options.conv_bn_folding, options.linear_bn_folding, example)
    if options.replace_dropout_with_identity:
        drop_dropout(model)
    if dtype in (torch.bfloat16, torch.float16):
        cast_for_inference(model, dtype)
    if options.native_attention:
        use_native_attention(model)
    if options.weights_prepack:
        prepack_weights(model)
    if options.optimize_lstm:
        prepack_lstms(model)
    if options.concat_linear:
        concat_linears(model, example)
    if options.auto_kernel_selection and example is not None:
        select_kernels(model, example)
    elif options.auto_kernel_selection:
        warnings.warn("auto_kernel_selection: nothing to time kernels on; give it a sample_input", stacklevel=4)
    if options.weights_prepack:
        activate_in_place(model, example)


def _optimize_training(
    model: nn.Module, optimizer: Optimizer, dtype: torch.dtype | None, options: Options
) -> tuple[nn.Module, Optimizer]:
    model, optimizer = prepare_training(
        model, optimizer, dtype, options.split_master_weight_for_bf16, options.fuse_update_step, stacklevel=5
    )
    if options.weights_prepack and dtype is not None:
        prepack_for_training(model, dtype)
    return model, optimizer


def _copied(model: nn.Module, optimizer: Optimizer | None) -> tuple[nn.Module, Optimizer | None]:
    """Copies that belong together; the originals, with a warning, if they cannot be copied."""
    try:
        return copy_together(model, optimizer)
    except Exception as error:  # foreign code
        warnings.warn(f"the model cannot be copied, and is optimized in place: {error}", stacklevel=4)
        return model, optimizer


def _example(sample_input: Any) -> Example | None:
    if sample_input is None:
        return None
    if isinstance(sample_input, Mapping):
        return Example(kwargs=sample_input, source="sample_input")
    args = tuple(sample_input) if isinstance(sample_input, (tuple, list)) else (sample_input,)
    return Example(args, source="sample_input")
