import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant.checkpoints import gptq_tensors, read_gptq
from ipex_quant.checkpoints.gptq import GptqFormat
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.numerics import affine
from ipex_quant.numerics.nibbles import unpack_nibbles
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ipex_quant.quantization import get_weight_only_quant_qconfig_mapping

SCHEME = WeightScheme(WoqWeightDtype.INT4, False, 32)
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}


def mapping(**options):
    return get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, **options)


def checkpoint_of(model, layers=("model.layers",)):
    """GPTQ tensors of the linear layers under `layers`, and everything else as it is."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(layers):
            qw = affine.quantize(state.pop(f"{name}.weight") * 0.5, SCHEME)  # not what the float model has
            state |= {f"{name}.{key}": value for key, value in gptq_tensors(qw, v2=False).items()}
    return state


def awq_tensors(qw):
    """``qweight``, ``qzeros`` and ``scales`` of an INT4 weight in AWQ's order of outputs."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(fields):
        words = (fields.long().unflatten(1, (-1, 8))[..., order] << torch.arange(0, 32, 4)).sum(-1)
        return torch.where(words >= 2**31, words - 2**32, words).int()

    codes, zeros = unpack_nibbles(qw.codes, qw.shape[1]).t(), qw.zero_points.t()
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": qw.scales.t().contiguous()}


def applied(model, state, config=CONFIG, **options):
    options = {"quantization_config": mapping(lowp_mode=WoqLowpMode.INT8), **options}
    return ipex.llm.optimize(model, low_precision_checkpoint=(state, config), **options)


@pytest.fixture
def state(llama):
    torch.manual_seed(3)
    return checkpoint_of(llama)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_layers_get_the_weights_of_the_checkpoint(llama, state, logits, inplace):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    optimized = applied(llama, state, inplace=inplace)
    assert (optimized is llama) == inplace
    layer = optimized.model.layers[1].mlp.up_proj
    assert layer.scheme == SCHEME
    assert (layer.lowp_mode, layer.act_quant_mode) == (WoqLowpMode.INT8, WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM)
    expected = affine.quantize(before["model.layers.1.mlp.up_proj.weight"] * 0.5, SCHEME)
    assert torch.equal(layer.quantized_weight().codes, expected.codes)
    assert torch.isfinite(logits(optimized)).all()
    if not inplace:
        for name, tensor in before.items():
            assert torch.equal(llama.state_dict()[name], tensor)
            assert llama.state_dict()[name].data_ptr() != optimized.state_dict().get(name, torch.empty(0)).data_ptr()


def test_a_layer_that_is_not_in_it_keeps_its_float_weight(llama, state):
    weight = llama.lm_head.weight.clone()
    del state["lm_head.weight"]
    optimized = applied(llama, state)
    assert torch.equal(optimized.lm_head.weight, weight)
    reasons = {row.module: row.reason for row in ipex.explain(optimized).rows}
    assert reasons["lm_head"] == "it is not quantized in the checkpoint"


def test_a_bias_comes_from_the_checkpoint_or_stays(make_model):
    model = make_model("opt")
    state = checkpoint_of(model, ("model.decoder.layers",))
    name = "model.decoder.layers.0.fc1.bias"
    state[name] = torch.arange(96.0)
    kept = state.pop("model.decoder.layers.0.fc2.bias")
    optimized = applied(model, state)
    assert torch.equal(optimized.model.decoder.layers[0].fc1.bias, torch.arange(96.0))
    assert torch.equal(optimized.model.decoder.layers[0].fc2.bias, kept)


def test_other_tensors_are_loaded(llama, state):
    state["model.norm.weight"] = torch.full((64,), 3.0, dtype=torch.float16)
    optimized = applied(llama, state)
    assert torch.equal(optimized.model.norm.weight, torch.full((64,), 3.0))


def test_a_model_without_weights_takes_all_from_the_checkpoint(llama, state, logits):
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(llama.config).eval()
    for name, buffer in llama.named_buffers():
        empty.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    optimized = applied(empty, state, inplace=True)
    assert torch.equal(logits(optimized), logits(applied(llama, state)))
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(llama.config).eval()
    del state["model.norm.weight"]
    with pytest.raises(ValueError, match=r"neither the model nor the checkpoint has values for .*model\.norm\.weight"):
        applied(empty, state, inplace=True)


