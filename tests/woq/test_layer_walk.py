import warnings

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from ipex_quant.nn.linears import weight_matrix
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.woq.auto_round import AutoRoundOptions
from ipex_quant.woq.auto_round_blocks import auto_round_blocks
from ipex_quant.woq.awq_blocks import awq_blocks
from ipex_quant.woq.gptq import GptqOptions, HessianAccumulator, quantize_weight
from ipex_quant.woq.gptq_blocks import quantize_blocks
from ipex_quant.woq.layer_walk import first_names
from ipex_quant.woq.rtn import rtn

SCHEME = WeightScheme(WoqWeightDtype.INT4, False, 16)


class Block(nn.Module):
    """Residual MLP with a dropout, an argument of its own each layer, and a tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32, bias=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, hidden, *, shift):
        inner = torch.relu(self.up(hidden)) * self.gate(hidden)
        return self.drop(hidden + self.down(inner) + shift), "aux"


class Model(nn.Module):
    def __init__(self, block=Block, layers=3) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(block() for _ in range(layers))
        self.head = nn.Linear(32, 64)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            hidden, aux = layer(hidden, shift=0.1 * i)
            assert aux == "aux"
        return self.head(hidden)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 64, (2, 20), generator=generator)} for _ in range(4)]


def _model(make=Model):
    torch.manual_seed(0)
    return make()


def _same_weight(left, right):
    return torch.equal(dequantize(left), dequantize(right))


def test_every_linear_sees_the_quantized_ones_before_it(batches):
    """Against the same walk written out by hand for this one model."""
    model = _model()
    found = quantize_blocks(model, batches, SCHEME)

    def quantize(linear, inputs, floats):
        seen = HessianAccumulator(linear.in_features)
        for x, y in zip(inputs, floats, strict=True):
            seen.add(x, y)
        qw = quantize_weight(linear.weight, seen.hessian, SCHEME, shift=seen.shift)
        return qw, [nn.functional.linear(x, dequantize(qw), linear.bias) for x in inputs], [linear(y) for y in floats]

    def inner(ups, gates):
        return [torch.relu(u) * g for u, g in zip(ups, gates, strict=True)]

    expected = {}
    with torch.no_grad():
        hidden = [model.embed(batch["input_ids"]) for batch in batches]
        floats = hidden
        for i, block in enumerate(model.layers):
            name = f"layers.{i}"
            expected[f"{name}.up"], *up = quantize(block.up, hidden, floats)
            expected[f"{name}.gate"], *gate = quantize(block.gate, hidden, floats)
            expected[f"{name}.down"], *down = quantize(block.down, *map(inner, up, gate))
            hidden, floats = (
                [h + d + 0.1 * i for h, d in zip(before, added, strict=True)]
                for before, added in zip((hidden, floats), down, strict=True)
            )
    assert found.keys() == expected.keys()
    for name, qw in expected.items():
        assert _same_weight(found[name], qw), name


def _state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _unchanged(model, state):
    current = model.state_dict()
    return current.keys() == state.keys() and all(torch.equal(state[name], current[name]) for name in state)


def test_the_model_comes_back_as_it_was(batches):
    model = _model().train()
    model.layers[1].eval()
    state, modes = _state(model), [module.training for module in model.modules()]
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    quantize_blocks(model, batches, SCHEME)
    assert _unchanged(model, state)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert [module.training for module in model.modules()] == modes
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class _FailsLater(Block):
    calls = 0

    def forward(self, hidden, *, shift):
        self.calls += shift > 0.1
        if self.calls > 1:  # the first time, the walk only looks which blocks are run
            raise OSError("disk full")
        return super().forward(hidden, shift=shift)


def test_the_model_comes_back_after_a_failure_too(batches):
    model = _model(lambda: Model(_FailsLater))
    state = _state(model)
    wrapped = model.layers[0].forward
    model.layers[0].forward = lambda *args, **kwargs: wrapped(*args, **kwargs)  # as accelerate does
    own = model.layers[0].forward
    with pytest.raises(OSError, match="disk full"):
        quantize_blocks(model, batches, SCHEME)
    assert _unchanged(model, state)
    assert model.layers[0].forward is own
    assert "forward" not in vars(model.layers[1])


def test_only_the_schemes_asked_for(batches):
    schemes = {"up": SCHEME, "down": WeightScheme(WoqWeightDtype.INT8, True)}
    model = _model()
    found = quantize_blocks(
        model, batches, lambda name: schemes.get(name.split(".")[-1]) if "layers.1" in name else None
    )
    assert {name: str(qw.scheme) for name, qw in found.items()} == {
        "layers.1.up": "int4 asym g16",
        "layers.1.down": "int8 sym per-channel",
    }


def test_masked_positions_do_not_count(batches):
    model = _model()
    padded = []
    for batch in batches:
        ids = torch.cat((torch.full((2, 5), 63), batch["input_ids"]), 1)
        mask = torch.cat((torch.zeros(2, 5), torch.ones(2, 20)), 1).long()
        padded.append({"input_ids": ids, "attention_mask": mask})
    plain, masked = quantize_blocks(model, batches, SCHEME), quantize_blocks(model, padded, SCHEME)
    assert _same_weight(plain["layers.0.up"], masked["layers.0.up"])
    unmasked = quantize_blocks(model, [{"input_ids": batch["input_ids"]} for batch in padded], SCHEME)
    assert not _same_weight(plain["layers.0.up"], unmasked["layers.0.up"])


class Experts(nn.Module):
    """Mixture of experts by token parity; with even tokens only, expert 1 stays idle, and expert 2 always."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32)) for _ in range(3))

    def forward(self, hidden, *, shift):
        odd = hidden[..., 0] > 0
        out = hidden.clone()
        for chosen, expert in zip((~odd, odd, torch.zeros_like(odd)), self.experts, strict=True):
            if chosen.any():
                out[chosen] += expert(hidden[chosen])
        return out, "aux"


