"""`DequantizedOnRead`: a float tensor in place of a packed weight, dequantized when its values are read."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_any, tree_map_only


class PackedWeight(Protocol):
    """The interface that `DequantizedOnRead` needs of the module with the packed weight."""

    weight_shape: tuple[int, ...]
    _float: torch.Tensor

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor: ...

    def _set_values(self, values: torch.Tensor) -> None: ...


def _on_values(name: str) -> Any:
    """A method that acts on the values; torch would not dispatch it, since it needs memory or nothing to convert."""
    return lambda self, *args, **kwargs: getattr(self._read(), name)(*args, **kwargs)


def refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "weight: a packed weight cannot be trained, shared, or written to in part; take a float copy with "
        "weight.clone(), write the whole of it, or give the layer another weight with load_state_dict"
    )


class DequantizedOnRead(torch.Tensor):
    """Float stand-in for the packed weight of a `QuantizedModule`, which is dequantized only when values are read.

    An operation that writes to the whole tensor gets the values in float32, which are then quantized again.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    float, to, numpy, tolist, __array__, __deepcopy__, __reduce_ex__ = map(
        _on_values, ("float", "to", "numpy", "tolist", "__array__", "__deepcopy__", "__reduce_ex__")
    )
    __setitem__ = requires_grad_ = data_ptr = untyped_storage = refuse

    @staticmethod
    def __new__(cls, module: PackedWeight) -> torch.Tensor:
        like = module._float
        return torch.Tensor._make_wrapper_subclass(cls, module.weight_shape, dtype=like.dtype, device=like.device)

    def __init__(self, module: PackedWeight) -> None:
        self._module = module

    @property
    def data(self) -> torch.Tensor:
        return self

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        if values is not self and getattr(values, "_module", None) is not self._module:  # ``data += x`` has written
            self._write(values.detach())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:  # writes to a copy would be lost
            return cls(args[0]._module)
        parameters = func._schema.arguments
        given = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
        written = [given.get(p.name) for p in parameters if p.alias_info and p.alias_info.is_write]
        if not tree_any(lambda value: isinstance(value, cls), written):
            args, kwargs = tree_map_only(cls, cls._read, (args, kwargs))
            return func(*args, **kwargs)
        if len(written) > 1 or not isinstance(written[0], cls):
            refuse()
        values = written[0]._module.dequantized_weight(torch.float32)
        args, kwargs = tree_map_only(cls, lambda own: values if own is written[0] else own._read(), (args, kwargs))
        func(*args, **kwargs)
        written[0]._write(values)
        return written[0]

    def _read(self) -> torch.Tensor:
        return self._module.dequantized_weight(self.dtype)

    def _write(self, values: torch.Tensor) -> None:
        if values.shape != self.shape:
            raise ValueError(f"weight: expected values {list(self.shape)}, got {list(values.shape)}")
        self._module._set_values(values.float())
