"""The argument `smoothquant_args`: the values of alpha to try, and how `auto` is searched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..observers.smoothquant import checked_alpha
from .candidate import AUTO
from .sensitivity import COMBINE
from .static import AlphaSearch

_KEYS = ("alpha", "folding", "auto_alpha_args")
_AUTO_KEYS = ("init_alpha", "alpha_min", "alpha_max", "alpha_step", "shared_criterion", "enable_blockwise_loss")


def read_smoothquant_args(arguments: Mapping[str, Any] | None) -> tuple[tuple[float | str | None, ...], AlphaSearch]:
    """The alphas to try (None for no smoothing), and the search that "auto" means.

    `arguments` may hold:

    - `alpha`: a number in 0..1, "auto" (the default), None, or a list of these.
    - `auto_alpha_args`: `init_alpha` (0.5), `alpha_min` (0), `alpha_max` (1), `alpha_step` (0.1), `shared_criterion`
      ("mean", "min" or "max"), and `enable_blockwise_loss` (False), also named `do_blockwise`: one alpha per
      transformer block, by the error of the block's output, not one per share group, by the errors of its layers.
    - `folding`: without effect; factors are always folded into a norm where possible.

    Without arguments "auto" and None are tried. Raises TypeError or ValueError for anything else.
    """
    if arguments is None:
        return (AUTO, None), AlphaSearch()
    if not isinstance(arguments, Mapping):
        raise TypeError(f"smoothquant_args: expected a dict, got {type(arguments).__name__}")
    _check_keys("smoothquant_args", arguments, _KEYS)
    given = arguments.get("alpha", AUTO)
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    if not given:
        raise ValueError("smoothquant_args: alpha: expected at least one value, got an empty list")
    alphas = (alpha if alpha is None or _is_auto(alpha) else _alpha("alpha", alpha) for alpha in given)
    return tuple(dict.fromkeys(alphas)), _read_auto_args(arguments.get("auto_alpha_args") or {})


def _read_auto_args(arguments: Any) -> AlphaSearch:
    if not isinstance(arguments, Mapping):
        raise TypeError(f"auto_alpha_args: expected a dict, got {type(arguments).__name__}")
    arguments = {("enable_blockwise_loss" if key == "do_blockwise" else key): v for key, v in arguments.items()}
    _check_keys("auto_alpha_args", arguments, _AUTO_KEYS)
    low, high = (_alpha(key, arguments.get(key, default)) for key, default in (("alpha_min", 0.0), ("alpha_max", 1.0)))
    step = arguments.get("alpha_step", 0.1)
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 < step <= 1:
        raise ValueError(f"auto_alpha_args: alpha_step: expected a number above 0 and up to 1, got {step!r}")
    if low > high:
        raise ValueError(f"auto_alpha_args: expected alpha_min <= alpha_max, got {low} and {high}")
    combine = arguments.get("shared_criterion", "mean")
    if combine not in list(COMBINE):
        raise ValueError(f"auto_alpha_args: shared_criterion: expected one of {', '.join(COMBINE)}, got {combine!r}")
    by_block = arguments.get("enable_blockwise_loss", False)
    if not isinstance(by_block, bool):
        raise TypeError(f"auto_alpha_args: enable_blockwise_loss: expected True or False, got {by_block!r}")
    first = arguments.get("init_alpha", 0.5)
    first = 0.5 if _is_auto(first) else _alpha("init_alpha", first)
    count = int((high - low) / step + 1e-6) + 1
    alphas = [round(low + i * step, 6) for i in range(count)]
    return AlphaSearch(tuple(alphas), combine, by_block, first)


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == AUTO


def _alpha(name: str, value: Any) -> float:
    try:
        return checked_alpha(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f'smoothquant_args: {name}: expected "auto" or a number in [0, 1], got {value!r}') from None


def _check_keys(name: str, arguments: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = [key for key in arguments if key not in known]
    if unknown:
        raise ValueError(f"{name}: unknown keys {unknown}, expected some of {', '.join(known)}")
