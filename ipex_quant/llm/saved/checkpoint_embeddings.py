"""Embeddings that a checkpoint holds quantized (GGUF's do), and output layers that share their weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

from torch import nn

from ...checkpoints import Checkpoint, WeightsInMemory
from ...nn import QuantizedEmbedding, WeightOnlyQuantizedLinear
from ...nn.embeddings import embedding_obstacle, is_embedding, row_factor
from ...numerics.scheme import QConfigWoq


@dataclass
class SharedWeight:
    """The quantized weight of the embedding `name`, which is read once, for it and its output layer.

    Layers are made in several threads at a time, so that either may come first.
    """

    checkpoint: Checkpoint | WeightsInMemory
    name: str
    qconfig: QConfigWoq | None = None
    _table: WeightOnlyQuantizedLinear | None = field(default=None, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)

    def embedding(self, module: nn.Module, owns: bool) -> QuantizedEmbedding:
        """The quantized successor of the embedding `module`; a state dict has the weight where it `owns` it."""
        if not isinstance(module, nn.Embedding):
            raise TypeError(f"{self.name}: expected an embedding, got a {type(module).__name__}")
        with self._lock:
            table = self._read(module)
            new = QuantizedEmbedding(table, module.padding_idx, row_factor(module))
            if not owns:
                new.share(table)
            return new.to(module.weight.dtype)

    def linear(self, module: nn.Module) -> WeightOnlyQuantizedLinear:
        """The quantized successor of the output layer `module`."""
        with self._lock:
            return self._read(module).to(module.weight.dtype)

    def _read(self, module: nn.Module) -> WeightOnlyQuantizedLinear:
        if self._table is None:
            rows, columns = module.weight.shape
            found = self.checkpoint.quantized_weight(self.name, columns, rows)
            if found is None:
                raise ValueError(f"{self.name}: the checkpoint has no quantized weight for it")
            modes = () if self.qconfig is None else (self.qconfig.lowp_mode, self.qconfig.act_quant_mode)
            self._table = WeightOnlyQuantizedLinear.from_quantized_weight(found[0], None, *modes)
        return self._table


def embeddings_from_checkpoint(
    model: nn.Module,
    checkpoint: Checkpoint | WeightsInMemory,
    chosen: Mapping[str, QConfigWoq],
    stored: Collection[str],
) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Functions that make the successors of the embeddings in `stored`, and of the output layers tied to them.

    An output layer without a weight of its own in the checkpoint that `chosen` has becomes quantized with its
    embedding, and shares its packed weight. Raises ValueError for an embedding that cannot be quantized.
    """
    followers = defaultdict(list)
    for target, source in _ties(model).items():
        if target not in stored and (target in chosen or is_embedding(model.get_submodule(target))):
            followers[source].append(target)
    replacements: dict[str, Callable[[nn.Module], nn.Module]] = {}
    for name, module in model.named_modules():
        if not is_embedding(module) or name not in stored:
            continue
        heads = [each for each in followers[name] if each in chosen]
        shared = SharedWeight(checkpoint, name, chosen[heads[0]] if heads else None)
        others = [other for other in followers[name] if other not in heads]
        for each in (*heads, name, *others):
            embedding = model.get_submodule(each)
            reason = embedding_obstacle(embedding, read_weights=False) if is_embedding(embedding) else None
            if reason:
                raise ValueError(f"low_precision_checkpoint: {each} is quantized in it, and cannot be here: {reason}")
            as_embedding = partial(shared.embedding, owns=each == name and not heads)  # which an output layer would own
            replacements[each] = shared.linear if each in heads else as_embedding
    return replacements


def _ties(model: nn.Module) -> dict[str, str]:
    """Names of modules whose weight is that of another, ``{target: source}``."""
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    ends = ".weight"
    return {
        target.removesuffix(ends): source.removesuffix(ends)
        for target, source in ties.items()
        if target.endswith(ends) and source.endswith(ends)
    }
