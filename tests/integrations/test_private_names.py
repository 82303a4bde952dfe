"""What ipex_quant uses of other packages beyond their interface: an upgrade that changes it fails here, by name."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ipex_quant

USED = {
    # path of a name, where "()" makes an instance: parameters of what is called or overridden, None for other names
    "argparse._ActionsContainer": None,
    "lm_eval.__main__": None,
    "neural_compressor.common.base_config.BaseConfig._post_init": "self",
    "os._exit": None,
    "torch._C._disabled_torch_function_impl": None,
    "torch._check": "cond message",
    "torch._C._are_functorch_transforms_active": None,
    "torch._C._jit_set_autocast_mode": None,
    "torch._C._verbose.mkldnn_set_verbose": None,
    "torch._assert": "condition message",
    "torch._dynamo": None,
    "torch._dynamo.backends.registry._BACKENDS.pop": None,
    "torch._dynamo.backends.registry._COMPILER_FNS.pop": None,
    "torch._dynamo.backends.registry.register_backend": "compiler_fn name tags",
    "torch._foreach_copy_": None,
    "torch._fused_adagrad_": None,
    "torch._fused_adam_": None,
    "torch._fused_adamw_": None,
    "torch._fused_sgd_": None,
    "torch._inductor.compile_fx.compile_fx": None,
    "torch._inductor.exc.InvalidCxxCompiler": "compiler",
    "torch._inductor.list_mode_options": "mode dynamic",
    "torch._lazy_clone": None,
    "torch.cpu._is_amx_fp16_supported": "",
    "torch.cpu._is_amx_tile_supported": "",
    "torch.cpu._is_avx2_supported": "",
    "torch.cpu._is_avx512_bf16_supported": "",
    "torch.cpu._is_avx512_supported": "",
    "torch.cpu._is_vnni_supported": "",
    "torch.Tensor._make_wrapper_subclass": None,
    "torch.nn.Conv2d._conv_forward": "self input weight bias",
    "torch.nn.Module._apply": "self fn recurse",
    "torch.nn.Module._load_from_state_dict": (
        "self state_dict prefix local_metadata strict missing_keys unexpected_keys error_msgs"
    ),
    "torch.nn.Module._save_to_state_dict": "self destination prefix keep_vars",
    "torch.nn.Module()._backward_hooks": None,
    "torch.nn.Module()._buffers": None,
    "torch.nn.Module()._forward_hooks": None,
    "torch.nn.Module()._forward_hooks_always_called": None,
    "torch.nn.Module()._forward_hooks_with_kwargs": None,
    "torch.nn.Module()._forward_pre_hooks": None,
    "torch.nn.Module()._forward_pre_hooks_with_kwargs": None,
    "torch.nn.Module()._modules": None,
    "torch.nn.Module()._non_persistent_buffers_set": None,
    "torch.nn.Module()._parameters": None,
    "torch.nn.modules.conv._ConvNd": None,
    "torch.nn.LSTM._update_flat_weights": "self",
    "torch.ops.aten.add.Tensor._schema.arguments": None,
    "torch.ops.mkldnn._convolution_pointwise": None,
    "torch.ops.mkldnn._convolution_transpose_pointwise": None,
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": None,
    "torch.ops.mkldnn._is_mkldnn_fp16_supported": None,
    "torch.ops.mkldnn._linear_pointwise": None,
    "torch.ops.mkldnn._reorder_convolution_transpose_weight": None,
    "torch.ops.mkldnn._reorder_convolution_weight": None,
    "torch.ops.mkldnn._reorder_linear_weight": None,
    "torch.Tensor()._version": None,
    "torch.utils._python_dispatch.TorchDispatchMode.__torch_dispatch__": "self func types args kwargs",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack": "",
    "torch.utils._python_dispatch._pop_mode": "k",
    "torch.utils._python_dispatch._push_mode": "mode",
    "torch.utils._pytree.tree_any": "pred tree is_leaf",
    "torch.utils._pytree.tree_flatten": "tree is_leaf",
    "torch.utils._pytree.tree_leaves": "tree is_leaf",
    "torch.utils._pytree.tree_map": "func tree rests is_leaf",
    "torch.utils._pytree.tree_map_only": "type_or_types_or_pred func tree is_leaf",
    "torch.utils._pytree.tree_unflatten": "leaves treespec",
    "transformers.DynamicCache().layer_class_to_replicate": None,
    "transformers.DynamicCache().offloading": None,
    "transformers.GenerationMixin._prefill": "self input_ids generation_config model_kwargs is_first_iteration",
    "transformers.GenerationMixin._supports_default_dynamic_cache": "cls",
    "transformers.LlamaConfig()._attn_implementation": None,
    "transformers.PreTrainedModel._can_set_attn_implementation": "cls",
    "transformers.PreTrainedModel._keep_in_fp32_modules": None,
    "transformers.PreTrainedModel._keep_in_fp32_modules_strict": None,
    "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected": None,
    "transformers.PreTrainedModel._keys_to_ignore_on_save": None,
    "transformers.PreTrainedModel._supports_flash_attn": None,
    "transformers.PreTrainedModel._supports_sdpa": None,
    "transformers.PreTrainedModel._tied_weights_keys": None,
    "transformers.core_model_loading.WeightConverter": ("source_patterns target_patterns operations force_cpu"),
    "transformers.core_model_loading.WeightRenaming": "source_patterns target_patterns",
    "transformers.core_model_loading.rename_source_key": (
        "source_key weight_renamings weight_converters base_model_prefix meta_state_dict reverse"
    ),
    "transformers.core_model_loading.revert_weight_conversion": "model state_dict",
    "transformers.integrations.moe._default_apply_gate": "self gate_up_out",
    "transformers.quantizers.base.HfQuantizer._convert_model_for_quantization": "self model",
    "transformers.quantizers.base.HfQuantizer._dequantize": "self model dtype",
    "transformers.quantizers.base.HfQuantizer._process_model_after_weight_loading": "self model kwargs",
    "transformers.quantizers.base.HfQuantizer._process_model_before_weight_loading": "self model kwargs",
    "transformers.utils.output_capturing._active_collector.get": None,
    "vllm.model_executor.kernels.linear._POSSIBLE_INT8_KERNELS": None,
    "vllm.model_executor.kernels.linear._POSSIBLE_KERNELS": None,
    "vllm.model_executor.kernels.linear.MPLinearKernel._get_weight_params": "self layer",
    "vllm.model_executor.kernels.linear.Int8ScaledMMLinearKernel._get_layer_params": "self layer",
}
IN_SOURCE = {
    # attributes that transformers sets on objects of any class: the module whose code has the name
    "_apply_gate": "transformers.integrations.moe",
    "_weight_conversions": "transformers.core_model_loading",
    "_flat_weights_names": "torch.nn.modules.rnn",
    "_gradient_checkpointing_func": "transformers.modeling_utils",
    "_is_hf_initialized": "transformers.core_model_loading",
    "_cached_continuous_batching_manager": "transformers.generation.continuous_batching.continuous_api",
    "_device_mesh": "transformers.distributed.tensor_parallel",
    "_tp_size": "transformers.modeling_utils",
    "_request_lock": "transformers.generation.continuous_batching.continuous_api",
    "_request_counter": "transformers.generation.continuous_batching.continuous_api",
}
# Buffers that are registered under a composed name, and what named tuples document.
OWN = {"_down_bias", "_gate_up_bias", "_gate_up_packed", "_fields"}
ROOT = Path(ipex_quant.__file__).parent
OTHERS = ("argparse", "lm_eval", "neural_compressor", "torch", "transformers", "vllm")


def resolve(path: str) -> Any:
    """The object at a dotted path, whose first parts are a module."""
    package, *names = path.split(".")
    found = pytest.importorskip(package) if package in ("lm_eval", "neural_compressor", "vllm") else None
    found = importlib.import_module(package) if found is None else found
    for name in names:
        package += f".{name}"
        if inspect.ismodule(found) and not hasattr(found, name.removesuffix("()")):
            found = importlib.import_module(package)
            continue
        found = getattr(found, name.removesuffix("()"))
        if name.endswith("()"):
            found = found()
    return found


@pytest.mark.parametrize("path", USED)
def test_is_there_with_its_parameters(path: str) -> None:
    found = resolve(path)
    if USED[path] is not None:
        function = getattr(found, "__func__", found)  # of a class method, with the class
        assert " ".join(inspect.signature(function).parameters) == USED[path]


@pytest.mark.parametrize("name", IN_SOURCE)
def test_is_in_the_source(name: str) -> None:
    assert name in inspect.getsource(importlib.import_module(IN_SOURCE[name]))


# --------------------------------------------------------------------- that the list has all
def private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def defined(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines: functions, classes, fields of these, and what they assign to themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                targets = getattr(statement, "targets", [getattr(statement, "target", None)])
                yield from (target.id for target in targets if isinstance(target, ast.Name))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            yield node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("register_buffer", "setattr")):
            yield from (part.value for part in node.args if isinstance(part, ast.Constant))


def used(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Line, private name, and whether it is certainly another package's."""
    foreign = set()  # names that imports bind
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        names, certain = [], False
        if isinstance(node, ast.Attribute):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            certain = isinstance(root, ast.Name) and root.id in foreign
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names, certain = [*node.module.split("."), *(alias.name for alias in node.names)], True
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            names = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
        yield from ((node.lineno, name, certain) for name in names if private(name))


