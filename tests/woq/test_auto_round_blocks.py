import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ipex_quant.nn.linears import weight_matrix
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.woq.auto_round import AutoRoundOptions
from ipex_quant.woq.auto_round_blocks import auto_round_blocks, merged_batches
from ipex_quant.woq.gptq import GptqOptions
from ipex_quant.woq.gptq_blocks import quantize_blocks
from ipex_quant.woq.rtn import rtn

SCHEME = WeightScheme(WoqWeightDtype.INT3, False, 16)
START = GptqOptions(refit=False)
FEW = AutoRoundOptions(steps=40, batch_size=2)


def _llama(layers=2, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (1, 48), generator=generator)} for _ in range(8)]


def _error(weights, batches):
    """Squared error of the last block's outputs with `weights`."""
    model, changed = _llama(), _llama()
    for name, weight in weights.items():
        changed.get_submodule(name).weight.data = dequantize(weight)
    outputs = []
    for each in (model, changed):
        each.model.layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
        with torch.no_grad():
            each(input_ids=torch.cat([batch["input_ids"] for batch in batches]))
    return float((outputs[0] - outputs[1]).square().sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [WoqWeightDtype.INT2, WoqWeightDtype.INT3, WoqWeightDtype.INT4])
def test_a_tuned_model_is_closer_than_gptqs_and_rounding_to_nearest(dtype, symmetric, batches):
    scheme, model = WeightScheme(dtype, symmetric, 16), _llama()
    tuned = auto_round_blocks(model, batches, scheme, AutoRoundOptions(steps=100, batch_size=2, rate=0.01))
    gptq = quantize_blocks(model, batches, scheme, START)
    nearest = {name: rtn(weight_matrix(model.get_submodule(name)), scheme) for name in gptq}
    assert tuned.keys() == gptq.keys()
    error = _error(tuned, batches)
    assert error < 0.95 * _error(gptq, batches)
    assert error < 0.5 * _error(nearest, batches)


def test_what_tuning_makes_worse_stays_as_it_was(batches):
    options = AutoRoundOptions(steps=1, batch_size=8, rate=100.0)
    tuned, gptq = (
        auto_round_blocks(_llama(1), batches, SCHEME, options),
        quantize_blocks(_llama(1), batches, SCHEME, START),
    )
    assert all(torch.equal(tuned[name].codes, gptq[name].codes) for name in gptq)


def test_the_model_comes_back_as_it_was(batches):
    model = _llama(dtype=torch.bfloat16).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    model.model.norm.weight.grad = torch.ones(32, dtype=torch.bfloat16)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    auto_round_blocks(model, batches, SCHEME, AutoRoundOptions(steps=3))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["model.norm.weight"]
    assert model.training


def test_weights_of_conv1d_layers_are_tuned(batches):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 48, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).eval()
    found = auto_round_blocks(model, batches, SCHEME, AutoRoundOptions(steps=60, batch_size=2, rate=0.02))
    gptq = quantize_blocks(model, batches, SCHEME)
    changed = {name for name in gptq if not torch.equal(found[name].codes, gptq[name].codes)}
    assert changed >= {f"transformer.h.1.{part}" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    for name, weight in found.items():
        assert weight.shape == weight_matrix(model.get_submodule(name)).shape


def test_padding_does_not_count(batches):
    ids = torch.cat([batch["input_ids"] for batch in batches[:2]])
    mask = torch.ones_like(ids)
    mask[:, 30:] = 0

    def weights(filler):
        padded = torch.where(mask.bool(), ids, filler)
        return auto_round_blocks(_llama(), [{"input_ids": padded, "attention_mask": mask}], SCHEME, FEW)

    first, second = weights(3), weights(60)
    assert all(torch.equal(dequantize(first[name]), dequantize(second[name])) for name in first)


def _same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name].codes, right[name].codes) and torch.equal(left[name].scales, right[name].scales)
        for name in left
    )


