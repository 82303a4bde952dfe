"""Tells which modules are linear layers, where their weight is, and which layers cannot be quantized."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
from torch import nn

from ..numerics.scheme import FLOAT_DTYPES
from .stored_linear import StoredLinear

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def output_head(model: nn.Module) -> str | None:
    """Name of the linear layer that computes logits (transformers' output embeddings), or None."""
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    return next((name for name, module in model.named_modules() if module is head and is_linear(module)), None)


class PackedLinear(nn.Linear):
    """Base of quantized linear layers, by which other libraries (peft) recognize them as linear layers.

    It has none of the parameters of an ``nn.Linear``.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def dequantize(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the dequantized `weight` and the `bias`, in their dtype, for inference."""
        weight, bias = self.weight, self.bias
        layer = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta", dtype=weight.dtype)
        tensors = {"weight": weight.clone()} | ({} if bias is None else {"bias": bias.clone()})
        layer.load_state_dict(tensors, assign=True)
        return layer.requires_grad_(False).train(self.training)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is an ``nn.Linear`` or transformers ``Conv1D`` in float, or a subclass of one."""
    return isinstance(module, (nn.Linear, *_conv1d())) and not isinstance(module, PackedLinear)


def weight_matrix(module: nn.Module) -> torch.Tensor:
    """Weight of a linear layer as ``[out_features, in_features]``; a view, since ``Conv1D`` stores it transposed.

    That of a `StoredLinear` is read.
    """
    if isinstance(module, StoredLinear):
        return module.read_weight()
    return oriented(module, module.weight.detach())


def oriented(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """View ``[out_features, in_features]`` of `tensor`, which is laid out as the weight of a linear layer."""
    return tensor.t() if isinstance(module, _conv1d()) else tensor


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear layer; ValueError for another module."""
    if not is_linear(module):
        raise ValueError(f"expected a linear layer, got a {type(module).__name__}")
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, _conv1d()) else (rows, columns)


def obstacle(module: nn.Module) -> str | None:
    """Reason why the linear layer `module` cannot be replaced by a quantized one, or None."""
    base: Any = next(cls for cls in (nn.Linear, *_conv1d()) if isinstance(module, cls))
    if type(module).forward is not base.forward and not _computes_linear(module):
        return f"{type(module).__name__} overrides {base.__name__}.forward"
    return None


def is_convolution(module: nn.Module) -> bool:
    """Whether `module` is an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, or a subclass of one."""
    return isinstance(module, _CONVOLUTIONS)


def conv_obstacle(conv: nn.Module) -> str | None:
    """Reason why the convolution `conv` cannot be replaced by a quantized one, or None."""
    base: Any = next(cls for cls in _CONVOLUTIONS if isinstance(conv, cls))
    own: Any = type(conv)
    if own.forward is not base.forward or own._conv_forward is not base._conv_forward:
        return f"{own.__name__} overrides {base.__name__}.forward"
    return None


def weight_obstacle(module: nn.Module) -> str | None:
    """Reason why the weight of the linear layer `module` cannot be quantized, or None."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {weight.dtype}, not float32, bfloat16 or float16"
    if weight.device.type != "cpu":
        return f"its weight is on device {weight.device}, not cpu"
    return "its weight is empty" if weight.numel() == 0 else None


def holds_experts(module: nn.Module) -> bool:
    """Whether `module` holds 3-D parameters, as transformers stacks the experts of a layer.

    Convolutions do not count; nor do parameters with a single expert, since embeddings of tokens and positions look
    like that; nor parameters in a list, from which a parametrized convolution computes its weight.
    """
    convolution = isinstance(module, (nn.modules.conv._ConvNd, nn.ModuleList))
    shapes = (parameter.shape for parameter in module.parameters(recurse=False))
    return not convolution and any(len(shape) == 3 and shape[0] > 1 for shape in shapes)


def _computes_linear(module: nn.Module) -> bool:
    """Whether the forward of an ``nn.Linear`` subclass, run with a small weight, returns the same as ``F.linear``."""
    own = {*module._parameters, *module._buffers, *module._modules}
    if not isinstance(module, nn.Linear) or own != {"weight", "bias"}:
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (
        torch.randn(shape, generator=generator, dtype=torch.float32) for shape in ((5, 7), (5,), (2, 4, 7))
    )
    # a forward that clamps or rounds differs at some size
    x *= torch.tensor([1e-3, 1.0, 1e2, 1e5], dtype=torch.float32)[:, None]
    bias = None if module.bias is None else bias
    probe = copy.copy(module)
    probe.__dict__ |= {"_parameters": {"weight": weight, "bias": bias}, "in_features": 7, "out_features": 5}
    try:
        takes_more = len(inspect.signature(type(module).forward).parameters) != 2
        result = type(module).forward(probe, x)
        return not takes_more and torch.allclose(result, nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-6)
    except Exception:  # any failure of foreign code means that the layer is no plain linear
        return False


def _conv1d() -> tuple[type, ...]:
    # Without transformers imported no instance of its class can exist, so there is no need to import it here.
    library = sys.modules.get("transformers.pytorch_utils")
    return (library.Conv1D,) if library else ()
