"""GGUF files of Llamas with random weights, for the engines that read them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from engines import Shape

TYPES = {"Q4_0": gguf.GGMLQuantizationType.Q4_0, "Q8_0": gguf.GGMLQuantizationType.Q8_0}
RANDOM_WEIGHTS = 1 << 20


def weights(n: int, k: int, kind: gguf.GGMLQuantizationType, random: np.random.Generator) -> np.ndarray:
    """A random quantized matrix of `n` rows; a large one repeats its first rows."""
    rows = min(n, max(1, RANDOM_WEIGHTS // k))
    block = gguf.quants.quantize((random.standard_normal((rows, k)) * 0.02).astype(np.float32), kind)
    return np.resize(block, (n, block.shape[1]))


def prepare(shape: Shape, weights_type: str, path: str, **_: Any) -> None:
    """Write a Llama of random weights; all matrices, also embedding and output layer, have one type."""
    if Path(path).exists():
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{path}.tmp"
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{weights_type}"])
    add_vocabulary(writer, shape.vocabulary)
    random, kind = np.random.default_rng(0), TYPES[weights_type]
    kv_size = shape.kv_heads * shape.head_size
    layer = {
        "attn_q": (shape.hidden, shape.hidden),
        "attn_k": (kv_size, shape.hidden),
        "attn_v": (kv_size, shape.hidden),
        "attn_output": (shape.hidden, shape.hidden),
        "ffn_gate": (shape.intermediate, shape.hidden),
        "ffn_up": (shape.intermediate, shape.hidden),
        "ffn_down": (shape.hidden, shape.intermediate),
    }
    ones = np.ones(shape.hidden, np.float32)
    writer.add_tensor("token_embd.weight", weights(shape.vocabulary, shape.hidden, kind, random), raw_dtype=kind)
    writer.add_tensor("output.weight", weights(shape.vocabulary, shape.hidden, kind, random), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", ones)
    for i in range(shape.layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", ones)
        for name, size in layer.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", weights(*size, kind, random), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Add a dummy vocabulary, which the file format requires; the benchmark passes token ids."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    plain = [f"t{i}" for i in range(size - len(special) - len(bytes_))]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + bytes_ + plain)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * len(bytes_) + [kinds.NORMAL] * len(plain)
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
