import torch

from ipex_quant.numerics.reservoir import Reservoir


def draw(parts, capacity, seed=0):
    reservoir, generator = Reservoir(capacity), torch.Generator().manual_seed(seed)
    for part in parts:
        reservoir.add(part, generator)
    return reservoir.rows


def test_all_are_kept_while_there_is_room():
    x = torch.randn(10, 3)
    assert Reservoir(4).rows is None
    assert torch.equal(draw(x.split(3), 10), x)


def test_rows_come_in_their_order_and_batches_do_not_matter():
    x = torch.arange(1000.0)[:, None]
    rows = draw([x], 50)
    assert torch.equal(rows, rows.sort(0).values)
    assert len(rows.unique()) == 50
    assert torch.equal(draw(x.split(7), 50), rows), "the keys are those of one draw"


def test_each_is_as_likely_as_another():
    x = torch.arange(40.0)[:, None]
    counts = sum(torch.bincount(draw(x.split(9), 10, seed)[:, 0].long(), minlength=40) for seed in range(400))
    # 400 draws of a quarter: 100 expected of each, with a standard deviation of 8.7
    assert counts.min() > 60
    assert counts.max() < 140


def test_rows_are_copies():
    x = torch.ones(3, 2)
    rows = draw([x], 5)
    x.zero_()
    assert rows.all()
