"""`WeightOnlyQuantizedExpertLinears`: one linear layer of every expert, called with the tokens sorted by expert."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..numerics import affine
from ..numerics.quantized_stack import QuantizedStack
from ..numerics.saved_weight import SAVED_NAMES, saved_places, saved_stack, to_saved
from ..numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode
from .quantized_module import Placeholder, QuantizedModule, autocast
from .weight_only_linear import OPTIONAL_ENTRY, read_modes, read_scheme, scheme_entry


class WeightOnlyQuantizedExpertLinears(QuantizedModule):
    """``x_e @ dequantize(weight_e).T`` for the rows ``x_e`` of every expert e, with packed weights ``[E, N, K]``.

    It replaces JetMoe's module with one 3-D parameter and is called like it: with `x` float32, bfloat16 or float16
    ``[T, K]``, sorted by expert, and the number of rows of each of E experts. The result ``[T, N]`` has the dtype of
    `x`, or autocast's under torch.autocast; weights of experts without rows are not read. Gradients reach `x`. The
    state dict holds the tensors of `saved_weight`. Raises RuntimeError when called without weights or moved off
    the CPU, ValueError for numbers of rows that do not fit.
    """

    kind = "weight_only_expert_linears"
    entry_names = frozenset(("weight_dtype", "symmetric", "group_size", "lowp_mode", "act_quant_mode"))
    optional_entry_names = OPTIONAL_ENTRY
    weight_names = tuple(name for name in SAVED_NAMES if name != "g_idx")

    def __init__(self, shape: tuple[int, int, int], scheme: WeightScheme) -> None:
        """Make a module without weights for ``(experts, out_features, in_features)``; `load_state_dict` loads them."""
        super().__init__()
        self.shape = tuple(shape)
        self.scheme = scheme
        self.lowp_mode = WoqLowpMode.NONE
        self.act_quant_mode = WoqActQuantMode.NONE
        self.register_buffer("_packed", None, persistent=False)  # [E, bytes], a packed weight each

    @classmethod
    def from_float(cls, mod: nn.Module) -> WeightOnlyQuantizedExpertLinears:
        """Quantize the weights of `mod` as its attribute `qconfig`, a `QConfigWoq`, says; ValueError for NaN or Inf."""
        qconfig = mod.qconfig
        scheme = qconfig.scheme
        weights = mod.weight.detach()
        stack = QuantizedStack.of([ops.quantize_weight(weight, scheme, qconfig.scale_dtype) for weight in weights])
        module = cls(stack.shape, scheme)
        module.lowp_mode, module.act_quant_mode = WoqLowpMode(qconfig.lowp_mode), qconfig.act_quant_mode
        module._packed = ops.split_experts(ops.pack_experts(stack, 1))
        return module.train(mod.training).to(mod.weight.dtype)

    def forward(self, inputs: torch.Tensor, expert_size: Sequence[int]) -> torch.Tensor:
        packed = self._checked()
        experts, out_features, _ = self.shape
        if len(expert_size) != experts or sum(expert_size) != len(inputs):
            raise ValueError(
                f"expert_size: expected the rows of {experts} experts, {len(inputs)} in all, got {list(expert_size)}"
            )
        x = autocast(inputs)
        modes = self.lowp_mode, self.act_quant_mode
        results = [
            ops.woq_linear(rows, data, out_features, None, None, *modes)
            for rows, data in zip(x.split(list(expert_size)), packed, strict=True)
            if len(rows)
        ]
        return torch.cat(results) if results else x.new_empty(0, out_features)

    def quantized_stack(self) -> QuantizedStack:
        """The plain form of the weights, in new tensors; RuntimeError when there are none."""
        return QuantizedStack.of(
            [ops.unpack_weight(ops.PackedWeight(data, None, self.scheme, self.shape[1:])) for data in self._checked()]
        )

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """``(experts, out_features, in_features)``."""
        return self.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return 0 if self._packed is None else self._packed.nbytes

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """The saved tensors of `quantized_stack` by name."""
        return {} if self._packed is None else to_saved(self.quantized_stack())

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weights ``[E, N, K]`` in a new tensor; RuntimeError when there are none."""
        stack = self.quantized_stack()
        return torch.stack([affine.dequantize(stack[expert], dtype) for expert in range(self.shape[0])])

    def describe(self) -> dict[str, Any]:
        """Scheme and compute mode."""
        return {
            **scheme_entry(self.scheme),
            "lowp_mode": self.lowp_mode.name.lower(),
            "act_quant_mode": self.act_quant_mode.name.lower(),
        }

    @classmethod
    def placeholder(cls, module: nn.Module, entry: dict[str, Any]) -> Placeholder:
        """Placeholder of the scheme in `entry` for the float `module`; ValueError when it holds no expert linears."""
        if not holds_expert_linears(module):
            raise ValueError(
                f"expected one linear layer of every expert in a 3-D parameter, got a {type(module).__name__}"
            )
        scheme, _ = read_scheme(entry), read_modes(entry)
        experts, rows, columns = module.weight.shape
        tensors = saved_places(scheme, (experts, rows, columns), False)
        del tensors["g_idx"]
        return Placeholder((experts, rows, columns), entry, tensors)

    @classmethod
    def from_placeholders(cls, loaded: Sequence[Placeholder]) -> list[WeightOnlyQuantizedExpertLinears]:
        """Make one module of each placeholder; ValueError or TypeError for tensors that do not fit the scheme."""
        modules = []
        for place in loaded:
            module = cls(place.shape, read_scheme(place.entry))
            module.lowp_mode, module.act_quant_mode = read_modes(place.entry)
            module._load_weight(place.tensors)
            modules.append(module)
        return modules

    def extra_repr(self) -> str:
        modes = f"lowp_mode={self.lowp_mode.name.lower()}, act_quant_mode={self.act_quant_mode.name.lower()}"
        return f"shape={self.shape}, scheme={self.scheme}, {modes}"

    def _checked(self) -> torch.Tensor:
        if self._packed is None:
            raise RuntimeError(f"{type(self).__name__} has no weights yet; load a state dict or use from_float")
        return self._packed

    def _float_bias(self) -> None:
        return None

    def _expected_names(self, given: dict[str, torch.Tensor]) -> list[str]:
        return [name for name, place in saved_places(self.scheme, self.shape, False).items() if place is not None]

    def _load_weight(self, tensors: dict[str, torch.Tensor | None]) -> None:
        self._packed = ops.split_experts(ops.pack_experts(saved_stack(tensors, self.scheme, self.shape), 1))

    def __getstate__(self) -> dict[str, Any]:
        # Pickles may be read by another machine or version, so they hold the saved weights.
        return {**self.__dict__, "_buffers": {**self._buffers, "_packed": None}, "_saved": self.plain_tensors()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_saved")
        super().__setstate__(state)
        if saved:
            self._load_weight(saved)


def holds_expert_linears(module: nn.Module) -> bool:
    """Whether `module` has one 3-D parameter ``weight``, ``[E, N, K]``, and multiplies rows sorted by expert by it.

    It is run with small weights; attributes that equal its number of experts are adjusted to them meanwhile.
    """
    weight = module._parameters.get("weight")
    if len(module._parameters) != 1 or weight is None or weight.dim() != 3 or module._modules:
        return False
    if len(inspect.signature(module.forward).parameters) != 2:
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    small, x = (torch.randn(s, generator=generator, dtype=torch.float32, device="cpu") for s in ((3, 5, 7), (6, 7)))
    probe = copy.copy(module)
    numbers = {name: 3 for name, value in vars(module).items() if type(value) is int and value == len(weight)}
    probe.__dict__ |= {**numbers, "_parameters": {"weight": small}}
    try:
        with torch.no_grad():
            result = type(module).forward(probe, x, [1, 0, 5])
            return torch.allclose(result, torch.cat((x[:1] @ small[0].t(), x[1:] @ small[2].t())), rtol=1e-4, atol=1e-5)
    except Exception:  # any failure of foreign code means that it is no such module
        return False