def test_linears_that_no_sample_reaches_are_rounded_to_nearest(batches):
    model = _model(lambda: Model(Experts, 1))
    with pytest.warns(
        UserWarning, match=r"no calibration sample reached layers\.0\.experts\.2\.0, layers\.0\.experts\.2\.2;"
    ):
        found = quantize_blocks(model, batches, SCHEME)
    assert len(found) == 6
    for name, qw in found.items():
        linear = model.get_submodule(name)
        assert _same_weight(qw, rtn(linear.weight, SCHEME)) == ("experts.2." in name)


@pytest.mark.parametrize("algorithm", [quantize_blocks, awq_blocks, auto_round_blocks])
def test_channels_that_calibration_leaves_at_zero_are_told_once(algorithm, batches):
    model = _model()
    with torch.no_grad():
        model.layers[0].up.bias[:3] = -100  # ReLU gives 0
        model.layers[2].up.bias[5] = -100
    options = {auto_round_blocks: AutoRoundOptions(steps=1)}.get(algorithm)
    with pytest.warns(UserWarning, match="at zero") as warned:
        found = algorithm(model, batches, SCHEME, options)
    (message,) = [str(each.message) for each in warned if "at zero" in str(each.message)]
    assert "leaves 4 input channels of 2 layers at zero (layers.0.down: 3 of 48, layers.2.down: 1 of 48)" in message
    down = (found.weights if algorithm is awq_blocks else found)["layers.0.down"]
    if algorithm is quantize_blocks:
        changes = (dequantize(down) - model.layers[0].down.weight)[:, :3]
        clipped = 1.25 * down.scales[:, :1]  # a quarter of the range, and the rounding
        assert (changes.abs() <= clipped).all()


