"""A plugin of mypy that gives undeclared attributes of a `torch.nn.Module` the type Any.

torch declares them as ``Tensor | Module``, which is false for most attributes of other packages' modules.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Instance, Type, TypeOfAny, UnionType, get_proper_type

MODULE = "torch.nn.modules.module.Module"
UNDECLARED = {"torch._tensor.Tensor", MODULE}


class TorchPlugin(Plugin):
    """Handles attributes that only ``Module.__getattr__`` finds."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return _any_if_undeclared if fullname.startswith(f"{MODULE}.") else None


def _any_if_undeclared(context: AttributeContext) -> Type:
    declared = get_proper_type(context.default_attr_type)
    if not isinstance(declared, UnionType):
        return declared
    names = {item.type.fullname for item in map(get_proper_type, declared.items) if isinstance(item, Instance)}
    return AnyType(TypeOfAny.special_form) if names == UNDECLARED else declared


def plugin(version: str) -> type[Plugin]:
    """Entry point that mypy calls."""
    return TorchPlugin
