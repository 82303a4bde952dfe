"""Where the tensors of a GGUF file belong in a transformers model, and how their values or rows differ there.

llama.cpp names tensors by their part of a layer (``blk.3.attn_q.weight``), the same in most architectures, and its
converter changes some: it puts the two halves of a rotated head next to each other, adds one to norms, and so on.
`ARCHITECTURES` has the names of each architecture and what was changed. Source: llama.cpp's
``convert_hf_to_gguf.py`` and ``gguf-py``'s ``constants.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from .gguf_file import GgufFile

Rows = Callable[[GgufFile, int], torch.Tensor]
"""Makes the order in which the model has the `count` rows of a tensor: row i of the model is ``order[i]`` of it."""


@dataclass(frozen=True)
class Values:
    """How a float tensor of the model is made of the file's (`read`), and the file's of the model's (`write`)."""

    read: Callable[[torch.Tensor], torch.Tensor]
    write: Callable[[torch.Tensor], torch.Tensor]


_BLOCK = re.compile(r"^(?P<stack>(?:enc\.|dec\.)?)blk\.(?P<number>\d+)\.(?P<rest>.+)$")

_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")

IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "attn_rot_embd.weight")
"""Ends of the names of tensors that are no weights; some tell the configuration."""


@dataclass(frozen=True)
class Architecture:
    """The names of one architecture.

    - `outer` maps the parts outside layers, `inner` those in the layer of `layers`, which has ``{}`` for its number.
      ``*`` stands for the number of an expert, whose weights the file stacks, and ``|`` is between names of parts that
      it has one below the other.
    - `rows` are orders of rows, and of biases, by part, and `columns` of input features; `values` change floats, by
      part or part and key.
    - `floats` are parts that are no linear layers or embeddings in the model, and so are never quantized there.
    - `transposed` parts have float weights ``[K, N]`` in the model.
    """

    outer: Mapping[str, str]
    inner: Mapping[str, str]
    layers: str = "model.layers.{}."
    rows: Mapping[str, Rows] = field(default_factory=dict)
    columns: Mapping[str, Rows] = field(default_factory=dict)
    values: Mapping[str, Values] = field(default_factory=dict)
    floats: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs: `module` (with ``*`` for the expert) and `key`, and what is done to it before."""

    module: str
    key: str
    rows: Rows | None
    columns: Rows | None
    values: Values | None
    quantizable: bool


def architecture_of(file: GgufFile) -> Architecture | None:
    """The architecture of `file`, None if it is not read."""
    name = file.architecture
    if name == "falcon" and "blk.0.attn_norm_2.weight" in file.tensors:
        return _FALCON_WITH_TWO_NORMS
    return ARCHITECTURES.get(name)


def layer_of(name: str) -> int | None:
    """The number of the layer that the file's tensor `name` is in, if any."""
    found = _BLOCK.match(name)
    return int(found["number"]) if found else None


def part_of(name: str) -> str:
    """The part of a layer, or of the model, that the file's tensor `name` is of, without the key."""
    found = _BLOCK.match(name)
    return (found["rest"] if found else name).rpartition(".")[0]


def place_of(architecture: Architecture, name: str) -> Place | None:
    """The place of the file's tensor `name`; None if the architecture has none."""
    found = _BLOCK.match(name)
    part = (found["stack"] + found["rest"]) if found else name
    parts = architecture.inner if found else architecture.outer
    stem, _, key = part.rpartition(".")
    if part in parts:  # a parameter of its own, without a module
        stem, (module, key) = part, parts[part].rsplit(".", 1) if "." in parts[part] else ("", parts[part])
    elif stem in parts and key in ("weight", "bias"):
        module = parts[stem]
    else:
        return None
    if found:
        module = f"{architecture.layers}{module}".format(int(found["number"])).removesuffix(".")
    changed = architecture.values.get(part, architecture.values.get(stem))
    return Place(
        module,
        key,
        architecture.rows.get(stem),
        architecture.columns.get(stem) if key == "weight" else None,
        _TRANSPOSED if key == "weight" and stem in architecture.transposed else changed,
        key == "weight" and stem not in architecture.floats,
    )


def name_in_file(architecture: Architecture, module: str, key: str) -> tuple[str, int | None] | None:
    """The file's name of the parameter `key` of `module`, as `place_of` places it, and the number of the expert.

    The number is None for what is no part of a stack of experts. The result is None if there is no such name.
    """
    start, _, end = architecture.layers.partition("{}")
    whole = f"{module}.{key}"
    found = re.match(rf"{re.escape(start)}(\d+){re.escape(end)}(.+)$", whole)
    own, parts = (found[2], architecture.inner) if found else (whole, architecture.outer)
    expert = _EXPERT.search(own)
    own = _EXPERT.sub("*", own)
    block = f"blk.{found[1]}." if found else ""
    for part, owner in parts.items():
        if own in (owner, f"{owner}.{key}"):
            name = f"{block}{part}" + ("" if own == owner else f".{key}")
            return name, int(expert[0]) if expert else None
    return None


