"""`ExportParts`: the quantized layers and the other tensors of a model, as checkpoints of other formats have them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ...checkpoints import Int8Input
from ...checkpoints.writers import Layer, LayerError
from ...conversion.description import main_dtype
from ...nn import Int8Linear, QuantizedEmbedding, QuantizedModule, WeightOnlyQuantizedExperts, WeightOnlyQuantizedLinear
from ...nn.embeddings import is_embedding
from ...nn.input_factor import scaled_layers
from ...nn.linears import PackedLinear, is_linear
from ...nn.stacked_experts import PROJECTIONS
from ...numerics.quantized_stack import QuantizedStack
from ...numerics.quantized_weight import QuantizedWeight
from .checkpoint_experts import PARTS
from .checkpoint_names import file_names, in_file_names

Named = tuple[Layer, torch.Tensor | None]
"""A layer and its bias."""


@dataclass(frozen=True)
class ExportParts:
    """The parts of a model under their names in files.

    `layers` are the quantized linear layers with their biases, `embeddings` the quantized embeddings of formats that
    hold these; `others` makes all other tensors; `in_float` are the names of the linear layers in float, `head` that of
    the output layer, if it is one. `untied` says that the output layer is quantized, and was tied to an embedding
    before.
    """

    layers: Sequence[Named]
    embeddings: Sequence[Layer]
    others: Mapping[str, Callable[[], torch.Tensor]]
    in_float: Sequence[str]
    head: str | None
    untied: bool

    @classmethod
    def of(cls, model: PreTrainedModel, quantized_embeddings: bool = False) -> ExportParts:
        """The parts of `model`; ValueError if no linear layer is quantized, LayerError if anything else is.

        Embeddings are in float, with a warning, unless the format holds `quantized_embeddings`: then a table that an
        output layer shares is theirs alone.
        """
        quantized = {name: each for name, each in model.named_modules() if isinstance(each, QuantizedModule)}
        embeddings = {name: each for name, each in quantized.items() if isinstance(each, QuantizedEmbedding)}
        if len(embeddings) == len(quantized):
            raise ValueError("model: expected quantized linear layers, found none; quantize it with llm.optimize first")
        _check(model, quantized)
        dtype, stacks = main_dtype(model), _Stacks()
        tables = [each.table for each in embeddings.values() if each.tied and quantized_embeddings]
        shared = {id(table) for table in tables if table.float_bias is None}
        layers = [
            pair
            for name, module in quantized.items()
            if id(module) not in shared
            for pair in _layers_of(name, module, stacks, dtype)
        ]
        in_float = [name for name, module in model.named_modules() if _is_float_linear(module)]
        found = file_names(model, _shapes(model))
        layers = [(dataclasses.replace(layer, name=found.get(layer.name, layer.name)), bias) for layer, bias in layers]
        head = _head(model)
        others: dict[str, Callable[[], torch.Tensor]] = {
            name: partial(torch.Tensor.detach, tensor) for name, tensor in _float_tensors(model).items()
        }
        own = [Layer(name, module.quantized_weight) for name, module in embeddings.items() if quantized_embeddings]
        if embeddings and not quantized_embeddings:
            for name, module in embeddings.items():
                others[f"{name}.weight"] = partial(module.dequantized_weight, dtype)
            warnings.warn(
                f"embeddings are in float in this format: {', '.join(embeddings)} will be read as {dtype}, with the "
                "values that lookups return now",
                stacklevel=4,
            )
        configs = (model.config, model.config.get_text_config(decoder=True))
        untied = head in quantized and any(getattr(config, "tie_word_embeddings", False) for config in configs)
        names = [found.get(name, name) for name in in_float]
        return cls(layers, own, others, names, None if head is None else found.get(head, head), untied)


def _check(model: PreTrainedModel, quantized: Mapping[str, QuantizedModule]) -> None:
    held = (WeightOnlyQuantizedLinear, Int8Linear, WeightOnlyQuantizedExperts, QuantizedEmbedding)
    for name, module in quantized.items():
        if not isinstance(module, held):
            raise LayerError(
                name, f"no other format holds a {type(module).__name__}; leave it in float, or use llm.save"
            )
    for name in scaled_layers(model):
        raise LayerError(name, "it multiplies its input by factors, which no other format holds; use llm.save")


class _Stacks:
    """Unpacks stacks of experts, and keeps the latest, whose weights are asked for one after the other."""

    def __init__(self) -> None:
        self._latest: tuple[WeightOnlyQuantizedExperts, str, QuantizedStack] | None = None

    def rows(self, module: WeightOnlyQuantizedExperts, projection: str, expert: int, own: slice) -> QuantizedWeight:
        """Some rows of the weight of one expert."""
        if self._latest is None or self._latest[:2] != (module, projection):
            self._latest = None  # before the next is made
            self._latest = (module, projection, module.quantized_stack(projection))
        return self._latest[2][expert].select(own)


def _layers_of(name: str, module: QuantizedModule, stacks: _Stacks, dtype: torch.dtype) -> Iterator[Named]:
    """The quantized linear layers of `module`, with biases in `dtype` where it has their values."""
    if isinstance(module, Int8Linear):
        yield Layer(name, module.quantized_weight, Int8Input(module.activation)), _narrowed(module.float_bias, dtype)
    elif isinstance(module, WeightOnlyQuantizedLinear):
        yield Layer(name, module.quantized_weight), _narrowed(module.float_bias, dtype)
    elif isinstance(module, WeightOnlyQuantizedExperts):
        inner = module.gate.blocks * module.intermediate_dim
        for projection, rows in zip(PROJECTIONS, (inner, module.hidden_dim), strict=True):
            parts = PARTS[projection if projection == "down" or module.gate.gated else "up"]
            bias, size = module.projection_bias(projection), rows // len(parts)
            for expert in range(module.num_experts):
                for index, part in enumerate(parts):
                    own = slice(index * size, (index + 1) * size)
                    read = partial(stacks.rows, module, projection, expert, own)
                    mine = None if bias is None else bias[expert, own]
                    yield Layer(f"{name}.{expert}.{part}_proj", read), _narrowed(mine, dtype)


def _narrowed(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A copy of `bias`, float32, in `dtype` if that has its values."""
    narrow = None if bias is None else bias.to(dtype, copy=True)
    return narrow if bias is None or torch.equal(narrow.float(), bias) else bias.clone()


