"""A model quantized here, by a packaged recipe or one of the fields in the settings; see produce.py."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from produce import task

from ipex_quant import llm
from ipex_quant.recipes.load import quantized
from ipex_quant.recipes.recipe import load_recipe


def main() -> None:
    job = task()
    torch.set_num_threads(job.threads)
    name = job.settings.get("recipe")
    if name is None:
        file = Path(job.out).with_suffix(".yaml")
        windows = {"samples": len(job.read_windows()), "sequence_length": job.length}
        calibrates = job.settings["algorithm"] != "rtn"
        file.write_text(yaml.safe_dump(job.settings | (windows if calibrates else {})), encoding="utf-8")
        name = str(file)
    ids = [torch.tensor([window]) for window in job.read_windows()]
    calibration = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    model, _ = quantized(load_recipe(name), Path(job.directory), torch.float32, calibration)
    llm.save(model, job.out)


if __name__ == "__main__":
    main()
