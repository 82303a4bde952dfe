"""A model quantized by neural-compressor; see produce.py. Settings: algorithm, bits, group_size, sym."""

from __future__ import annotations

import torch
from neural_compressor.torch.quantization import AWQConfig, GPTQConfig, RTNConfig, convert, prepare
from produce import task
from transformers import AutoModelForCausalLM

CONFIGS = {"rtn": RTNConfig, "gptq": GPTQConfig, "awq": AWQConfig}


def main() -> None:
    job = task()
    torch.set_num_threads(job.threads)
    settings = dict(job.settings)
    algorithm = settings.pop("algorithm")
    options = {"bits": settings["bits"], "group_size": settings["group_size"], "use_sym": settings["sym"]}
    if algorithm == "rtn":
        options["use_layer_wise"] = False
    config = CONFIGS[algorithm](**options)
    model = AutoModelForCausalLM.from_pretrained(job.directory, dtype=torch.float32).eval()
    windows = [torch.tensor([window]) for window in job.read_windows()]
    model = prepare(model, config, example_inputs=windows[0] if algorithm == "awq" else None)
    if algorithm != "rtn":
        with torch.no_grad():
            for window in windows:
                model(window)
    convert(model).save(job.out, format="huggingface")


if __name__ == "__main__":
    main()
