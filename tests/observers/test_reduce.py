"""Two gloo ranks, as processes, hold the statistics of one process that saw all the data."""

import sys
from pathlib import Path

import pytest
import torch
import torch.ao.quantization as torch_ao
import torch.distributed as dist
import torch.multiprocessing as mp

from ipex_quant.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    SmoothQuantActivationObserver,
    check_reducible,
    reduce_observer,
)

WORLD = 2


def _observers() -> dict[str, torch.nn.Module]:
    return {
        "min_max": MinMaxObserver(),
        "per_channel": PerChannelMinMaxObserver(ch_axis=-1),
        "histogram": HistogramObserver(),
        "smooth_quant": SmoothQuantActivationObserver(act_observer=MinMaxObserver),
        "torch_min_max": torch_ao.MinMaxObserver(),
        "torch_per_channel": torch_ao.PerChannelMinMaxObserver(ch_axis=-1),
    }


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 4, generator=generator) * 10**i for i in range(4)]


def _rank(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=WORLD)
    found = {}
    # In the second case rank 1 sees nothing, in the third nobody does.
    for case, shares in {"both": (3, 1), "one": (4, 0), "none": (0, 0)}.items():
        parts = (_batches()[: shares[0]], _batches()[4 - shares[1] :] if shares[1] else [])[rank]
        for name, observer in _observers().items():
            for x in parts:
                observer(x)
            reduce_observer(observer)
            found |= {f"{case} {name} {key}": value for key, value in observer.state_dict().items()}
    unequal = PerChannelMinMaxObserver()
    unequal(torch.ones(3 + rank, 2))
    with pytest.raises(ValueError, match="ranks saw tensors of 3 to 4 channels"):
        unequal.reduce()
    torch.save(found, f"{directory}/{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="needs gloo")
def test_two_ranks_hold_what_one_process_does(tmp_path: Path):
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    expected = {}
    for case, count in {"both": 4, "one": 4, "none": 0}.items():
        for name, observer in _observers().items():
            for x in _batches()[:count]:
                observer(x)
            expected |= {f"{case} {name} {key}": value for key, value in observer.state_dict().items()}
    for rank in range(WORLD):
        found = torch.load(tmp_path / str(rank))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("observer", "name"),
    [
        (MovingAverageMinMaxObserver(), "MovingAverageMinMaxObserver: a moving average depends on the order"),
        (torch_ao.MovingAverageMinMaxObserver(), "observer.MovingAverageMinMaxObserver: its statistics cannot"),
        (torch_ao.HistogramObserver(), "HistogramObserver: its statistics cannot be combined over ranks"),
        (SmoothQuantActivationObserver(0.5, MovingAverageMinMaxObserver, None, False), "MovingAverageMinMaxObserver"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refused(observer, name):
    for refuse in (check_reducible, reduce_observer):
        with pytest.raises(TypeError, match=name):
            refuse(observer)
