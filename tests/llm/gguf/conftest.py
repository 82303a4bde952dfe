"""GGUF files of tiny models, written as llama.cpp's converter would: its names, and what it does to tensors."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
HEADS = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 128}
EXPERTS = {**HEADS, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_experts": 4}
LOCAL = {**HEADS, "num_experts_per_tok": 2, "num_local_experts": 4}
WINDOWS = {**HEADS, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4}

DELTA = {
    **{"num_hidden_layers": 4, "head_dim": 32, "full_attention_interval": 4, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 6, "linear_key_head_dim": 32, "linear_value_head_dim": 16},
}

GEMMA4 = {
    **{"num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 32, "sliding_window": 4, "num_kv_shared_layers": 2},
    **{
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "final_logit_softcapping": 30.0,
    },
    **{"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 32, "use_double_wide_mlp": True},
}
EXPERTS4 = {
    **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    **{"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    **{"num_kv_shared_layers": 0, "use_double_wide_mlp": False},
}

MODELS = {
    "llama": ("LlamaForCausalLM", {**HEADS, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaForCausalLM", {**HEADS, "tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", LOCAL),
    "qwen2": ("Qwen2ForCausalLM", HEADS),
    "qwen2moe": ("Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 96}),
    "qwen3": ("Qwen3ForCausalLM", {**HEADS, "head_dim": 32}),
    "qwen3moe": ("Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "gpt-oss": ("GptOssForCausalLM", {**LOCAL, "head_dim": 32, "sliding_window": 4}),
    "gemma": ("GemmaForCausalLM", {**HEADS, "head_dim": 32}),
    "gemma2": ("Gemma2ForCausalLM", WINDOWS),
    "gemma3": ("Gemma3ForCausalLM", {**WINDOWS, "num_hidden_layers": 6}),
    "gemma4": ("Gemma4ForCausalLM", {**HEADS, **GEMMA4}),
    "gemma4-experts": ("Gemma4ForCausalLM", {**HEADS, **GEMMA4, **EXPERTS4}),
    "phi3": ("Phi3ForCausalLM", HEADS),
    "starcoder2": ("Starcoder2ForCausalLM", HEADS),
    "stablelm": ("StableLmForCausalLM", {**HEADS, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "nemotron": ("NemotronForCausalLM", {**HEADS, "partial_rotary_factor": 0.5}),
    "falcon": ("FalconForCausalLM", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-7b": ("FalconForCausalLM", {**SIZES, "multi_query": True}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 128}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}),
    "mamba": ("MambaForCausalLM", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96}),
    "lfm2": (
        "Lfm2ForCausalLM",
        {**HEADS, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "qwen35": ("Qwen3_5ForCausalLM", {**HEADS, **DELTA}),
    "qwen35moe": ("Qwen3_5MoeForCausalLM", {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 96}),
    "minimax-m2": ("MiniMaxM2ForCausalLM", {**LOCAL, "head_dim": 32, "intermediate_size": 64, "rotary_dim": 16}),
    "t5": (
        "T5ForConditionalGeneration",
        {
            **{"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 96},
            **{"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
        },
    ),
}
"""Class and configuration of small models, by architecture or a variant of it."""


def build(name, **changes):
    kind, options = MODELS[name]
    options = {**options, **changes}
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    model = model_class(model_class.config_class(**tokens, **options)).eval()
    for parameter in model.parameters():  # weights of a size that gives clear predictions, biases that matter
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model


NAMES = json.loads((Path(__file__).parent / "names.json").read_text())
"""gguf-py's names (0.19.0) of the tensors outside layers and of layer 1, by architecture and transformers' names."""


def pairs_of_halves(weight, heads):
    """Each head's halves become neighbours in pairs."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def parts_of_heads(weight, heads, groups):
    """Queries of all heads, keys of all, values of all, of a weight with all three of each group of heads together."""
    size = weight.shape[0] // (heads + 2 * groups)
    grouped = weight.reshape(groups, heads // groups + 2, size, *weight.shape[1:])
    parts = grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]
    return torch.cat([part.reshape(-1, *weight.shape[1:]) for part in parts])


def groups_of(config):
    """Heads of keys of a Falcon."""
    return 1 if config.multi_query and not config.new_decoder_architecture else config.num_kv_heads


