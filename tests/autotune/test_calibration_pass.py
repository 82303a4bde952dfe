import pytest
import torch
from torch import nn

from ipex_quant.autotune.calibration_pass import SAMPLE_ROWS, RecordingObserver, collect, is_smoothed
from ipex_quant.conversion.example import Example


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.q, self.k, self.unused = nn.Conv1d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x):
        h = torch.relu(self.conv(x).transpose(1, 2))
        return torch.cat([self.q(h), self.k(h)], -1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [Example((torch.randn(2, 3, 5, generator=generator),)) for _ in range(4)]


def test_ranges_are_those_of_as_many_samples_as_asked_for(net, batches):
    found = collect(net, batches, [4, 100])
    assert found.observers.keys() == {4, 100}
    seen = {4: torch.cat([b.args[0] for b in batches[:2]]), 100: torch.cat([b.args[0] for b in batches])}
    for size, x in seen.items():
        observers = found.observers[size]
        assert observers.keys() == {"conv", "q"}, "q and k share one; nothing reaches the unused layer"
        assert observers["conv"].act_obs.min_val == x.min()
        assert observers["conv"].act_obs.max_val == x.max()
        hidden = torch.relu(net.conv(x).transpose(1, 2)).flatten(0, 1).detach()
        torch.testing.assert_close(observers["q"].ic_obs.max_val, hidden.amax(0))
    assert is_smoothed(found.groups[1], found.model)
    assert not is_smoothed(found.groups[0], found.model)


def test_observers_are_copies_without_the_sample(net, batches):
    found = collect(net, batches, [8])
    assert all(observer.drawn is None for observer in found.observers[8].values())
    assert found.samples["q"].shape == (20, 4)
    assert found.samples["conv"].shape == (4, 3, 5), "whole inputs of a convolution, four at most"
    assert not any(group.has_data for group in found.groups)


def test_a_calibration_function_takes_the_place_of_the_batches(net, batches):
    found = collect(net, batches, [2, 8], lambda model: model(torch.full((1, 3, 5), 7.0)))
    assert found.observers.keys() == {8}
    assert found.observers[8]["conv"].act_obs.max_val == 7


def test_no_layer_was_reached(net, batches):
    with pytest.raises(ValueError, match="none of the layers to quantize was reached"):
        collect(net, batches, [8], lambda model: None)


def test_one_half_of_the_data_is_sampled_and_the_other_observed():
    observer = RecordingObserver()
    halves = [(torch.zeros(3, 2), torch.ones(3, 2)), (torch.full((3, 2), 2.0), torch.full((3, 2), 3.0))]
    for first, second in halves:
        observer(torch.cat([first, second]))
    # the halves alternate, so that neither is always the beginning of a batch
    assert sorted(set(observer.drawn.rows.flatten().tolist())) == [1.0, 2.0]
    assert observer.other_half.min_val.tolist() == [0.0, 0.0]
    assert observer.other_half.max_val.tolist() == [3.0, 3.0]
    assert observer.ic_obs.max_val.tolist() == [3.0, 3.0]


def test_a_sample_is_bounded_and_the_seed_draws_it():
    x = torch.arange(2000.0).reshape(-1, 1).expand(-1, 2)
    samples = []
    for seed in (0, 0, 1):
        observer = RecordingObserver(seed=seed)
        for part in x.split(100):
            observer(part)
        samples.append(observer.drawn.rows)
    assert all(len(sample) == SAMPLE_ROWS for sample in samples)
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
