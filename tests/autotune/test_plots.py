import warnings

from ipex_quant.autotune.plots import bar_plot


def test_long_names_leave_room_for_their_bars():
    bars = [(f"encoder.stack.layer.{i}.attention.self.projections.query", 10.0**-i) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = bar_plot([*bars, ("short", 0.1)])
    assert "short" in svg
    assert "….self.projections.query" in svg
    assert bars[0][0] not in svg


def test_no_errors_no_plot():
    assert bar_plot([("a", 0.0)]) == ""
