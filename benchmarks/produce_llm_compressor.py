"""A model quantized by llm-compressor; see produce.py. Settings: algorithm (gptq or rtn), bits, group_size, sym."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from produce import task
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    job = task()
    torch.set_num_threads(job.threads)
    settings = job.settings
    group = settings["group_size"]
    grouped: dict[str, Any] = {"strategy": "channel"} if group < 0 else {"strategy": "group", "group_size": group}
    weights = QuantizationArgs(num_bits=settings["bits"], type="int", symmetric=settings["sym"], **grouped)
    schemes = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    model = AutoModelForCausalLM.from_pretrained(job.directory, dtype=torch.float32)
    if settings["algorithm"] == "rtn":
        oneshot(model=model, recipe=QuantizationModifier(config_groups=schemes, ignore=["lm_head"]))
    else:
        windows = job.read_windows()
        rows = {"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]}
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(job.directory),
            dataset=Dataset.from_dict(rows),
            recipe=GPTQModifier(config_groups=schemes, ignore=["lm_head"]),
            max_seq_length=job.length,
            num_calibration_samples=len(windows),
        )
    model.save_pretrained(job.out, save_compressed=True)


if __name__ == "__main__":
    main()
