"""`WeightOnlyQuantizedExperts`: the experts of a layer with their weights packed, in 2 to 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..numerics import affine
from ..numerics.quantized_stack import QuantizedStack
from ..numerics.saved_weight import SAVED_NAMES, saved_places, saved_stack, to_saved
from ..numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode
from ..ops import ExpertGate
from .linears import holds_experts
from .quantized_module import Placeholder, QuantizedModule, autocast
from .stacked_experts import (
    PROJECTIONS,
    expert_bias,
    expert_gate,
    expert_layout,
    expert_weight,
    experts_obstacle,
    experts_shape,
)
from .weight_only_linear import OPTIONAL_ENTRY, read_modes, read_scheme, scheme_entry


class WeightOnlyQuantizedExperts(QuantizedModule):
    """A mixture of E experts with packed weights: ``down(activation(gate(x)) * up(x))`` or ``down(activation(up(x)))``.

    It replaces a transformers module with the weights of all experts in 3-D parameters and is called like it: with `x`
    float32, bfloat16 or float16 ``[T, H]``, expert indices ``[T, k]`` and routing weights ``[T, k]``; or, if `batched`,
    with ``[E * T, H]``, T rows for each expert in turn. The result has the shape of `x` and its dtype, or autocast's
    under torch.autocast; only the weights of chosen experts are read. Gradients reach `x` and the routing weights.

    The state dict holds the tensors of `saved_weight` as ``gate_up_codes``, ``down_scales`` and so on, gate above up
    (or up alone), and ``gate_up_bias`` and ``down_bias`` in float32, each if there is one; saving unpacks the weights
    and loading packs them. `weight` is ``[E, 3 * I, H]``: gate, up and the transpose of down; without a gate
    ``[E, 2 * I, H]``. Raises RuntimeError when called without weights or moved off the CPU.
    """

    kind = "weight_only_experts"
    entry_names = frozenset(
        ("weight_dtype", "symmetric", "group_size", "act_order", "bias", "lowp_mode", "act_quant_mode")
    )
    optional_entry_names = OPTIONAL_ENTRY
    weight_names = tuple(f"{projection}_{name}" for projection in PROJECTIONS for name in (*SAVED_NAMES, "bias"))

    batched = False
    """Whether the module is called with rows for each expert in turn."""

    def __init__(self, shape: tuple[int, int, int], gate: ExpertGate, scheme: WeightScheme) -> None:
        """Make a module without weights for ``(experts, hidden_size, intermediate_size)``.

        `load_state_dict` loads the weights.
        """
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = shape
        self.gate = gate
        self._gate_arguments = ops.gate_arguments(gate)
        self.scheme = scheme
        self.lowp_mode = WoqLowpMode.NONE
        self.act_quant_mode = WoqActQuantMode.NONE
        for projection in PROJECTIONS:
            for name in ("packed", "perm", "bias"):
                self.register_buffer(f"_{projection}_{name}", None, persistent=False)

    @classmethod
    def from_stacks(
        cls,
        stacks: tuple[QuantizedStack, QuantizedStack],
        gate: ExpertGate,
        biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        lowp_mode: WoqLowpMode = WoqLowpMode.NONE,
        act_quant_mode: WoqActQuantMode = WoqActQuantMode.NONE,
    ) -> WeightOnlyQuantizedExperts:
        """Pack the stacks of gate above up ``[E, 2 * I, H]``, or up alone, and down ``[E, H, I]``.

        Raises ValueError if they do not fit.
        """
        experts, hidden, width = stacks[1].shape
        module = cls((experts, hidden, width), gate, stacks[1].scheme)
        module.lowp_mode = WoqLowpMode(lowp_mode)
        module.act_quant_mode = WoqActQuantMode(act_quant_mode)
        module._set_weights(stacks, biases)
        return module

    @classmethod
    def from_float(cls, mod: nn.Module) -> WeightOnlyQuantizedExperts:
        """Quantize the experts that `mod` holds as its attribute `qconfig`, a `QConfigWoq`, says.

        Biases of zeros are dropped. Raises ValueError when the weights hold NaN or Inf.
        """
        qconfig = mod.qconfig
        experts, scheme, scale_dtype = experts_shape(mod)[0], qconfig.scheme, qconfig.scale_dtype
        stacks = [
            QuantizedStack.of(
                [ops.quantize_weight(expert_weight(mod, name, e), scheme, scale_dtype) for e in range(experts)]
            )
            for name in PROJECTIONS
        ]
        return cls.in_place_of(mod, tuple(stacks), qconfig)

    @classmethod
    def in_place_of(
        cls,
        mod: nn.Module,
        stacks: tuple[QuantizedStack, QuantizedStack],
        qconfig: Any,
        biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> WeightOnlyQuantizedExperts:
        """Make a module with `stacks` and the gate of `mod`; `qconfig` sets the compute mode.

        A None in `biases` means the bias of `mod`, whose weights are not read.
        """
        own = zip(biases, PROJECTIONS, strict=True)
        biases = tuple(expert_bias(mod, name) if bias is None else bias for bias, name in own)
        module = cls.from_stacks(stacks, expert_gate(mod), biases, qconfig.lowp_mode, qconfig.act_quant_mode)
        module.batched = expert_layout(mod).batched
        return module.train(mod.training).to(mod.down_proj.dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.batched:
            return self._run_batched(hidden_states)
        return self._run(hidden_states, top_k_index, top_k_weights)

    def _run_batched(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = len(hidden_states)
        experts = torch.arange(self.num_experts).repeat_interleave(rows // self.num_experts)[:, None]
        weights = torch.ones(rows, 1, dtype=torch.float32)
        if self._gate_up_bias is not None or self._down_bias is not None or torch.compiler.is_compiling():
            return self._run(hidden_states, experts, weights)
        # Llama 4 gives zeros to experts that were not chosen, and gets zeros back: their weights need not be read.
        chosen = (hidden_states != 0).any(dim=1).nonzero()[:, 0]
        result = self._run(hidden_states[chosen], experts[chosen], weights[chosen])
        return result.new_zeros(rows, self.hidden_dim).index_copy(0, chosen, result)

    def _run(self, hidden_states: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        buffers = self._buffers
        if buffers["_down_packed"] is None:
            raise RuntimeError("WeightOnlyQuantizedExperts has no weights yet; load a state dict or use from_float")
        return ops.run_experts(
            autocast(hidden_states),
            experts,
            weights,
            *(buffers[f"_{projection}_{name}"] for name in ("packed", "bias", "perm") for projection in PROJECTIONS),
            self.num_experts,
            self.intermediate_dim,
            int(self.lowp_mode),
            int(self.act_quant_mode),
            *self._gate_arguments,
        )

    def quantized_stack(self, projection: str) -> QuantizedStack:
        """The plain form of the weights of "gate_up" or "down", in new tensors; RuntimeError when there are none."""
        return ops.unpack_experts(self._packed_experts(projection))

    def projection_bias(self, projection: str) -> torch.Tensor | None:
        """Float32 biases of "gate_up" ``[E, 2 * I]``, gate before up, or of "down" ``[E, H]``; None without any."""
        return self._buffers[f"_{projection}_bias"]

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """``(experts, 3 * intermediate_size, hidden_size)``, or twice that size without a gate."""
        return self.num_experts, (self.gate.blocks + 1) * self.intermediate_dim, self.hidden_dim

    @property
    def nbytes(self) -> int:
        """Bytes that the module holds: packed weights, biases and input permutations."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values() if b is not None)

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of both stacks and the biases by name, without those that are None."""
        tensors = {}
        for projection in PROJECTIONS:
            if self._buffers[f"_{projection}_packed"] is not None:
                own = to_saved(self.quantized_stack(projection)) | {"bias": self._buffers[f"_{projection}_bias"]}
                tensors |= {f"{projection}_{name}": tensor for name, tensor in own.items() if tensor is not None}
        return tensors

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weights in a new tensor of `weight_shape`; RuntimeError when there are none."""
        gate_up, down = map(self.quantized_stack, PROJECTIONS)
        return torch.stack(
            [
                torch.cat((affine.dequantize(gate_up[index], dtype), affine.dequantize(down[index], dtype).t()))
                for index in range(self.num_experts)
            ]
        )

    def describe(self) -> dict[str, Any]:
        """Scheme, compute mode, and which optional tensors there are."""
        return {
            **scheme_entry(self.scheme),
            "act_order": [self._buffers[f"_{projection}_perm"] is not None for projection in PROJECTIONS],
            "bias": [self._buffers[f"_{projection}_bias"] is not None for projection in PROJECTIONS],
            "lowp_mode": self.lowp_mode.name.lower(),
            "act_quant_mode": self.act_quant_mode.name.lower(),
        }

    @classmethod
    def placeholder(cls, module: nn.Module, entry: dict[str, Any]) -> Placeholder:
        """Placeholder of the scheme in `entry` for the float `module`; ValueError for experts it cannot replace."""
        obstacle = experts_obstacle(module) if holds_experts(module) else "it holds no experts"
        if obstacle:
            raise ValueError(f"expected experts in 3-D parameters, got a {type(module).__name__}: {obstacle}")
        scheme = read_scheme(entry)
        read_modes(entry)
        experts, hidden, width = experts_shape(module)
        layout, tensors = expert_layout(module), {}
        sizes = (("gate_up", layout.blocks * width, hidden), ("down", hidden, width))
        for index, (projection, rows, columns) in enumerate(sizes):
            places = saved_places(scheme, (experts, rows, columns), _flags(entry, "act_order")[index])
            bias = (torch.float32, (experts, rows)) if _flags(entry, "bias")[index] else None
            tensors |= {f"{projection}_{name}": place for name, place in (places | {"bias": bias}).items()}
        place = Placeholder((experts, (layout.blocks + 1) * width, hidden), entry, tensors)
        place.gate, place.batched = expert_gate(module), layout.batched
        return place

    @classmethod
    def from_placeholders(cls, loaded: Sequence[Placeholder]) -> list[WeightOnlyQuantizedExperts]:
        """Make one module of each placeholder; ValueError or TypeError for tensors that do not fit the scheme."""
        modules = []
        for place in loaded:
            experts, rows, hidden = place.shape
            module = cls((experts, hidden, rows // (place.gate.blocks + 1)), place.gate, read_scheme(place.entry))
            module.batched = place.batched
            module.lowp_mode, module.act_quant_mode = read_modes(place.entry)
            module._load_weight({name: tensor for name, tensor in place.tensors.items() if tensor is not None})
            modules.append(module)
        return modules

    def extra_repr(self) -> str:
        fields = {
            "num_experts": self.num_experts,
            "hidden_dim": self.hidden_dim,
            "intermediate_dim": self.intermediate_dim,
            "gate" if self.gate.gated else "activation": self.gate.activation.name.lower(),
            "scheme": self.scheme,
            "lowp_mode": self.lowp_mode.name.lower(),
            "act_quant_mode": self.act_quant_mode.name.lower(),
        }
        return ", ".join(f"{name}={value}" for name, value in fields.items())

    def _packed_experts(self, projection: str) -> ops.PackedExperts:
        data = self._buffers[f"_{projection}_packed"]
        if data is None:
            raise RuntimeError("WeightOnlyQuantizedExperts has no weights yet; load a state dict or use from_float")
        perm = self._buffers[f"_{projection}_perm"]
        if projection == "down":
            shape = (self.num_experts, self.hidden_dim, self.intermediate_dim)
            return ops.PackedExperts(data, perm, self.scheme, shape, 1)
        blocks = self.gate.blocks
        shape = (self.num_experts, blocks * self.intermediate_dim, self.hidden_dim)
        return ops.PackedExperts(data, perm, self.scheme, shape, blocks)

    def _set_weights(
        self,
        stacks: tuple[QuantizedStack, QuantizedStack],
        biases: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> None:
        experts, hidden, width = self.num_experts, self.hidden_dim, self.intermediate_dim
        shapes = [(experts, self.gate.blocks * width, hidden), (experts, hidden, width)]
        if [stack.shape for stack in stacks] != shapes or any(stack.scheme != self.scheme for stack in stacks):
            raise ValueError(
                f"gate_up, down: expected {self.scheme} of shapes {shapes}, got "
                + " and ".join(f"{stack.scheme} {stack.shape}" for stack in stacks)
            )
        for projection, shape, bias in zip(PROJECTIONS, shapes, biases, strict=True):
            if bias is not None and bias.shape != shape[:2]:
                raise ValueError(f"{projection}_bias: expected shape {list(shape[:2])}, got {list(bias.shape)}")
        for projection, stack, bias in zip(PROJECTIONS, stacks, biases, strict=True):
            packed = ops.pack_experts(stack, self.gate.blocks if projection == "gate_up" else 1)
            self._buffers[f"_{projection}_packed"], self._buffers[f"_{projection}_perm"] = packed.data, packed.perm
            bias = None if bias is None else bias.detach().to(torch.float32, copy=True)
            self._buffers[f"_{projection}_bias"] = bias

    def _expected_names(self, given: dict[str, torch.Tensor]) -> list[str]:
        places = saved_places(self.scheme, (self.num_experts, self.hidden_dim, self.intermediate_dim), False)
        needed = {name for name, place in places.items() if place is not None}
        present = {"g_idx": "perm", "bias": "bias"}  # if the module has them; without weights, if given
        empty = self._gate_up_packed is None

        def wanted(projection: str, name: str) -> bool:
            if name not in present:
                return name in needed
            if empty:
                return f"{projection}_{name}" in given
            return self._buffers[f"_{projection}_{present[name]}"] is not None

        return [full for full in self.weight_names if wanted(*_split_name(full))]

    def _load_weight(self, tensors: dict[str, torch.Tensor]) -> None:
        experts, hidden, width = self.num_experts, self.hidden_dim, self.intermediate_dim
        shapes = {"gate_up": (experts, self.gate.blocks * width, hidden), "down": (experts, hidden, width)}
        stacks = tuple(
            saved_stack(
                {name: tensors.get(f"{projection}_{name}") for name in SAVED_NAMES}, self.scheme, shapes[projection]
            )
            for projection in PROJECTIONS
        )
        self._set_weights(stacks, tuple(tensors.get(f"{projection}_bias") for projection in PROJECTIONS))

    def __getstate__(self) -> dict[str, Any]:
        # Pickles may be read by another machine or version, so they hold the saved weights.
        packed = {f"_{projection}_{name}" for projection in PROJECTIONS for name in ("packed", "perm", "bias")}
        buffers = {name: None if name in packed else buffer for name, buffer in self._buffers.items()}
        return {**self.__dict__, "_buffers": buffers, "_saved": self.plain_tensors()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_saved")
        super().__setstate__(state)
        if saved:
            self._load_weight(saved)


def _flags(entry: dict[str, Any], name: str) -> list[bool]:
    """Value `name` of a saved configuration's entry, one bool for each projection; ValueError for another value."""
    flags = entry[name]
    if not isinstance(flags, list) or len(flags) != len(PROJECTIONS) or not all(isinstance(f, bool) for f in flags):
        raise ValueError(f"{name}: expected two of true or false, got {flags!r}")
    return flags


def _split_name(name: str) -> tuple[str, str]:
    projection = next(each for each in PROJECTIONS if name.startswith(each))
    return projection, name.removeprefix(f"{projection}_")
