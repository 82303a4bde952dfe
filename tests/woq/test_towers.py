"""Models of several towers: which blocks there are, and what each sees of the towers before its own."""

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.woq.awq_blocks import awq_blocks
from ipex_quant.woq.gptq import HessianAccumulator, quantize_weight
from ipex_quant.woq.gptq_blocks import quantize_blocks
from ipex_quant.woq.towers import find_blocks, find_towers, holder, merged_order, patterns

SCHEME = WeightScheme(WoqWeightDtype.INT4, False, 16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, hidden):
        return hidden + torch.tanh(self.fc(hidden))


class Vision(nn.Module):
    """Its result has to do with what every block returns, each called `repeats` times in a row, and with a norm."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(32)
        self.repeats = repeats

    def forward(self, pixels):
        total, hidden = 0, pixels
        for block in self.blocks:
            for _ in range(self.repeats):
                hidden = block(hidden)
                total = total + hidden
        return self.norm(total)


class VisionAndText(nn.Module):
    def __init__(self, repeats: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(Block() for _ in range(2))  # the text's come first in the model, but run later
        self.vision = Vision(repeats)
        self.projector = nn.Linear(32, 32)
        self.head = nn.Linear(32, 64)

    def forward(self, input_ids, pixels=None):
        hidden = self.embed(input_ids)
        if pixels is not None:
            image = self.vision(pixels)
            image.mul_(2)  # who gets an output may write to it
            hidden = torch.cat((self.projector(image), hidden), 1)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def _batches(images):
    generator = torch.Generator().manual_seed(3)
    batches = []
    for with_image in images:
        batches.append({"input_ids": torch.randint(0, 64, (2, 20), generator=generator)})
        if with_image:
            batches[-1]["pixels"] = torch.randn(2, 9, 32, generator=generator)
    return batches


def _same_weight(left, right):
    return torch.equal(dequantize(left), dequantize(right))


def _expected(model, batches, found, name):
    """GPTQ of one linear with its inputs when those that run before it are what was found, and those in float."""
    linear = model.get_submodule(name)
    kept = {each: model.get_submodule(each).weight.data for each in found if each != name}

    def inputs():
        seen = []
        handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        return seen

    floats = inputs()
    for each in kept:
        model.get_submodule(each).weight.data = dequantize(found[each])
    seen = HessianAccumulator(linear.in_features)
    for x, y in zip(inputs(), floats, strict=True):
        seen.add(x, y)
    for each, data in kept.items():
        model.get_submodule(each).weight.data = data
    return quantize_weight(linear.weight, seen.hessian, SCHEME, shift=seen.shift)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("images", [[True, True], [False, True], [True, False]])
def test_blocks_see_what_the_quantized_towers_before_theirs_return(images, repeats):
    torch.manual_seed(0)
    model, batches = VisionAndText(repeats).eval(), _batches(images)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = quantize_blocks(model, batches, SCHEME)
    assert list(found) == [*(f"vision.blocks.{i}.fc" for i in range(3)), *(f"layers.{i}.fc" for i in range(2))]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())
    for name in ("layers.0.fc", "layers.1.fc", *(["vision.blocks.2.fc"] if repeats == 1 else [])):
        assert _same_weight(found[name], _expected(model, batches, found, name)), name


def test_awq_goes_through_all_towers_too():
    torch.manual_seed(0)
    found = awq_blocks(VisionAndText().eval(), _batches([True, False]), SCHEME).weights
    assert list(found) == [*(f"vision.blocks.{i}.fc" for i in range(3)), *(f"layers.{i}.fc" for i in range(2))]


def test_a_tower_that_no_batch_runs_is_left_out():
    found = quantize_blocks(VisionAndText().eval(), _batches([False]), SCHEME)
    assert list(found) == ["layers.0.fc", "layers.1.fc"]


def test_linears_outside_the_blocks_when_asked_for():
    torch.manual_seed(0)
    model, batches = VisionAndText().eval(), _batches([True, True])
    found = quantize_blocks(model, batches, SCHEME, also=["head", "projector"])
    assert list(found)[-4:] == ["projector", "layers.0.fc", "layers.1.fc", "head"]
    for name in ("projector", "layers.0.fc", "head"):
        assert _same_weight(found[name], _expected(model, batches, found, name)), name


def _t5():
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, float("norm" in name), 0.2)
    return model


def test_both_halves_of_an_encoder_decoder_model():
    model = _t5()
    ids = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": ids, "decoder_input_ids": ids[:, :10]}]
    found = quantize_blocks(model, batches, SCHEME)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".block." in name]
    assert found.keys() == set(linears)
    for name in ("decoder.block.0.layer.1.EncDecAttention.k", "decoder.block.1.layer.0.SelfAttention.q"):
        assert _same_weight(found[name], _expected(model, batches, found, name)), name


def test_towers_whose_outputs_are_written_to():
    """CLIP puts its projections into what the encoders return."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**sizes, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    batch = {"input_ids": torch.tensor([[1, 5, 7, 2], [1, 9, 3, 2]]), "pixel_values": torch.randn(2, 3, 16, 16)}
    found = quantize_blocks(model, [batch], SCHEME, also=["visual_projection"])
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    assert found.keys() == {*linears, "visual_projection"}
    for name in ("text_model.encoder.layers.1.mlp.fc1", "vision_model.encoder.layers.1.mlp.fc1", "visual_projection"):
        assert _same_weight(found[name], _expected(model, [batch], found, name)), name


