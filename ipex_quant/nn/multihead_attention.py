"""`SplitMultiheadAttention`: torch's multi-head attention with its projections as separate linear layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .linears import PackedLinear

READ_BY_ATTENTION = "its parent nn.MultiheadAttention reads the weight without calling the module"

_INPUTS = ("q_proj", "k_proj", "v_proj")
_PROJECTIONS = (*_INPUTS, "out_proj")


class SplitMultiheadAttention(nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` that calls linear layers `q_proj`, `k_proj`, `v_proj` and `out_proj`.

    It is called like torch's module, but takes no nested tensors. Attributes of torch's for weights and biases return
    those of the layers. `_qkv_same_embed_dim` is False, which keeps ``nn.TransformerEncoderLayer`` from passing weights
    to an op. While no layer is quantized, the state dict has the names and shapes of torch's module; tensors with these
    names load into float layers.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        _take_over(self, attention)
        biases = {"bias_k": attention.bias_k, "bias_v": attention.bias_v}
        self._parameters = {name: bias for name, bias in biases.items() if bias is not None}
        self._modules = dict(projections(attention))
        self._qkv_same_embed_dim = False

    @property
    def is_float(self) -> bool:
        """Whether all projections are float layers."""
        return all(type(projection) is nn.Linear for projection in self._modules.values())

    @property
    def in_proj_weight(self) -> torch.Tensor | None:
        """The weights of `q_proj`, `k_proj` and `v_proj`, concatenated; None if their input widths differ."""
        return _cat([layer.weight for layer in self._inputs()]) if self._same_widths else None

    @property
    def in_proj_bias(self) -> torch.Tensor | None:
        """The biases of `q_proj`, `k_proj` and `v_proj`, concatenated; None if there are none."""
        biases = [layer.bias for layer in self._inputs()]
        given = next((bias for bias in biases if bias is not None), None)
        if given is None:
            return None
        return _cat([given.new_zeros(self.embed_dim) if bias is None else bias for bias in biases])

    @property
    def q_proj_weight(self) -> torch.Tensor:
        """The weight of `q_proj`."""
        return self.q_proj.weight

    @property
    def k_proj_weight(self) -> torch.Tensor:
        """The weight of `k_proj`."""
        return self.k_proj.weight

    @property
    def v_proj_weight(self) -> torch.Tensor:
        """The weight of `v_proj`."""
        return self.v_proj.weight

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal: it is a hint about attn_mask, expected one, got None")
        batched = _check_inputs(query, key, value)
        # The layers get the tensors themselves, not views, so that a share group recognizes a shared input.
        projected = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (self._batch_first(x, batched) for x in projected)
        sizes, added = (q.shape[0], q.shape[1], k.shape[1]), 0
        if self.bias_k is not None:
            k, v = (
                torch.cat([x, bias.to(x.dtype).expand(x.shape[0], 1, -1)], 1)
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
            added += 1
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            added += 1
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, sizes, q.dtype)
        if mask is not None and added:
            mask = F.pad(mask, (0, added))
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            attended = weights @ v.to(weights.dtype)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), weights
        return output if self.batch_first else output.transpose(0, 1), weights

    def joined(self) -> nn.MultiheadAttention:
        """Return torch's module with the weights of the layers, which must be float."""
        made = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        _take_over(made, self)
        made._qkv_same_embed_dim = self._same_widths
        parameters: dict[str, Any] = dict.fromkeys(("in_proj_weight", *(f"{name}_weight" for name in _INPUTS)))
        if made._qkv_same_embed_dim:
            parameters["in_proj_weight"] = self.in_proj_weight
        else:
            parameters |= {f"{name}_weight": getattr(self, f"{name}_weight") for name in _INPUTS}
        trains = self.q_proj.weight.requires_grad
        parameters |= {"in_proj_bias": self.in_proj_bias}
        made._parameters = {
            name: None if value is None else nn.Parameter(value.detach(), trains) for name, value in parameters.items()
        } | self._parameters
        out = self.out_proj
        layer = nn.modules.linear.NonDynamicallyQuantizableLinear(
            self.embed_dim, self.embed_dim, out.bias is not None, device="meta"
        ).train(out.training)
        layer._parameters = out._parameters
        made._modules = {"out_proj": layer}
        return made

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict, with the names of torch's module while all projections are float."""
        tensors = super().state_dict(*args, **kwargs)
        if self.is_float:
            prefix = kwargs.get("prefix", "")
            for kind in ("weight", "bias"):
                parts = [tensors.pop(f"{prefix}{name}.{kind}", None) for name in _INPUTS]
                if kind == "weight" and not self._same_widths:
                    tensors |= {f"{prefix}{name}_weight": part for name, part in zip(_INPUTS, parts, strict=True)}
                elif parts[0] is not None:
                    tensors[f"{prefix}in_proj_{kind}"] = torch.cat(parts)
        return tensors

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # `state_dict` may be changed: torch copies it for each module.
        for name in _INPUTS:
            if f"{prefix}{name}_weight" in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(f"{prefix}{name}_weight")
        for kind in ("weight", "bias"):
            joined = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            if joined is not None:
                parts = zip(_INPUTS, joined.chunk(3), strict=True)
                state_dict |= {f"{prefix}{name}.{kind}": part for name, part in parts}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _reset_parameters(self) -> None:
        """Do nothing, since the layers hold the weights; transformers calls this while it loads a model."""

    @property
    def _same_widths(self) -> bool:
        return self.kdim == self.vdim == self.embed_dim

    def _inputs(self) -> list[nn.Module]:
        return [self._modules[name] for name in _INPUTS]

    def _batch_first(self, x: torch.Tensor, batched: bool) -> torch.Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(
        self,
        attn_mask: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
        sizes: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> torch.Tensor | None:
        """Additive mask of the scores of all heads, or None; `sizes` is batch, query length and key length.

        Raises RuntimeError for masks of other shapes and dtypes.
        """
        batch, length, keys = sizes
        mask = None
        if attn_mask is not None:
            _check_shape("attn_mask", attn_mask, (length, keys), (batch * self.num_heads, length, keys))
            mask = _additive("attn_mask", attn_mask, dtype)
            mask = mask if mask.dim() == 2 else mask.view(batch, self.num_heads, length, keys)
        if key_padding_mask is not None:
            _check_shape("key_padding_mask", key_padding_mask, (batch, keys), *[(keys,)] * (batch == 1))
            padding = _additive("key_padding_mask", key_padding_mask, dtype).view(batch, 1, 1, keys)
            mask = padding if mask is None else mask + padding
        return mask


def projections(attention: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """Linear layers by name that share the memory of the weights and biases of a float `attention`."""
    if attention._qkv_same_embed_dim:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = [getattr(attention, f"{name}_weight") for name in _INPUTS]
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    out = attention.out_proj
    pairs = zip((*weights, out.weight), (*biases, out.bias), strict=True)
    layers = [_linear(weight, bias).train(attention.training) for weight, bias in pairs]
    return dict(zip(_PROJECTIONS, layers, strict=True))


def is_split_attention(module: nn.Module) -> bool:
    """Whether `module` is a `SplitMultiheadAttention`."""
    return isinstance(module, SplitMultiheadAttention)


def is_whole(module: nn.Module) -> bool:
    """Whether `module` is an ``nn.MultiheadAttention``, as torch makes it, that can be split."""
    return (
        type(module) is nn.MultiheadAttention
        and isinstance(module.out_proj, nn.Linear)
        and not isinstance(module.out_proj, PackedLinear)
        and module.out_proj._parameters.get("weight") is not None
    )


def attention_obstacle(module: nn.Module) -> str | None:
    """Reason why `module` is an ``nn.MultiheadAttention`` that cannot be split, or None."""
    if not isinstance(module, nn.MultiheadAttention) or is_split_attention(module) or is_whole(module):
        return None
    if type(module) is nn.MultiheadAttention:
        return "its out_proj is no nn.Linear with a weight of its own"
    return f"{type(module).__name__} is a class of its own, which may read the weights of nn.MultiheadAttention"


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules by name, with the layers that each ``nn.MultiheadAttention`` would be split into."""
    whole = {name: module for name, module in model.named_modules() if is_whole(module)}
    for name, module in model.named_modules():
        if name.rpartition(".")[0] in whole and module is whole[name.rpartition(".")[0]].out_proj:
            continue
        yield name, module
        if name in whole:
            prefix = f"{name}." if name else ""
            yield from ((prefix + each, layer) for each, layer in projections(module).items())


def split_attentions(model: nn.Module, layers: Collection[str]) -> nn.Module:
    """Split each ``nn.MultiheadAttention`` that would have one of the `layers`; returns `model` or its replacement."""
    parents = {name.rpartition(".")[0] for name in layers if name.rpartition(".")[2] in _PROJECTIONS}
    return _replaced(model, {name: module for name, module in model.named_modules() if name in parents}, is_whole)


def join_attentions(model: nn.Module) -> nn.Module:
    """Undo `split_attentions` where no projection is quantized; returns `model` or its replacement."""
    return _replaced(model, dict(model.named_modules()), lambda each: is_split_attention(each) and each.is_float)


def _replaced(model: nn.Module, modules: dict[str, nn.Module], chosen: Any) -> nn.Module:
    new = {
        id(module): module.joined() if is_split_attention(module) else SplitMultiheadAttention(module)
        for module in modules.values()
        if chosen(module)
    }
    if id(model) in new:
        return new[id(model)]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in new:
            model.set_submodule(name, new[id(module)])
    return model


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Copy the attributes of `old`, hooks included, to `new`, except parameters and modules."""
    vars(new).update({name: value for name, value in vars(old).items() if name not in ("_parameters", "_modules")})


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate `tensors`; on the meta device if one of them is there, as while a model is loaded."""
    on_meta = any(tensor.device.type == "meta" for tensor in tensors)
    return torch.cat([tensor.to("meta") if on_meta else tensor for tensor in tensors])


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return layer


def _check_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the inputs are batched; RuntimeError for inputs that do not fit each other."""
    tensors = query, key, value
    if any(x.is_nested for x in tensors):
        raise RuntimeError("query, key, value: expected plain tensors, got a nested one; pad it")
    dims = [x.dim() for x in tensors]
    if dims not in ([2] * 3, [3] * 3):
        raise RuntimeError(f"query, key, value: expected 3 dimensions each, or 2 without a batch, got {dims}")
    if not torch.jit.is_tracing() and key.shape[:-1] != value.shape[:-1]:
        raise RuntimeError(f"key, value: expected as many tokens each, got {list(key.shape)} and {list(value.shape)}")
    return dims == [3] * 3


def _check_shape(name: str, mask: torch.Tensor, *shapes: tuple[int, ...]) -> None:
    if not torch.jit.is_tracing() and tuple(mask.shape) not in shapes:  # while tracing, sizes are no plain numbers
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise RuntimeError(f"{name}: expected shape {expected}, got {list(mask.shape)}")


def _additive(name: str, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Mask to add to scores in `dtype`: a bool `mask` becomes minus infinity where it is True."""
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"{name}: expected bool or a float dtype, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
