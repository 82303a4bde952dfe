"""`explain`: how each module of a model is computed, or why it stayed in float."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

from torch import nn

from .. import ops
from ..conversion.description import share_groups, tied_groups
from ..conversion.prepare import FLOAT_REASONS
from ..nn import (
    Int8Conv,
    Int8Linear,
    QuantizedEmbedding,
    QuantizedModule,
    WeightOnlyQuantizedExpertLinears,
    WeightOnlyQuantizedExperts,
    WeightOnlyQuantizedLinear,
)
from ..nn.embeddings import is_embedding
from ..nn.linears import holds_experts, is_linear, weight_matrix
from ..nn.recurrent import is_recurrent
from ..numerics.scheme import WoqLowpMode
from ..ops.int8 import INT8_PER_CHANNEL
from .native import Part, parts_of
from .saved.notes import recipe_note


@dataclass(frozen=True)
class Row:
    """How one module is computed. `nbytes` counts its own tensors; `reason` says why it is in float, if it is."""

    module: str
    scheme: str
    shape: tuple[int, ...]
    compute: str
    kernel: str
    isa: str
    nbytes: int
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """How a model is computed, as `explain` prints it; ``str()`` gives the printed text.

    - `rows` has one entry for each module with a weight matrix.
    - `stack` lists the decoder layers, norms and attention modules, native and stock.
    - `recipe` names the recipe that made the model and its measured cost in quality, if a recipe did.
    """

    rows: tuple[Row, ...]
    stack: tuple[Part, ...] = ()
    recipe: str | None = None

    def __str__(self) -> str:
        header = [field.name for field in fields(Row)]
        header[header.index("nbytes")], header[header.index("reason")] = "bytes", "why float"
        cells = [header, *([_cell(value) for value in astuple(row)] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        recipe = [] if self.recipe is None else [f"recipe {self.recipe}"]
        return "\n".join([*lines, self.summary, *map(str, self.stack), *recipe])

    def __repr__(self) -> str:
        return f"<{self.summary}>"

    @property
    def summary(self) -> str:
        """One line: how many modules are quantized and in float, and their bytes."""
        packed = [row.nbytes for row in self.rows if not row.reason]
        rest = [row.nbytes for row in self.rows if row.reason]
        return f"{len(packed)} modules quantized, {sum(packed):,} bytes; {len(rest)} in float, {sum(rest):,} bytes"


_WEIGHT_ONLY = (WeightOnlyQuantizedLinear, WeightOnlyQuantizedExperts, WeightOnlyQuantizedExpertLinears)


def explain(model: nn.Module) -> Explanation:
    """Print how each module of `model` with a weight matrix is computed: scheme, shape, compute mode, kernel, bytes.

    For a module in float it gives the reason. Norms and other modules without a matrix are left out. The lines below
    the table say how many decoder layers, norms and attention modules compute natively, name those that run stock code,
    and name the recipe that made the model with its measured cost on a real one. The same data is returned.
    """
    reasons = getattr(model, FLOAT_REASONS, {})
    siblings = {name: [each for each in group if each != name] for group in share_groups(model) for name in group}
    holders = _holders(model)
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, _WEIGHT_ONLY):
            rows.append(_weight_only_row(name, module))
        elif isinstance(module, QuantizedEmbedding):
            rows.append(_embedding_row(name, module, holders.get(name)))
        elif isinstance(module, QuantizedModule):
            rows.append(_int8_row(name, module, siblings.get(name, [])))
        elif any(p.dim() > 1 for p in module.parameters(recurse=False)):
            rows.append(_float_row(name, module, reasons.get(name) or _reason(module)))
    explanation = Explanation(tuple(rows), tuple(parts_of(model)), recipe_note(model))
    print(explanation)
    return explanation


def _holders(model: nn.Module) -> dict[str, str | None]:
    """``{embedding: module that holds its packed weight}`` for embeddings that share the weight of another module."""
    holders = {}
    for group in tied_groups(model):
        tied = [name for name in group if getattr(model.get_submodule(name), "tied", False)]
        holder = next((name for name in group if name not in tied), None)
        holders |= dict.fromkeys(tied, holder)
    return holders


def _weight_only_row(name: str, module: QuantizedModule) -> Row:
    dtype = module.weight.dtype
    mode, act = module.lowp_mode, module.act_quant_mode
    compute = mode.name.lower() if mode != WoqLowpMode.NONE else str(dtype).removeprefix("torch.")
    if mode == WoqLowpMode.INT8:
        compute += f" ({act.name.lower()})"
    shape = module.weight_shape
    if module.scheme is None:
        return Row(name, module.dtype.name.lower(), shape, compute, "", "", 0, "it has no weight yet")
    kernel = ops.kernel_name(module.scheme, mode, dtype)
    if not isinstance(module, WeightOnlyQuantizedLinear):
        kernel += ", routed experts"
    return Row(name, str(module.scheme), shape, compute, kernel, ops.isa_name(), module.nbytes)


def _embedding_row(name: str, module: QuantizedEmbedding, holder: str | None) -> Row:
    dtype = str(module.weight.dtype).removeprefix("torch.")
    kernel = "lookup" if holder is None else f"lookup in the weight of {holder}"
    return Row(name, str(module.table.scheme), module.weight_shape, dtype, kernel, ops.isa_name(), module.nbytes)


def _int8_row(name: str, module: Int8Linear | Int8Conv, siblings: list[str]) -> Row:
    compute = "int8 (per token)"
    if module.activation is not None:
        smoothed = ", smoothed" if module.activation.smoothing_factor is not None else ""
        compute = f"int8 (static per-tensor{smoothed})"
    if siblings:
        compute += f", fused with {', '.join(each.rpartition('.')[2] for each in siblings)}"
    kernel = "int8 depthwise" if isinstance(module, Int8Conv) and module.is_depthwise else "int8 dot"
    return Row(name, str(INT8_PER_CHANNEL), module.weight_shape, compute, kernel, ops.isa_name(), module.nbytes)


def _float_row(name: str, module: nn.Module, reason: str) -> Row:
    parameters = list(module.parameters(recurse=False))
    largest = weight_matrix(module) if is_linear(module) else max(parameters, key=lambda p: p.numel())
    dtype = str(largest.dtype).removeprefix("torch.")
    nbytes = sum(p.numel() * p.element_size() for p in parameters)
    return Row(name, dtype, tuple(largest.shape), dtype, "torch", "", nbytes, reason)


def _reason(module: nn.Module) -> str:
    if is_linear(module) or holds_experts(module):
        return "not asked to be quantized"
    if is_recurrent(module):
        return "recurrent layers are quantized dynamically only"
    if is_embedding(module):
        return "embeddings need a rule of their own"
    return f"{type(module).__name__} is no linear layer"


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