def test_long_lists_of_names_are_cut():
    assert first_names(["a", "b"]) == "a, b"
    assert first_names([str(i) for i in range(11)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


def test_an_expert_that_only_a_later_batch_reaches_is_calibrated():
    model = _model(lambda: Model(Experts, 1))
    odd = model.embed.weight[:, 0] > 0
    batches = [{"input_ids": tokens.nonzero().view(1, -1)} for tokens in (~odd, odd)]
    with pytest.warns(UserWarning, match=r"experts\.2\.0"):
        found = quantize_blocks(model, batches, SCHEME)
    name = "layers.0.experts.1.0"
    seen = HessianAccumulator(32)
    seen.add(model.embed(batches[1]["input_ids"]))
    assert _same_weight(found[name], quantize_weight(model.get_submodule(name).weight, seen.hessian, SCHEME))


class _Twice(Block):
    def forward(self, hidden, *, shift):
        return super().forward(super().forward(hidden, shift=shift)[0], shift=shift)


def test_a_linear_that_is_called_twice_sees_both_inputs(batches):
    model = _model(lambda: Model(_Twice, 1))
    found = quantize_blocks(model, batches, SCHEME)
    seen = HessianAccumulator(32)
    block = model.layers[0].eval()
    with torch.no_grad():
        for batch in batches:
            first = model.embed(batch["input_ids"])
            seen.add(first)
            seen.add(Block.forward(block, first, shift=0.0)[0])
    assert _same_weight(found["layers.0.up"], quantize_weight(block.up.weight, seen.hessian, SCHEME))


def test_a_pass_stops_at_the_linears_it_calibrates(batches):
    model, calls = _model(), []
    model.layers[0].down.register_forward_hook(lambda *_: calls.append(1))
    quantize_blocks(model, batches, SCHEME)
    # the order of blocks and that of calls, and the block's outputs, quantized and in float
    assert len(calls) == 2 + 2 * len(batches)


def test_corrected_layers_are_closer_to_the_float_model(batches):
    model = _tiny("llama")
    expected = [model(**batch).logits for batch in batches]
    errors = []
    for correction in (0.0, 1.0):
        found = quantize_blocks(model, batches, SCHEME, GptqOptions(correction=correction))
        changed = _tiny("llama")
        for name, weight in found.items():
            changed.get_submodule(name).weight.data = dequantize(weight)
        errors.append(
            sum(float((changed(**each).logits - y).norm()) for each, y in zip(batches, expected, strict=True))
        )
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_inputs_that_are_kept_save_runs_and_change_nothing(kind, batches, monkeypatch):
    model, runs = _tiny(kind), []
    model.register_forward_pre_hook(lambda *_: runs.append(len(runs)))
    found, counts = [], []
    for room in (0, 60_000, 1 << 28):  # none, the inputs of some batches, and of all
        monkeypatch.setattr("ipex_quant.woq.layer_walk._KEPT_BYTES", room)
        runs.clear()
        found.append(quantize_blocks(model, batches, SCHEME))
        counts.append(len(runs))
    assert counts[0] > counts[1] > counts[2]
    for other in found[1:]:
        assert all(torch.equal(dequantize(other[name]), dequantize(weight)) for name, weight in found[0].items())


def _tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=64,
                initializer_range=0.2,
            )
        )
    if kind == "opt":
        return OPTForCausalLM(
            OPTConfig(
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=64,
                word_embed_proj_dim=16,
                max_position_embeddings=32,
                init_std=0.2,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=1)
    )


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("kind", "linears"), [("llama", 14), ("opt", 12), ("gpt2", 8)])
def test_transformers_models(kind, linears, act_order, batches):
    model = _tiny(kind)
    state, use_cache = _state(model), model.config.use_cache
    found = quantize_blocks(model, batches, SCHEME, GptqOptions(act_order=act_order))
    assert len(found) == linears
    assert not any("head" in name or "project_" in name for name in found)
    assert _unchanged(model, state)
    assert model.config.use_cache == use_cache
    for name, qw in found.items():
        assert qw.shape == tuple(weight_matrix(model.get_submodule(name)).shape)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_the_models_output_is_closer_than_rounded_to_nearest(kind, batches):
    model = _tiny(kind).eval()
    found = quantize_blocks(model, batches, SCHEME)
    nearest = {name: rtn(weight_matrix(model.get_submodule(name)), SCHEME) for name in found}
    ids = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        exact = model(ids).logits
        errors = {}
        for kind_of, weights in (("gptq", found), ("rtn", nearest)):
            for name, qw in weights.items():
                weight_matrix(model.get_submodule(name)).copy_(dequantize(qw))
            errors[kind_of] = float((model(ids).logits - exact).norm())
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_linears_of_a_share_group_get_the_same_order(batches):
    found = quantize_blocks(_tiny("llama"), batches, SCHEME, GptqOptions(act_order=True, static_groups=False))
    attention = [found[f"model.layers.1.self_attn.{name}_proj"].g_idx for name in "qkv"]
    assert all(torch.equal(attention[0], g_idx) for g_idx in attention)
    assert not torch.equal(attention[0], found["model.layers.1.mlp.gate_proj"].g_idx)


def test_conv1d_weights_are_transposed_back(batches):
    model = _tiny("gpt2")
    linear = model.transformer.h[0].attn.c_attn
    assert isinstance(linear, Conv1D)
    found = quantize_blocks(model, batches, SCHEME)["transformer.h.0.attn.c_attn"]
    assert found.shape == (96, 32)
    torch.testing.assert_close(dequantize(found), linear.weight.detach().t(), rtol=0, atol=0.02)


def test_no_batches(batches):
    with pytest.raises(ValueError, match="at least one calibration batch"):
        quantize_blocks(_model(), [], SCHEME)


def test_blocks_that_are_not_called(batches):
    model = _model()
    model.forward = lambda input_ids: input_ids
    with pytest.raises(RuntimeError, match="Model did not call any of its transformer blocks"):
        quantize_blocks(model, batches, SCHEME)


def test_nothing_warns_when_all_is_well(batches):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_blocks(_model(), batches, SCHEME)
