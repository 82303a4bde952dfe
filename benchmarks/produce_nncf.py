"""A model whose weights OpenVINO's NNCF compressed; see produce.py. Settings: those of nncf.compress_weights.

NNCF's result is no checkpoint: the directory holds the dequantized weights, and `sizes.json` what they take.
"""

from __future__ import annotations

import torch
from nncf import CompressWeightsMode, Dataset, compress_weights
from produce import task
from transformers import AutoModelForCausalLM


def main() -> None:
    job = task()
    torch.set_num_threads(job.threads)
    settings = dict(job.settings)
    mode = CompressWeightsMode[settings.pop("mode")]
    model = AutoModelForCausalLM.from_pretrained(job.directory, dtype=torch.float32).eval()
    windows = [{"input_ids": torch.tensor([window])} for window in job.read_windows()]
    compressed = compress_weights(model, mode=mode, dataset=Dataset(windows), **settings)
    compressed.save_pretrained(job.out)


if __name__ == "__main__":
    main()