def _halves_of_heads(key: str) -> Rows:
    """The order of rows of rotated heads, of which there are `key`: a head's pairs of rows become its halves."""

    def order(file: GgufFile, count: int) -> torch.Tensor:
        heads = file.of_model(key, int, file.of_model("attention.head_count"))
        if heads <= 0 or count % (2 * heads):
            raise ValueError(f"{file.path}: expected pairs of rows in {heads} heads ({key}), got {count} rows")
        return torch.arange(count).view(heads, -1, 2).transpose(1, 2).flatten()

    return order


def _halves_of_sized_heads(file: GgufFile, count: int) -> torch.Tensor:
    """The order of rows of rotated heads of one size, of which layers have other numbers (Deci)."""
    size = file.head_size()
    if size <= 0 or size % 2 or count % size:
        raise ValueError(f"{file.path}: attention.key_length: expected a divisor of {count} rows, got {size}")
    return torch.arange(count).view(-1, size // 2, 2).transpose(1, 2).flatten()


def _together_by_heads(file: GgufFile, count: int) -> torch.Tensor:
    """The order of rows of queries, keys and values that belong together for each head of keys (Bloom, Falcon)."""
    heads = file.of_model("attention.head_count")
    groups = file.of_model("attention.head_count_kv", int, heads)
    if groups <= 0 or heads % groups or count % (heads + 2 * groups):
        raise ValueError(f"{file.path}: {count} rows are no queries, keys and values of {heads} and {groups} heads")
    size = count // (heads + 2 * groups)
    parts = torch.arange(count).split([heads * size, groups * size, groups * size])
    return torch.cat([part.view(groups, -1) for part in parts], dim=1).flatten()


def _grouped_heads(part: str) -> Rows:
    """The order of rows of value heads, which come together by their key heads in the model (Qwen 3.5).

    The file has the first value head of all key heads, then the second. `part` is "heads" for one row a head, "values"
    for rows of heads, "all" for those behind rows of queries and keys.
    """

    def order(file: GgufFile, count: int) -> torch.Tensor:
        keys, values = file.of_model("ssm.group_count"), file.of_model("ssm.time_step_rank")
        inner, state = file.of_model("ssm.inner_size"), file.of_model("ssm.state_size")
        first = 2 * keys * state if part == "all" else 0
        size = 1 if part == "heads" else inner // max(values, 1)
        if min(keys, values, state) <= 0 or values % keys or count != first + values * size:
            raise ValueError(f"{file.path}: {count} rows are no {part} of {keys} key and {values} value heads")
        tiled = torch.arange(values * size).view(values // keys, keys, size).transpose(0, 1).flatten()
        return torch.cat((torch.arange(first), first + tiled))

    return order


def _transpose(values: torch.Tensor) -> torch.Tensor:
    return values.t().contiguous()


_ONE_MORE = Values(lambda values: values.float() - 1, lambda values: values.float() + 1)
_NEGATIVE_EXP = Values(lambda values: torch.log(-values.float()), lambda values: -torch.exp(values.float()))
_SECOND_AXIS = Values(lambda values: values if values.dim() == 3 else values[:, None], lambda values: values.squeeze(1))
_ROW = Values(lambda values: values.reshape(1, -1), torch.Tensor.flatten)
_TRANSPOSED = Values(_transpose, _transpose)


_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_NORMED_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_EXPERTS = {f"ffn_{part}_exps": f"mlp.experts.*.{part}_proj" for part in ("gate", "up", "down")}
_EXPERTS |= {"ffn_gate_up_exps": "mlp.experts.*.gate_proj|up_proj"}
_MIXTRAL = {
    f"ffn_{part}_exps": f"block_sparse_moe.experts.*.{key}"
    for part, key in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
}
_MIXTRAL |= {"ffn_gate_inp": "block_sparse_moe.gate", "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias"}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
}
_ROUTER = {"ffn_gate_inp": "mlp.gate"}
_ROUTED = frozenset({"ffn_gate_inp", "ffn_gate_inp_shexp"})
_ROTATED = {
    "attn_q": _halves_of_heads("attention.head_count"),
    "attn_k": _halves_of_heads("attention.head_count_kv"),
}
_GEMMA = _ATTENTION | _NORMED_HEADS | _MLP | {"post_ffw_norm": "post_feedforward_layernorm"}
_GEMMA_NORMED_TWICE = _GEMMA | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
}
_GEMMA4 = _GEMMA_NORMED_TWICE | {
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    **{f"ffn_{part}_exps": f"experts.*.{part}_proj" for part in ("gate", "up", "down")},
    "ffn_gate_up_exps": "experts.*.gate_proj|up_proj",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
_GEMMA_NORMS = dict.fromkeys(
    ("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"),
    _ONE_MORE,
)


def _gemma(inner: Mapping[str, str]) -> Architecture:
    return Architecture(_OUTER, inner, values=_GEMMA_NORMS)


def _gpt(outer: Mapping[str, str], inner: Mapping[str, str], **changes: object) -> Architecture:
    return Architecture(outer, inner, "transformer.h.{}.", **changes)  # type: ignore[arg-type]


def _t5() -> Architecture:
    outer = {
        "token_embd": "shared",
        "output": "lm_head",
        "enc.output_norm": "encoder.final_layer_norm",
        "dec.output_norm": "decoder.final_layer_norm",
    }
    inner: dict[str, str] = {}
    for stack, name, last in (("enc", "encoder", 1), ("dec", "decoder", 2)):
        attentions = {"attn": (0, "SelfAttention")} | ({"cross_attn": (1, "EncDecAttention")} if last == 2 else {})
        for part, (layer, attention) in attentions.items():
            start = f"{name}.block.{{}}.layer.{layer}."
            inner |= {f"{stack}.{part}_{key}": f"{start}{attention}.{key}" for key in "qkvo"}
            inner |= {f"{stack}.{part}_norm": f"{start}layer_norm"}
            inner |= {f"{stack}.{part}_rel_b": f"{start}{attention}.relative_attention_bias"}
        start = f"{name}.block.{{}}.layer.{last}."
        mlp = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
        inner |= {f"{stack}.ffn_{part}": f"{start}DenseReluDense.{key}" for part, key in mlp.items()}
        inner |= {f"{stack}.ffn_norm": f"{start}layer_norm"}
    floats = frozenset({"enc.attn_rel_b", "dec.attn_rel_b", "dec.cross_attn_rel_b"})
    return Architecture(outer, inner, "", floats=floats)


_BIG_BLOOM = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_TRANSFORMER = {"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head"}

_QWEN35 = (
    _ATTENTION
    | _NORMED_HEADS
    | {
        "post_attention_norm": "post_attention_layernorm",
        "attn_qkv": "linear_attn.in_proj_qkv",
        "attn_gate": "linear_attn.in_proj_z",
        "ssm_alpha": "linear_attn.in_proj_a",
        "ssm_beta": "linear_attn.in_proj_b",
        "ssm_conv1d": "linear_attn.conv1d",
        "ssm_norm": "linear_attn.norm",
        "ssm_out": "linear_attn.out_proj",
        "ssm_a": "linear_attn.A_log",
        "ssm_dt.bias": "linear_attn.dt_bias",
    }
)
_QWEN35_CHANGES: dict[str, Any] = {
    "rows": {
        **dict.fromkeys(("attn_qkv", "ssm_conv1d"), _grouped_heads("all")),
        **dict.fromkeys(("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt.bias"), _grouped_heads("heads")),
        "attn_gate": _grouped_heads("values"),
    },
    "columns": {"ssm_out": _grouped_heads("values")},
    "values": {
        **_GEMMA_NORMS,
        "ssm_a": _NEGATIVE_EXP,
        "ssm_conv1d.weight": _SECOND_AXIS,
        "ffn_gate_inp_shexp.weight": _ROW,
    },
    "floats": _ROUTED | {"ssm_conv1d"},
}

_FALCON_WITH_TWO_NORMS = _gpt(
    _TRANSFORMER,
    _BIG_BLOOM | {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"},
    rows={"attn_qkv": _together_by_heads},
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "bloom": _gpt(
            _TRANSFORMER | {"token_embd_norm": "transformer.word_embeddings_layernorm"},
            _BIG_BLOOM,
            rows={"attn_qkv": _together_by_heads},
        ),
        "deci": Architecture(
            _OUTER, _ATTENTION | _MLP, rows=dict.fromkeys(("attn_q", "attn_k"), _halves_of_sized_heads)
        ),
        "falcon": _gpt(_TRANSFORMER, _BIG_BLOOM, rows={"attn_qkv": _together_by_heads}),
        "gemma": _gemma(_GEMMA),
        "gemma2": _gemma(_GEMMA_NORMED_TWICE),
        "gemma3": _gemma(_GEMMA_NORMED_TWICE),
        "gemma4": Architecture(
            _OUTER
            | {
                "per_layer_token_embd": "model.embed_tokens_per_layer",
                "per_layer_model_proj": "model.per_layer_model_projection",
                "per_layer_proj_norm": "model.per_layer_projection_norm",
            },
            _GEMMA4,
            floats=_ROUTED,
        ),
        "gpt2": _gpt(
            {
                "token_embd": "transformer.wte",
                "position_embd": "transformer.wpe",
                "output_norm": "transformer.ln_f",
                "output": "lm_head",
            },
            {
                "attn_norm": "ln_1",
                "attn_qkv": "attn.c_attn",
                "attn_output": "attn.c_proj",
                "ffn_norm": "ln_2",
                "ffn_up": "mlp.c_fc",
                "ffn_down": "mlp.c_proj",
            },
            floats=frozenset({"position_embd"}),
            transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
        ),
        "gpt-oss": Architecture(
            _OUTER,
            {"post_attention_norm": "post_attention_layernorm"}  # the name of those that is written
            | _ATTENTION
            | _EXPERTS
            | {
                "ffn_gate_inp": "mlp.router",
                "attn_sinks.weight": "self_attn.sinks",
            },
            floats=_ROUTED,
        ),
        "lfm2": Architecture(
            _OUTER | {"token_embd_norm": "model.embedding_norm", "output_norm": "model.embedding_norm"},
            _ATTENTION
            | {
                "attn_norm": "operator_norm",
                "ffn_norm": "ffn_norm",
                "attn_output": "self_attn.out_proj",
                "attn_q_norm": "self_attn.q_layernorm",
                "attn_k_norm": "self_attn.k_layernorm",
                "ffn_gate": "feed_forward.w1",
                "ffn_up": "feed_forward.w3",
                "ffn_down": "feed_forward.w2",
                "shortconv.conv": "conv.conv",
                "shortconv.in_proj": "conv.in_proj",
                "shortconv.out_proj": "conv.out_proj",
            },
            values={"shortconv.conv.weight": _SECOND_AXIS},
            floats=frozenset({"shortconv.conv"}),
        ),
        "llama": Architecture(_OUTER, _ATTENTION | _MLP | _MIXTRAL, rows=_ROTATED, floats=_ROUTED),
        "mamba": Architecture(
            {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"},
            {
                "attn_norm": "norm",
                "ssm_in": "mixer.in_proj",
                "ssm_conv1d": "mixer.conv1d",
                "ssm_x": "mixer.x_proj",
                "ssm_dt": "mixer.dt_proj",
                "ssm_out": "mixer.out_proj",
                "ssm_a": "mixer.A_log",
                "ssm_d": "mixer.D",
            },
            "backbone.layers.{}.",
            values={"ssm_conv1d.weight": _SECOND_AXIS, "ssm_a": _NEGATIVE_EXP},
            floats=frozenset({"ssm_conv1d"}),
        ),
        "minimax-m2": Architecture(
            _OUTER,
            _ATTENTION | _NORMED_HEADS | _MIXTRAL,
            floats=_ROUTED,
        ),
        "nemotron": Architecture(
            _OUTER,
            _ATTENTION | _MLP,
            values={f"{norm}.weight": _ONE_MORE for norm in ("output_norm", "attn_norm", "ffn_norm")},
        ),
        "phi3": Architecture(
            _OUTER, _ATTENTION | _MLP | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
        ),
        "qwen2": Architecture(_OUTER, _ATTENTION | _MLP),
        "qwen2moe": Architecture(
            _OUTER,
            _ATTENTION | _EXPERTS | _SHARED | _ROUTER,
            values={"ffn_gate_inp_shexp.weight": _ROW},
            floats=_ROUTED,
        ),
        "qwen3": Architecture(_OUTER, _ATTENTION | _NORMED_HEADS | _MLP),
        "qwen3moe": Architecture(_OUTER, _ATTENTION | _NORMED_HEADS | _EXPERTS | _ROUTER, floats=_ROUTED),
        "qwen35": Architecture(_OUTER, _QWEN35 | _MLP, **_QWEN35_CHANGES),
        "qwen35moe": Architecture(_OUTER, _QWEN35 | _EXPERTS | _SHARED | _ROUTER, **_QWEN35_CHANGES),
        "stablelm": Architecture(_OUTER, _ATTENTION | _MLP),
        "starcoder2": Architecture(_OUTER, _ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
        "t5": _t5(),
        "t5encoder": _t5(),
    }
)
"""The architectures that are read, by ``general.architecture``."""
