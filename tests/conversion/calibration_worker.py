"""Calibrates a small model in a process of its own: `calibration_worker.py MODE DIRECTORY RANK WORLD`."""

import os
import signal
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from ipex_quant.conversion import calibration as _calibration
from ipex_quant.observers import HistogramObserver, MinMaxObserver, SmoothQuantActivationObserver


class Model(nn.Module):
    """Two layers, each behind an observer; `forward` can be told to die, as if by kill -9."""

    def __init__(self, factory=HistogramObserver, width: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 4)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.observers = {"first": factory(), "second": factory()}
        self.calls = 0
        self.modes: set[bool] = set()

    def forward(self, x: torch.Tensor, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
        self.calls += 1
        self.modes.add(self.training or torch.is_grad_enabled())
        x = self.observers["first"](x * scale)
        return self.second(self.observers["second"](self.first(x)))


@contextmanager
def observed_models():
    """Let the calibration find the observers of `Model`."""
    with patch.object(_calibration, "observed", lambda model: SimpleNamespace(observers=lambda: dict(model.observers))):
        yield


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 4, generator=generator) * (i + 1) for i in range(count)]


def statistics(model: Model) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key}": value.clone()
        for name, obs in model.observers.items()
        for key, value in obs.state_dict().items()
    }


def killed_after(count: int, data: list[torch.Tensor]):
    for index, batch in enumerate(data):
        if index == count:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def main(mode: str, directory: str, rank: int, world: int) -> None:
    with observed_models():
        if mode == "kill":
            _calibration.calibrate(Model(), killed_after(11, batches(16)), f"{directory}/checkpoint", save_every=4)
        dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=world)
        found = {}
        for name, factory in FACTORIES.items():
            model = Model(factory)
            _calibration.calibrate(model, batches(5))
            _calibration.calibrate(model, batches(7)[5:])  # what they hold already must not count twice
            found |= {f"{name} {key}": value for key, value in statistics(model).items()}
        alone = Model()
        _calibration.calibrate(alone, batches(1))  # rank 1 has no batch
        found |= {f"alone {key}": value for key, value in statistics(alone).items()}
        save_file(found, f"{directory}/{rank}")
        bad = [torch.ones(3, 4), torch.full((3, 4), torch.nan)]
        try:
            _calibration.calibrate(Model(), bad)
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
        dist.destroy_process_group()


FACTORIES = {"min_max": MinMaxObserver, "histogram": HistogramObserver, "smooth": SmoothQuantActivationObserver}

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
