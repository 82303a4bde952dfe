"""llama.cpp as an engine of the benchmarks (see engines.py), through llama-cpp-python, in an environment of its own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from engines import Shape, prompt_ids, serve

TYPES = {"Q4_0": gguf.GGMLQuantizationType.Q4_0, "Q8_0": gguf.GGMLQuantizationType.Q8_0}
RANDOM_WEIGHTS = 1 << 20
CONTEXT = 2048


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


class Engine:
    """A GGUF model. `generate` is greedy and does not stop at an end token."""

    def __init__(self, path: str, threads: int) -> None:
        self.size, start = os.path.getsize(path), time.perf_counter()
        sizes = {"n_ctx": CONTEXT, "n_batch": 512, "n_threads": threads, "n_threads_batch": threads}
        self.model = llama_cpp.Llama(path, **sizes, flash_attn=True)  # faster, and the default of llama.cpp's tools
        self.vocabulary, self.seconds = self.model.n_vocab(), time.perf_counter() - start
        self.path, self.sizes = path, sizes

    def describe(self) -> dict[str, Any]:
        version = f"llama-cpp-python {llama_cpp.__version__}"
        return {"weight_bytes": self.size, "loading_seconds": self.seconds, "version": version}

    def generate(self, prompt: int, new_tokens: int, seed: int) -> dict[str, float]:
        ids = prompt_ids(prompt, self.vocabulary, seed)
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(ids)
        token = self._best()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            self.model.eval([token])
            token = self._best()
        last = time.perf_counter()
        return {"prefill": first - start, "decode": (last - first) / (new_tokens - 1)}

    def decode(self, batch: int, prompt: int, new_tokens: int, seed: int) -> dict[str, float]:
        """Median seconds of a step of `batch` sequences."""
        slots = Slots(self, batch, batch * (prompt + new_tokens + 2))
        slots.answer([prompt_ids(prompt, self.vocabulary, seed + i) for i in range(batch)], new_tokens + 1)
        steps = sorted(slots.steps[-new_tokens:])
        return {"seconds": steps[len(steps) // 2]}

    def requests(self, lengths: list[int], new_tokens: int, seed: int) -> dict[str, float]:
        """Seconds until all requests are answered."""
        slots = Slots(self, len(lengths), sum(lengths) + len(lengths) * new_tokens)
        prompts = [prompt_ids(n, self.vocabulary, 1000 * seed + i) for i, n in enumerate(lengths)]
        start = time.perf_counter()
        slots.answer(prompts, new_tokens)
        return {"seconds": time.perf_counter() - start}

    def loss(self, windows: list[list[int]]) -> dict[str, float]:
        """Sum of the negative log-likelihoods of all tokens of the windows but their first ones."""
        model = llama_cpp.Llama(self.path, **self.sizes, logits_all=True, verbose=False)
        total = 0.0
        for window in windows:
            model.reset()
            model.eval(window)
            logits = model.scores[: len(window) - 1].astype(np.float64)
            highest = logits.max(axis=1, keepdims=True)
            normalizer = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1))
            total += float((normalizer - logits[np.arange(len(window) - 1), window[1:]]).sum())
        return {"loss": total}

    def _best(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


class Slots:
    """Sequences that run together as in llama.cpp's server: a step has a token of each, then parts of prompts."""

    def __init__(self, engine: Engine, count: int, tokens: int) -> None:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = tokens, 512, 512, count
        options.n_threads = options.n_threads_batch = engine.sizes["n_threads"]
        options.flash_attn_type, options.kv_unified = 1, True
        self.vocabulary, self.steps = engine.vocabulary, []
        self.context = llama_cpp.llama_init_from_model(engine.model.model, options)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def answer(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Decode greedily until every sequence has `new_tokens`."""
        todo = [list(ids) for ids in prompts]
        places, left = [0] * len(prompts), [new_tokens] * len(prompts)
        while any(left):
            start = time.perf_counter()
            rows, last = [], {}
            order = sorted((i for i in range(len(prompts)) if left[i]), key=lambda i: len(todo[i]) > 1)
            for i in order:
                taken = todo[i][: 512 - len(rows)]
                rows += [(token, places[i] + n, i) for n, token in enumerate(taken)]
                places[i] += len(taken)
                todo[i] = todo[i][len(taken) :]
                if taken and not todo[i]:
                    last[i] = len(rows) - 1
            self._decode(rows, set(last.values()))
            for i, row in last.items():
                logits = llama_cpp.llama_get_logits_ith(self.context, row)
                todo[i] = [int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())]
                left[i] -= 1
            self.steps.append(time.perf_counter() - start)
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def _decode(self, rows: list[tuple[int, int, int]], wanted: set[int]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for row, (token, place, sequence) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, place, 1
            batch.seq_id[row][0], batch.logits[row] = sequence, row in wanted
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")


def load(shape: Shape, path: str, threads: int, **_: Any) -> Engine:
    return Engine(path, threads)


if __name__ == "__main__":
    serve(load, prepare)