def unlisted(modules: dict[str, ast.Module]) -> list[str]:
    listed = {name for path in [*USED, *IN_SOURCE] for name in path.split(".")}
    own = {name for tree in modules.values() for name in defined(tree)} | OWN
    return [
        f"{path}:{line}: {name}"
        for path, tree in modules.items()
        for line, name, certain in used(tree)
        if name not in listed and (certain or name not in own)
    ]


def test_names_all_that_is_used() -> None:
    found = unlisted(trees())
    assert not found, "private names of other packages that this file does not list:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch\ntorch._new()", "_new"),
        ("from torch import nn\nclass A:\n    def _new(self):\n        return nn.Module._new(self)", "_new"),
        ("from torch._new import x", "_new"),
        ("from transformers import _new", "_new"),
        ("def f(x):\n    return x._new", "_new"),
        ("getattr(f(), '_new', None)", "_new"),
        ("class A:\n    def _own(self):\n        return self._own()", None),
        ("def f(x):\n    return x._buffers, x.__len__", None),
        ("from ._new import x", None),
    ],
)
def test_finds_names(code: str, name: str | None) -> None:
    assert [found.split(": ")[1] for found in unlisted({"a.py": ast.parse(code)})] == ([name] if name else [])


def test_names_nothing_that_is_not_used() -> None:
    text = "\n".join(path.read_text() for path in ROOT.rglob("*.py"))
    names = {path: path.split(".")[-1] for path in USED} | {name: name for name in IN_SOURCE}
    renamed = {
        "torch.ops.aten.add.Tensor._schema.arguments": "._schema",
        "transformers.integrations.moe._default_apply_gate": "_apply_gate",
        "transformers.utils.output_capturing._active_collector.get": "_active_collector",
    }
    assert not [path for path, name in names.items() if renamed.get(path, name) not in text]