def _float_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of modules in float under their names in files, each tied one once."""
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            module._save_to_state_dict(tensors, f"{name}." if name else "", keep_vars=False)
    tied = {each for each in model.all_tied_weights_keys if each in tensors}
    ignored = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in tensors.items() if name not in tied and name not in ignored}
    return in_file_names(model, kept)


def _is_float_linear(module: nn.Module) -> bool:
    """Whether tools may take `module` for a linear layer: routers of experts are, in some."""
    weight = module._parameters.get("weight")
    is_matrix = weight is not None and weight.dim() == 2 and not is_embedding(module)
    return is_linear(module) or (is_matrix and not isinstance(module, QuantizedModule))


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of the float weights of linear layers and of stacked experts, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, WeightOnlyQuantizedExperts):
            width, hidden = module.intermediate_dim, module.hidden_dim
            up = "gate_up_proj" if module.gate.gated else "up_proj"
            shapes[f"{name}.{up}"] = (module.num_experts, module.gate.blocks * width, hidden)
            shapes[f"{name}.down_proj"] = (module.num_experts, hidden, width)
        elif isinstance(module, PackedLinear):
            shapes[f"{name}.weight"] = tuple(module.weight.shape)
        elif _is_float_linear(module):
            shapes[f"{name}.weight"] = tuple(module.get_parameter("weight").shape)
    return shapes


def _head(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head and head is not None), None)