def test_a_seed_gives_the_same_bits(batches):
    one, same, other = (
        auto_round_blocks(_llama(), batches, SCHEME, AutoRoundOptions(steps=30, batch_size=2, rate=0.02, seed=seed))
        for seed in (5, 5, 6)
    )
    assert _same(one, same)
    assert not _same(one, other)


class _InterruptedError(Exception):
    pass


def test_an_interrupted_run_goes_on_with_the_same_bits(batches, tmp_path):
    expected = auto_round_blocks(_llama(3), batches, SCHEME, FEW)
    model = _llama(3)

    def interrupt(*_):
        if torch.is_grad_enabled():
            raise _InterruptedError

    handle = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(_InterruptedError):
        auto_round_blocks(model, batches, SCHEME, FEW, tmp_path / "work")
    handle.remove()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["model.layers.0.safetensors"]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    tuned = []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, *_: tuned.append(module) if torch.is_grad_enabled() else None)
    assert _same(auto_round_blocks(model, batches, SCHEME, FEW, tmp_path / "work"), expected)
    assert set(tuned) == {*model.model.layers[1:]}


@pytest.mark.parametrize("change", ["options", "scheme", "weights", "data"])
def test_work_of_another_run_is_refused(change, batches, tmp_path):
    options = AutoRoundOptions(steps=2)
    auto_round_blocks(_llama(1), batches, SCHEME, options, tmp_path)
    model, scheme = _llama(1), SCHEME
    if change == "options":
        options = AutoRoundOptions(steps=3)
    elif change == "scheme":
        scheme = WeightScheme(WoqWeightDtype.INT3, True, 16)
    elif change == "weights":
        model.model.layers[0].mlp.up_proj.weight.data[3, 4] += 1
    else:
        batches = batches[1:]
    with pytest.raises(ValueError, match=r"work_dir: .*model.layers.0.safetensors is of another model, other data"):
        auto_round_blocks(model, batches, scheme, options, tmp_path)


def test_a_damaged_file_is_named(batches, tmp_path):
    options = AutoRoundOptions(steps=2)
    auto_round_blocks(_llama(1), batches, SCHEME, options, tmp_path)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    for damaged in (content[:-100], b"no tensors", b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"work_dir: .*model.layers.0.safetensors is damaged"):
            auto_round_blocks(_llama(1), batches, SCHEME, options, tmp_path)


def test_a_loss_that_is_not_finite_names_the_block(batches):
    model = _llama()
    model.model.layers[1].register_forward_hook(
        lambda module, args, output: output * torch.inf if output.requires_grad else output
    )
    with pytest.raises(RuntimeError, match=r"model.layers.1: the loss is (inf|nan); check"):
        auto_round_blocks(model, batches, SCHEME, FEW)


def test_linears_that_no_sample_reaches_are_rounded_to_nearest(batches):
    model = _llama(1)
    model.model.layers[0].mlp.extra = nn.Linear(32, 32)
    with pytest.warns(UserWarning, match="AutoRound: no calibration sample reached model.layers.0.mlp.extra"):
        found = auto_round_blocks(model, batches, SCHEME, AutoRoundOptions(steps=2))
    nearest = rtn(model.model.layers[0].mlp.extra.weight, SCHEME)
    assert torch.equal(found["model.layers.0.mlp.extra"].codes, nearest.codes)


def test_batches_that_fit_together_are_merged():
    def batch(rows, length, **more):
        return {"input_ids": torch.full((rows, length), rows), **more}

    merged = merged_batches([batch(1, 4), batch(1, 4), batch(2, 4), batch(1, 4)], 3)
    assert [each["input_ids"].tolist() for each in merged] == [[[1] * 4] * 2, [[2] * 4] * 2 + [[1] * 4]]
    for apart in (
        [batch(1, 4), batch(1, 5)],
        [batch(1, 4), batch(1, 4, attention_mask=torch.ones(1, 4))],
        [batch(1, 4, position_ids=torch.ones(3, 1, 4))] * 2,
        [batch(1, 4, use_cache=False)] * 2,
    ):
        assert merged_batches(apart, 8) == apart
