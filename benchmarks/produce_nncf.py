"""A model whose weights OpenVINO's NNCF compressed; see produce.py. Settings: those of nncf.compress_weights.

NNCF's result is no checkpoint: the directory holds its weights as NNCF dequantizes them, and `sizes.json` the type,
bytes and numbers of each. The embedding and the head stay in float.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from nncf import BackupMode, CompressWeightsMode, Dataset, compress_weights
from nncf.torch.function_hook.wrapper import get_hook_storage
from nncf.torch.quantization.layers import BaseWeightsDecompressor
from produce import task
from torch import nn
from transformers import AutoModelForCausalLM


def dequantized(compressed: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, tuple[str, int, int]]]:
    """The float weights of a compressed model by name, and their sizes; RuntimeError for hooks that change inputs."""
    state = {name: tensor for name, tensor in compressed.state_dict().items() if not name.startswith("__nncf")}
    sizes = {name: (str(tensor.dtype), tensor.nbytes, tensor.numel()) for name, tensor in state.items()}
    for name, hook in get_hook_storage(compressed).named_hooks():
        weight = name.split("post_hooks.")[-1].split("__")[0].replace(":", ".")
        if not isinstance(hook, BaseWeightsDecompressor) or weight not in state:
            raise RuntimeError(f"{name}: a {type(hook).__name__} that is not in the weights")
        packed = state[weight]
        state[weight] = hook(packed).float()
        stored = packed.nbytes + sum(
            each.nbytes for key, each in hook.named_buffers() if key in ("_scale", "_zero_point")
        )
        sizes[weight] = (type(hook).__name__, stored, state[weight].numel())
    return state, sizes


def main() -> None:
    job = task()
    torch.set_num_threads(job.threads)
    settings = dict(job.settings)
    mode = CompressWeightsMode[settings.pop("mode")]
    model = AutoModelForCausalLM.from_pretrained(job.directory, dtype=torch.float32).eval()
    tied = model.all_tied_weights_keys
    windows = [{"input_ids": torch.tensor([window])} for window in job.read_windows()]
    if mode in (CompressWeightsMode.INT4_ASYM, CompressWeightsMode.INT4_SYM):
        settings |= {"backup_mode": BackupMode.NONE, "dataset": Dataset(windows), "subset_size": len(windows)}
    compressed = compress_weights(model, mode=mode, **settings)
    state, sizes = dequantized(compressed)
    plain = AutoModelForCausalLM.from_pretrained(job.directory, dtype=torch.float32)
    plain.load_state_dict(state)
    plain.save_pretrained(job.out)
    sizes = {name: size for name, size in sizes.items() if name not in tied}
    (Path(job.out) / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")


if __name__ == "__main__":
    main()
