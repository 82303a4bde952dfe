"""`verbose`: a line on standard output for every kernel that runs, oneDNN's and this package's."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .ops import isa_name

_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float8_e5m2: "f8_e5m2"}
_DTYPES |= {torch.int8: "s8", torch.uint8: "u8", torch.int16: "s16", torch.int32: "s32", torch.int64: "s64"}
"""Types as oneDNN writes them."""


class verbose:  # noqa: N801 (IPEX's name)
    """Context manager: print a line for every kernel that runs inside.

    - `VERBOSE_OFF`: none, also inside an outer one;
    - `VERBOSE_ON`: oneDNN's lines, in oneDNN's form, and for every call of a native op of this package
      ``ipex_quant_verbose,exec,cpu,<op>,<isa>,<inputs>,<outputs>,<milliseconds>``. Inputs and outputs are tensors as
      ``<shape>:<dtype>``, separated by spaces; a list of tensors is ``<count>*(<its first tensor>)``;
    - `VERBOSE_ON_CREATION`: oneDNN's lines for kernels that it makes, too.

    Lines for ops are those of this thread, of the streams of `ipex_quant.cpu.runtime` that it starts, and of what
    `torch.compile` made. oneDNN's are those of the process; after the outermost context there are none, whatever
    ``ONEDNN_VERBOSE`` says.

    Raises ValueError for another level.
    """

    VERBOSE_OFF: ClassVar[int] = 0
    VERBOSE_ON: ClassVar[int] = 1
    VERBOSE_ON_CREATION: ClassVar[int] = 2

    def __init__(self, level: int) -> None:
        if level not in (self.VERBOSE_OFF, self.VERBOSE_ON, self.VERBOSE_ON_CREATION):
            raise ValueError(
                f"level: expected verbose.VERBOSE_OFF (0), VERBOSE_ON (1) or VERBOSE_ON_CREATION (2), got {level!r}"
            )
        self.level = level
        self._outer: list[int | None] = []
        self._lines = _OpLines(isa_name())

    def __enter__(self) -> verbose:
        _set_onednn(self.level)
        outer = _level.get()
        self._outer.append(outer)
        _level.set(self.level)
        if outer is None:
            self._lines.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        outer = self._outer.pop()
        _level.set(outer)
        if outer is None:
            self._lines.__exit__(*exception)
        _set_onednn(verbose.VERBOSE_OFF if outer is None else outer)


VERBOSE_OFF = verbose.VERBOSE_OFF
VERBOSE_ON = verbose.VERBOSE_ON
VERBOSE_ON_CREATION = verbose.VERBOSE_ON_CREATION


_level: ContextVar[int | None] = ContextVar("_level", default=None)
"""The level of the innermost `verbose`; None outside of all."""


def _set_onednn(level: int) -> None:
    if not torch._C._verbose.mkldnn_set_verbose(level):
        raise RuntimeError(f"level: oneDNN does not take {level}")


class _OpLines(TorchDispatchMode):
    """Prints a line for every native op of this package that takes tensors, except at level `VERBOSE_OFF`."""

    def __init__(self, isa: str) -> None:
        super().__init__()
        self.isa = isa

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Models compile as if this mode were not there; what they compiled to runs in it."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((*args, *kwargs.values()))) if func.namespace == "ipex_quant" else []
        if not inputs or _level.get() == VERBOSE_OFF:
            return func(*args, **kwargs)
        start = time.perf_counter()
        result = func(*args, **kwargs)
        milliseconds = (time.perf_counter() - start) * 1e3
        outputs = _tensors(result if isinstance(result, (tuple, list)) else (result,))
        name = func.overloadpacket.__name__
        line = (
            f"ipex_quant_verbose,exec,cpu,{name},{self.isa},{' '.join(inputs)},{' '.join(outputs)},{milliseconds:.6g}"
        )
        sys.stdout.write(f"{line}\n")  # in one piece, beside other threads
        sys.stdout.flush()  # as oneDNN does, to keep the order
        return result


def _tensors(values: Sequence[Any]) -> Iterator[str]:
    """What a line says of the tensors, and lists of tensors, among the arguments or results of an op."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield _tensor(value)
        elif isinstance(value, (tuple, list)) and any(isinstance(item, torch.Tensor) for item in value):
            first = next(item for item in value if isinstance(item, torch.Tensor))
            yield f"{len(value)}*({_tensor(first)})"


def _tensor(tensor: torch.Tensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{shape}:{_DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix('torch.'))}"
