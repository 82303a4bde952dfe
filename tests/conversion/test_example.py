import pytest
import torch
from torch import nn

from ipex_quant.conversion.example import Example

X, LENGTHS = torch.ones(3, 4), torch.tensor([1, 2, 3])


class One(nn.Module):
    def forward(self, x, scale=1.0):
        return x * scale


class Two(nn.Module):
    def forward(self, x, lengths):
        return x * lengths[:, None]


@pytest.mark.parametrize(
    ("model", "item", "expected"),
    [
        (One(), X, (1, set())),
        (One(), (X,), (1, set())),
        (One(), [X, 2.0], (2, set())),
        (One(), {"x": X}, (0, {"x"})),
        (One(), (X, LENGTHS), (1, set())),
        (One(), (X, 3), (1, set())),
        (One(), (X, [1, 2, 3]), (1, set())),
        (One(), ({"x": X}, LENGTHS), (0, {"x"})),
        (One(), ((X, 2.0), LENGTHS), (2, set())),
        (One(), (X, torch.ones(3)), (2, set())),
        (One(), (X, torch.ones(3, 4).long()), (2, set())),
        (Two(), (X, LENGTHS), (2, set())),
        (nn.Linear(4, 4), (X, torch.ones(3)), (1, set())),
        (Two(), ((X, LENGTHS), torch.tensor(3)), (2, set())),
    ],
)
def test_items_of_a_dataloader(model, item, expected):
    """A label or an index beside complete arguments is left out; what the forward needs is not."""
    example = Example.of_item(model, item, "dataloader")
    assert (len(example.args), set(example.kwargs)) == expected


@pytest.mark.parametrize("item", ["text", 3, None, (), [], {}])
def test_items_that_are_none(item):
    with pytest.raises(TypeError, match=r"^there: expected items that are a mapping, a tuple, a list or a tensor"):
        Example.of_item(One(), item, "there")


def test_arguments_by_name():
    example = Example((X,), {"scale": 2.0})
    assert example.by_name(One()) == {"x": X, "scale": 2.0}
    assert Example((X, LENGTHS)).by_name(Two()).keys() == {"x", "lengths"}


def test_samples_are_counted_by_the_first_tensor():
    assert Example((X, LENGTHS)).sample_count == 3
    assert Example(kwargs={"scale": 1.0, "at": torch.tensor(5), "x": torch.ones(7, 2)}).sample_count == 7
    assert Example((2.0,)).sample_count == 1
    assert [len(each) for each in Example((X, 1, LENGTHS)).tensors()] == [3, 3]


def test_the_users_example():
    assert Example.of(One(), None, None, needed=False) is None
    with pytest.raises(ValueError, match="cannot be none at same time"):
        Example.of(One(), None, None, needed=True)
    with pytest.raises(ValueError, match="cannot be set at same time"):
        Example.of(One(), X, {"x": X}, needed=True)
    with pytest.raises(TypeError, match="must be type of Dict"):
        Example.of(One(), None, [X], needed=True)
    with pytest.raises(ValueError, match=r"example_inputs: missing a required argument: 'lengths'.*forward takes x"):
        Example.of(Two(), X, None, needed=True)
    assert Example.of(Two(), (X, LENGTHS), None, needed=True).args == (X, LENGTHS)


def test_an_example_that_is_a_mapping():
    class Sum(nn.Module):
        def forward(self, batch):
            return sum(batch.values())

    assert Example.of(Two(), {"x": X, "lengths": LENGTHS}, None, needed=True).kwargs.keys() == {"x", "lengths"}
    assert Example.of(Sum(), {"x": X, "y": X}, None, needed=True).args == ({"x": X, "y": X},)
    with pytest.raises(ValueError, match=r"example_inputs: got an unexpected keyword argument 'y'"):
        Example.of(Two(), {"x": X, "y": X, "lengths": X}, None, needed=True)


def test_running_it_leaves_modes_and_gradients_alone():
    model = nn.Sequential(nn.Dropout(0.9), One()).train()
    model[0].eval()
    result = Example((X.requires_grad_(),)).run(model)
    assert torch.equal(result, X)
    assert not result.requires_grad
    assert (model.training, model[0].training) == (True, False)
    with pytest.raises(ValueError, match="example_inputs: Two cannot be called with it"):
        Example((X, LENGTHS.float()[:2])).run(Two())
