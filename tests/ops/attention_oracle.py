"""Results of attention over an int8 cache against the plain-torch definition, which rounds as the kernels do."""

from __future__ import annotations

from collections.abc import Callable

import torch


def assert_int8_close(
    result: torch.Tensor,
    definition: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *arguments: torch.Tensor,
    error: float = 1e-5,
    **options,
) -> None:
    """`result` is what `definition` gives for int8 keys and values, when float32 weights have the relative `error`.

    A weight so near the middle between two codes that `error` decides may have either. Then comes one rounding to the
    dtype of `result`, which the bounds go through as well.
    """

    def defined(values: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return definition(query.double(), key, values, *arguments, rounding=rounding, **options)

    expected = defined(value, torch.round)
    more = defined(value.abs(), lambda code: (code * (1 + error) + 0.5).floor() * (1 + error))
    less = defined(value.abs(), lambda code: (code * (1 - error) - 0.5).ceil() * (1 - error))
    low, high = (expected - (more - less)).to(result.dtype), (expected + (more - less)).to(result.dtype)
    outside = ~((low <= result) & (result <= high))
    assert not outside.any(), (
        f"{int(outside.sum())} of {outside.numel()} are out of bounds, the first at {outside.nonzero()[0].tolist()}: "
        f"got {result[outside][0]}, expected {expected[outside][0]} within {(more - less)[outside][0]}"
    )
