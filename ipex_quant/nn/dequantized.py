"""`DequantizedOnRead`: the float weight that a packed one stands for, made when its values are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_any, tree_map_only

if TYPE_CHECKING:
    from .quantized_module import QuantizedModule


def _on_values(name: str) -> Any:
    """A method of the stand-in that torch would not dispatch, since it wants memory or finds nothing to convert."""
    return lambda self, *args, **kwargs: getattr(self._read(), name)(*args, **kwargs)


def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "weight: a packed weight cannot be written to, trained or shared; take a float copy with weight.clone(), or "
        "give the layer another weight with load_state_dict"
    )


class DequantizedOnRead(torch.Tensor):
    """Float stand-in for the packed weight of a `QuantizedModule`: dtype and shape now, values when used."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    float, to, numpy, tolist, __array__, __deepcopy__, __reduce_ex__ = map(
        _on_values, ("float", "to", "numpy", "tolist", "__array__", "__deepcopy__", "__reduce_ex__")
    )
    data = property(lambda self: self, _refuse)
    __setitem__ = requires_grad_ = data_ptr = untyped_storage = _refuse

    @staticmethod
    def __new__(cls, module: QuantizedModule) -> torch.Tensor:
        like = module._float
        return torch.Tensor._make_wrapper_subclass(cls, module.weight_shape, dtype=like.dtype, device=like.device)

    def __init__(self, module: QuantizedModule) -> None:
        self._module = module

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:  # a copy here would lose what is written to it
            return cls(args[0]._module)
        parameters = func._schema.arguments
        given = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
        written = [given.get(p.name) for p in parameters if p.alias_info and p.alias_info.is_write]
        if tree_any(lambda value: isinstance(value, cls), written):
            _refuse()
        args, kwargs = tree_map_only(cls, cls._read, (args, kwargs))
        return func(*args, **kwargs)

    def _read(self) -> torch.Tensor:
        return self._module.dequantized_weight(self.dtype)