def test_each_half_has_a_mask_of_its_own():
    """Padding, whatever it is, has no part in what the layers see: those of the decoder, and what it reads across."""
    model = _t5()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (4, 12), generator=generator)
    targets = torch.randint(3, 64, (4, 12), generator=generator)
    mask, target_mask = torch.ones_like(ids), torch.ones_like(ids)
    mask[:, 8:] = 0
    target_mask[:, 9:] = 0

    def weights(filler, length):
        padded = torch.where(mask.bool(), ids, filler), torch.where(target_mask.bool(), targets, filler)[:, :length]
        batch = {"input_ids": padded[0], "decoder_input_ids": padded[1], "attention_mask": mask}
        return quantize_blocks(model, [{**batch, "decoder_attention_mask": target_mask[:, :length]}], SCHEME)

    for length, names in ((12, ["encoder.block.0.layer.0.SelfAttention.q"]), (11, ["EncDecAttention.k"])):
        one, other = weights(3, length), weights(4, length)
        names += ["decoder.block.0.layer.0.SelfAttention.q"]
        compared = [name for name in one if any(part in name for part in names)]
        assert len(compared) > 1
        assert all(torch.equal(one[name].codes, other[name].codes) for name in compared)


def test_towers_are_the_outermost_lists_of_blocks():
    assert find_towers(_t5()).keys() == {"encoder.block", "decoder.block"}
    assert find_towers(VisionAndText()).keys() == {"layers", "vision.blocks"}
    assert find_blocks(_t5())[0] == "decoder.block"
    with pytest.raises(ValueError, match=r"Linear has no nn\.ModuleList of transformer blocks"):
        find_towers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ([["a", "b"], ["a", "b"]], "ab"),
        ([["c", "d"], ["a", "b", "c", "d"]], "abcd"),
        ([["a", "d"], ["a", "b", "c", "d"], ["d", "e"]], "abcde"),
        ([["a"], ["b"]], "ab"),
    ],
)
def test_batches_that_run_other_blocks_are_merged_into_one_order(sequences, expected):
    assert merged_order(sequences) == list(expected)


def test_what_holds_a_tower():
    order = ["model.visual.blocks.0", "model.visual.blocks.1", "model.text.layers.0", "side.0"]
    calls = [dict.fromkeys([*order, "model", "model.visual", "model.text"], 1)]
    assert holder("model.visual.blocks", order, calls) == "model.visual"  # `model` has blocks that run later
    assert holder("model.text.layers", order, calls) == "model"
    assert holder("side", order, calls) is None
    del calls[0]["model.visual"]  # a module that is only a name
    assert holder("model.visual.blocks", order, calls) is None


def test_names_of_alike_modules_become_one():
    names = [name for name, module in VisionAndText().named_modules() if isinstance(module, nn.Linear)]
    assert patterns(VisionAndText(), names) == ["layers.*.fc", "vision.blocks.*.fc", "projector", "head"]
