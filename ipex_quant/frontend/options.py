"""`Options`: which optimizations `ipex_quant.optimize` makes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Options:
    """One flag for each optimization; the values here are those of level "O1"."""

    channels_last: bool = True  # these two are no arguments of `optimize`
    native_attention: bool = True

    conv_bn_folding: bool = True
    linear_bn_folding: bool = True
    weights_prepack: bool = True
    replace_dropout_with_identity: bool = True
    optimize_lstm: bool = True
    split_master_weight_for_bf16: bool = True
    fuse_update_step: bool = True
    auto_kernel_selection: bool = False
    graph_mode: bool = False
    concat_linear: bool = False

    @classmethod
    def of(cls, level: str, **explicit: bool | None) -> Options:
        """The flags of `level`, except those that are given and not None; RuntimeError for an unknown level."""
        if level not in ("O0", "O1"):
            raise RuntimeError(f"Unexpected optimization level {level}: expected 'O0' or 'O1'")
        base = cls() if level == "O1" else cls(**dict.fromkeys((field.name for field in fields(cls)), False))
        return replace(base, **{name: bool(value) for name, value in explicit.items() if value is not None})