def test_the_mapping_keeps_layers_in_float(llama, state):
    config = mapping().set_module_name("model.layers.0.mlp", None)
    state |= {"model.layers.0.mlp.up_proj.weight": llama.model.layers[0].mlp.up_proj.weight}
    optimized = applied(llama, state, quantization_config=config)
    assert type(optimized.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert isinstance(optimized.model.layers[1].mlp.up_proj, WeightOnlyQuantizedLinear)


def test_the_rest_can_be_quantized_afterwards(llama, state):
    optimized = ipex.llm.optimize(applied(llama, state), quantization_config=mapping(), inplace=True)
    assert isinstance(optimized.lm_head, WeightOnlyQuantizedLinear)


def test_a_directory(llama, state, tmp_path, logits):
    import json

    import safetensors.torch

    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "quantize_config.json").write_text(json.dumps(CONFIG))
    loaded = ipex.llm.utils.load_low_precision_checkpoint(tmp_path)
    optimized = ipex.llm.optimize(
        llama, quantization_config=mapping(lowp_mode=WoqLowpMode.INT8), low_precision_checkpoint=loaded
    )
    assert torch.equal(logits(optimized), logits(applied(llama, state)))


def test_layers_that_the_model_does_not_have_raise(llama, state):
    state |= {key.replace("layers.0", "layers.7"): value for key, value in state.items() if "layers.0" in key}
    with pytest.raises(ValueError, match=r"no place for 7 of 21 quantized layers, first \['model.layers.7"):
        applied(llama, state)


def test_a_tensor_of_another_shape_is_named(llama, state):
    state["model.layers.0.mlp.up_proj.qweight"] = state["model.layers.0.mlp.up_proj.qweight"][:-1]
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.qweight"):
        applied(llama, state)
    state = checkpoint_of(llama) | {"model.norm.weight": torch.ones(63)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected shape \[64\], the checkpoint has \[63\]"):
        applied(llama, state)


@pytest.mark.parametrize("left", [("scales", "qzeros", "g_idx"), ("scales", "qzeros"), ("scales",)])
def test_a_layer_without_its_weight_raises(llama, state, left):
    name = "model.layers.0.mlp.up_proj"
    for key in {"qweight", "scales", "qzeros", "g_idx"} - set(left):
        del state[f"{name}.{key}"]
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.mlp\.up_proj\.qweight.*: missing, the checkpoint holds only"
    ):
        applied(llama, state)


def test_desc_act_without_the_order_of_the_groups_raises(llama, state):
    config = CONFIG | {"desc_act": True}
    applied(llama, state, config)  # a stored g_idx is taken at its word
    state["model.layers.0.mlp.up_proj.g_idx"].zero_()
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj\.g_idx: all zero, .* desc_act"):
        applied(llama, state, config)
    applied(llama, state, config | {"static_groups": True})


def test_tensors_without_a_place_warn(llama, state):
    with pytest.warns(UserWarning, match=r"no place for 1 tensors of the checkpoint: \['model.extra'\]"):
        applied(llama, state | {"model.extra": torch.ones(2)})


def test_excluding_everything_raises(llama, state):
    with pytest.raises(ValueError, match="none of the 15 linear layers can be quantized"):
        applied(llama, state, quantization_config=mapping().set_global(None))


def test_awq(llama, state, logits):
    same = {}
    for name in [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]:
        tensors = {key: state[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
        stored = awq_tensors(read_gptq(tensors, 4, 32))
        same |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
    others = {name: t for name, t in state.items() if name.rpartition(".")[2] not in (*GptqFormat.keys, "g_idx")}
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    assert torch.equal(logits(applied(llama, same | others, awq)), logits(applied(llama, state)))
    with pytest.raises(ValueError, match=r"outputs of 1 activation functions by scales .first model.layers.0.mlp.act"):
        applied(llama, same | others | {"model.layers.0.mlp.act.scales": torch.ones(8)}, awq)