def gemma4_metadata(config):
    windows = [kind == "sliding_attention" for kind in config.layer_types]
    layers = config.per_layer_config
    first = config.num_hidden_layers - config.num_kv_shared_layers
    widths = [config.intermediate_size * (1 + (layer >= first)) for layer in range(config.num_hidden_layers)]
    full = layers[windows.index(False)].head_dim
    return {
        "attention.key_length": full,
        "attention.key_length_swa": layers[0].head_dim,
        "attention.head_count_kv": [layer.num_key_value_heads for layer in layers],
        "attention.sliding_window_pattern": windows,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "feed_forward_length": widths if config.use_double_wide_mlp else config.intermediate_size,
        "final_logit_softcapping": config.final_logit_softcapping,
        "rope.freq_base": 1_000_000.0,
        "rope.freq_base_swa": 10_000.0,
        "rope.dimension_count": full,
        "rope.dimension_count_swa": layers[0].head_dim,
        "expert_used_count": config.top_k_experts,
    }


def metadata_of(arch, model):
    config = model.config.to_dict()
    rope = config.get("rope_parameters") or {}
    own = {
        "context_length": config.get("max_position_embeddings") or config.get("n_positions"),
        "embedding_length": config.get("hidden_size") or config.get("n_embd") or config.get("d_model"),
        "block_count": config.get("num_hidden_layers") or config.get("n_layer") or config.get("num_layers"),
        "feed_forward_length": config.get("intermediate_size") or config.get("ffn_hidden_size") or config.get("d_ff"),
        "attention.head_count": config.get("num_attention_heads") or config.get("n_head") or config.get("num_heads"),
        "attention.head_count_kv": config.get("num_key_value_heads") or config.get("num_kv_heads"),
        "attention.key_length": config.get("head_dim") or config.get("d_kv"),
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
        "attention.layer_norm_epsilon": next(
            (
                config[key]
                for key in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
                if key in config
            ),
            None,
        ),
        "attention.sliding_window": config.get("sliding_window"),
        "rope.freq_base": rope.get("full_attention", rope).get("rope_theta"),
        "expert_count": config.get("num_local_experts") or config.get("num_experts"),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
    }
    if rope.get("partial_rotary_factor", 1) != 1:
        size = config.get("head_dim") or own["embedding_length"] // own["attention.head_count"]
        own["rope.dimension_count"] = int(size * rope["partial_rotary_factor"])
    if arch == "gemma4":
        own |= gemma4_metadata(model.config)
    if arch == "falcon":
        own["attention.head_count_kv"] = groups_of(model.config)
    if arch == "gpt2":
        own["feed_forward_length"] = 4 * own["embedding_length"]
    if arch in ("gpt-oss", "minimax-m2"):
        own["expert_feed_forward_length"] = own["feed_forward_length"]
    if arch == "gpt-oss":
        own |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
        own |= {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
    if arch == "gemma2":
        own |= {key: float(config[key]) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    if arch == "minimax-m2":
        own["rope.dimension_count"] = 16
    if arch == "mamba":
        own |= {"ssm.inner_size": 128, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 4}
        own["attention.layer_norm_rms_epsilon"], own["attention.layer_norm_epsilon"] = (
            config["layer_norm_epsilon"],
            None,
        )
    if arch.startswith("qwen35"):
        own |= {"ssm.conv_kernel": 4, "ssm.state_size": 32, "ssm.group_count": 2, "ssm.time_step_rank": 6}
        own |= {"ssm.inner_size": 96, "full_attention_interval": 4}
    if arch == "lfm2":
        own |= {"attention.head_count_kv": [0, 2], "shortconv.l_cache": config["conv_L_cache"]}
        own["attention.layer_norm_rms_epsilon"] = config["norm_eps"]
    if arch.startswith("t5"):
        own["attention.layer_norm_rms_epsilon"] = config["layer_norm_epsilon"]
        own["attention.relative_buckets_count"] = config["relative_attention_num_buckets"]
    tokens = {f"tokenizer.ggml.{key}_token_id": number for number, key in enumerate(("padding", "eos", "bos"))}
    own = {f"{arch}.{key}": value for key, value in own.items() if value is not None}
    return {"general.architecture": arch, **own, **tokens}


def tensors_of(variant, arch, model):
    """The file's tensors by name, each with the model's tensors it is made of and how."""
    config = model.config
    state = model.state_dict()
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    result = {}
    for name, tensor in state.items():
        if name in tied:
            continue
        number = re.search(r"(?:layers|h|block)\.(\d+)\.", name)
        pattern = name if number is None else name.replace(number[0], number[0].replace(number[1], "1"))
        known = NAMES[variant].get(name, NAMES[variant].get(pattern))
        if known is None or "experts" in name or "e_score" in name:
            result |= experts_of(arch, name, tensor, f"blk.{number[1]}.")
            continue
        own = known if number is None else re.sub(r"blk\.\d+\.", f"blk.{number[1]}.", known)
        if own.endswith("attn_sinks"):
            own += ".weight"
        result[own] = written(arch, own, tensor, config)
    if arch == "gemma4":
        result["rope_freqs.weight"] = torch.tensor([1.0] * 4 + [1e30] * 12)
    return result


def experts_of(arch, name, tensor, start):
    if name.endswith("e_score_correction_bias"):
        return {f"{start}exp_probs_b.bias": tensor}
    if "router" in name:
        return {f"{start}{'ffn_down_exps' if 'per_expert' in name else 'ffn_gate_inp'}.scale": tensor}
    if arch == "gemma4" and "gate_up" in name:
        return {f"{start}ffn_gate_up_exps.weight": tensor}
    key = "bias" if name.endswith("_bias") else "weight"
    if arch == "gpt-oss" and key == "weight":
        tensor = tensor.transpose(1, 2)
    if "down_proj" in name:
        return {f"{start}ffn_down_exps.{key}": tensor}
    rows = tensor.shape[1] // 2
    gate, up = (tensor[:, ::2], tensor[:, 1::2]) if arch == "gpt-oss" else (tensor[:, :rows], tensor[:, rows:])
    return {f"{start}ffn_gate_exps.{key}": gate, f"{start}ffn_up_exps.{key}": up}


def tiled(tensor, size):
    """Value heads of `size` rows in the order of their number for their key head."""
    return tensor.reshape(2, 3, size, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)


def written_qwen35(part, tensor):
    if part.endswith("norm.weight") and "ssm" not in part:
        return tensor + 1
    if part.startswith(("attn_qkv", "ssm_conv1d")):
        keys, values = tensor[:128], tensor[128:]
        tensor = torch.cat((keys, tiled(values, 16)))
        return tensor.squeeze(1) if part.startswith("ssm_conv1d") else tensor
    if part.startswith("attn_gate"):
        return tiled(tensor, 16)
    if part.startswith("ssm_out"):
        return tiled(tensor.t(), 16).t()
    if part == "ssm_a":
        return tiled(-torch.exp(tensor), 1)
    if part.startswith(("ssm_alpha", "ssm_beta", "ssm_dt")):
        return tiled(tensor, 1)
    return tensor[0] if part == "ffn_gate_inp_shexp.weight" else tensor


def written(arch, own, tensor, config):
    part = own.split(".", 2)[-1] if own.startswith("blk.") else own
    if arch == "llama" and part.startswith(("attn_q.", "attn_k.")):
        heads = config.num_attention_heads if part.startswith("attn_q") else config.num_key_value_heads
        return pairs_of_halves(tensor, heads)
    if arch in ("bloom", "falcon") and part.startswith("attn_qkv"):
        heads = config.num_attention_heads
        groups = heads if arch == "bloom" else groups_of(config)
        return parts_of_heads(tensor, heads, groups)
    if arch in ("gemma", "gemma2", "gemma3") and part.endswith("norm.weight"):
        return tensor + 1
    if arch.startswith("qwen35"):
        return written_qwen35(part, tensor)
    if arch == "nemotron" and part.endswith("norm.weight"):
        return tensor + 1
    if arch == "gpt2" and part.startswith(
        ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    ):
        return tensor.t()
    if part == "ssm_a":
        return -torch.exp(tensor)
    if part.endswith(("conv.weight", "conv1d.weight")):
        return tensor.squeeze(1)
    if part == "ffn_gate_inp_shexp.weight":
        return tensor[0]
    return tensor


FLOATS = re.compile(r"norm|scale|rope|_inp|conv|ssm_a|ssm_d$|position|bias|rel_b|sinks|exp_probs")


HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture
def gguf_of(tmp_path, write_gguf, blocks_of):
    """`gguf_of(model, variant, arch, kind)` writes a file of a model and gives its path.

    `kind` is "F32", "F16", "BF16", "Q8_0", or "values" for the values of Q8_0 in float32.
    """

    def write(model, variant, arch, kind="F32", **metadata):
        tensors = tensors_of(variant, arch, model)
        for name, tensor in tensors.items() if kind in HALVES else ():
            tensors[name] = tensor.to(HALVES[kind]) if tensor.dim() > 1 else tensor
        for name, tensor in tensors.items() if kind in ("Q8_0", "values") else ():
            if not FLOATS.search(name) and tensor.dim() > 1 and tensor.shape[-1] % 32 == 0:
                blocks, values = blocks_of(tensor)
                tensors[name] = blocks if kind == "Q8_0" else values
        return write_gguf(tmp_path / f"{kind}.gguf", {**metadata_of(arch, model), **metadata}, tensors)

    return write


@pytest.fixture
def make_tiny():
    """`make_tiny(name)` builds one of MODELS."""
    return build
