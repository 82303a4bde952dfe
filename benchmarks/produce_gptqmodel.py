"""A model quantized by GPTQModel; see produce.py. Settings: those of its QuantizeConfig."""

from __future__ import annotations

import os

cores = os.cpu_count() or 1
os.cpu_count = lambda: max(cores, 4)  # its pools of threads cannot be made with fewer

import torch  # noqa: E402
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from produce import task  # noqa: E402


def main() -> None:
    job = task()
    torch.set_num_threads(job.threads)
    config = QuantizeConfig(device="cpu", **job.settings)
    model = GPTQModel.load(job.directory, config, dtype=torch.float32)
    windows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in job.read_windows()]
    model.quantize(windows, batch_size=1)
    model.save(job.out)


if __name__ == "__main__":
    main()
