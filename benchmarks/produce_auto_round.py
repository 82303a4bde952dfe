"""A model quantized by auto-round; see produce.py. Settings: bits, group_size, sym, iters, batch_size."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from auto_round import AutoRound
from produce import task
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    job = task()
    torch.set_num_threads(job.threads)
    windows = [{"input_ids": torch.tensor(window)} for window in job.read_windows()]
    model = AutoModelForCausalLM.from_pretrained(job.directory, dtype=torch.float32)
    settings = dict(job.settings)
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.directory),
        scheme=settings.pop("scheme", "W4A16"),
        dataset=DataLoader(windows, batch_size=1),
        nsamples=len(windows),
        seqlen=job.length,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
        **settings,
    )
    parent = Path(job.out).with_suffix(".parent")
    tuner.quantize_and_save(str(parent), format="auto_round")
    (found,) = {file.parent for file in parent.rglob("config.json")}
    shutil.move(found, job.out)
    shutil.rmtree(parent, ignore_errors=True)


if __name__ == "__main__":
    main()
