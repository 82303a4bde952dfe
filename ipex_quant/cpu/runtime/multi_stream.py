"""`MultiStreamModule`: a batch in several streams at the same time, each on cores of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import wait
from typing import Any

from torch import nn

from ..stream import Stream
from .cpupool import CPUPool
from .splitting import Hint, check_hint, join, shares, split


class MultiStreamModuleHint:
    """How to split the arguments of a call into streams, or to join results: one hint for each argument.

    An argument of the hint is an int, the dimension to split or concatenate along; None, for what is not split or
    concatenated: every stream gets it as it is, or the first stream's counts; or a tuple, list or dict of these, for a
    container of that form. An int for a container holds for all tensors in it. Keyword arguments stand for keyword
    arguments of the call.

    Raises TypeError for anything else.
    """

    def __init__(self, *args: Hint, **kwargs: Hint) -> None:
        for i, hint in enumerate(args):
            check_hint(hint, f"MultiStreamModuleHint: argument {i}")
        for name, hint in kwargs.items():
            check_hint(hint, f"MultiStreamModuleHint: {name}")
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        arguments = [*map(repr, self.args), *(f"{name}={hint!r}" for name, hint in self.kwargs.items())]
        return f"MultiStreamModuleHint({', '.join(arguments)})"


def get_default_num_streams(cpu_pool: CPUPool) -> int:
    """How many streams "AUTO" means on `cpu_pool`: one a core."""
    return len(cpu_pool.core_ids)


_FIRST_DIMENSION = MultiStreamModuleHint(0)


class _Streams(nn.Module):
    """A model, and the streams that run it."""

    def __init__(self, model: nn.Module, num_streams: int | str, cpu_pool: CPUPool | None) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"model: expected a module, got {type(model).__name__}")
        if not isinstance(cpu_pool, CPUPool | None):
            raise TypeError(f"cpu_pool: expected a CPUPool, got {type(cpu_pool).__name__}")
        self.model = model
        self.cpu_pool = CPUPool() if cpu_pool is None else cpu_pool
        self._streams = _make_streams(num_streams, self.cpu_pool)

    def get_stream_number(self) -> int:
        """The number of streams."""
        return len(self._streams)

    def extra_repr(self) -> str:
        return f"{len(self._streams)} streams on {self.cpu_pool}"

    def _run(self, calls: Iterable[tuple[Sequence[Any], dict[Any, Any]]]) -> list[Any]:
        """The results of calls of the model, one a stream, given the arguments and keyword arguments of each.

        Waits for all of them; then raises the first exception in the order of streams, if there is one.
        """
        futures = [
            stream.submit(self.model, args, kwargs)
            for stream, (args, kwargs) in zip(self._streams, calls, strict=False)
        ]
        wait(futures)
        return [future.result() for future in futures]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_streams": len(self._streams)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._streams = _make_streams(state["_streams"], self.cpu_pool)


class MultiStreamModule(_Streams):
    """Runs `model` on parts of a batch in several streams at the same time, for throughput.

    There are `num_streams` streams, or one a core with "AUTO", in any case. The cores of `cpu_pool` (default:
    ``CPUPool()``) are dealt out to them evenly, one extra core to each of the first ones if they do not divide; so are
    the rows of the inputs, along the dimensions that `input_split_hint` names. With fewer rows than streams, the first
    streams get one row each. What the hint does not name goes to every stream as it is, and may not hold tensors. A
    single stream gets the inputs as they are, and its result is not joined, whatever the hints say.

    The results are joined along the dimensions of `output_concat_hint`, whose one argument, or whose keywords, are for
    the model's result; without `concat_output` they are returned as a list, one item for each stream that had rows.
    An exception of a stream is raised when all have ended.

    Streams run in the caller's grad mode, inference mode and autocast state, each in a thread that lasts as long as
    this module. Eager models share Python's lock, so that streams overlap in native code only; scripted ones do not.

    Raises TypeError and ValueError for arguments that are none of the above, and, when called, if inputs or results do
    not fit the hints. Warns of more streams than cores, and makes as many as cores.
    """

    def __init__(
        self,
        model: nn.Module,
        num_streams: int | str = "AUTO",
        cpu_pool: CPUPool | None = None,
        concat_output: bool = True,
        input_split_hint: MultiStreamModuleHint = _FIRST_DIMENSION,
        output_concat_hint: MultiStreamModuleHint = _FIRST_DIMENSION,
    ) -> None:
        for name, hint in (("input_split_hint", input_split_hint), ("output_concat_hint", output_concat_hint)):
            if not isinstance(hint, MultiStreamModuleHint):
                raise TypeError(f"{name}: expected a MultiStreamModuleHint, got {type(hint).__name__}")
        if len(output_concat_hint.args) + bool(output_concat_hint.kwargs) != 1:
            raise ValueError(
                f"output_concat_hint: expected one argument for the one result of a model, as in "
                f"MultiStreamModuleHint((0, 0)) for a tuple, or only keywords for a dict, got {output_concat_hint}"
            )
        super().__init__(model, num_streams, cpu_pool)
        self.concat_output = concat_output
        self.input_split_hint = input_split_hint
        self.output_concat_hint = output_concat_hint

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result for the whole batch, or the list of the streams' results."""
        if len(self._streams) == 1:
            results = self._run([(args, kwargs)])
            return results[0] if self.concat_output else results
        hint = self.input_split_hint
        arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        hints: dict[Any, Hint] = {**dict(enumerate(hint.args)), **hint.kwargs}
        parts = split(hints, arguments, len(self._streams), "arguments")
        results = self._run(([part.pop(i) for i in range(len(args))], part) for part in parts)
        if not self.concat_output:
            return results
        (output_hint,) = self.output_concat_hint.args or (self.output_concat_hint.kwargs,)
        return join(output_hint, results, "result")


class MultiStreamBenchmarkModule(_Streams):
    """Runs `model` in every stream with the same, whole inputs, to measure throughput; see `MultiStreamModule`."""

    def __init__(self, model: nn.Module, num_streams: int | str = "AUTO", cpu_pool: CPUPool | None = None) -> None:
        super().__init__(model, num_streams, cpu_pool)

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The result of every stream."""
        return self._run([(args, kwargs)] * len(self._streams))


def _make_streams(num_streams: int | str, cpu_pool: CPUPool) -> list[Stream]:
    cores = cpu_pool.core_ids
    if isinstance(num_streams, str) and num_streams.upper() == "AUTO":
        num_streams = get_default_num_streams(cpu_pool)
    if not isinstance(num_streams, int):
        raise TypeError(f'num_streams: expected "AUTO" or an int, got {num_streams!r}')
    if num_streams < 1:
        raise ValueError(f"num_streams: expected 1 or more, got {num_streams}")
    if num_streams > len(cores):
        warnings.warn(
            f"num_streams: {num_streams} is more than the cores of {cpu_pool}; using {len(cores)}", stacklevel=4
        )
    return [Stream(cores[start : start + length]) for start, length in shares(len(cores), num_streams)]
