import copy
import io
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ipex_quant.nn import WeightOnlyQuantizedExperts
from ipex_quant.nn.stacked_experts import (
    expert_gate,
    expert_weight,
    experts_obstacle,
    experts_shape,
    experts_weight_obstacle,
)
from ipex_quant.numerics import affine
from ipex_quant.numerics.quantized_stack import QuantizedStack
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ipex_quant.ops import ExpertGate, PostOp
from ipex_quant.quantization import get_weight_only_quant_qconfig_mapping

EXPERTS, HIDDEN, WIDTH = 4, 64, 40
SHAPE = (EXPERTS, HIDDEN, WIDTH)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def filled(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    module.config._experts_implementation = "eager"
    return module


def qwen(activation="silu"):
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS}
    return filled(Qwen3MoeExperts(transformers.Qwen3MoeConfig(**sizes, hidden_act=activation)))


def gpt_oss():
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_local_experts": EXPERTS}
    return filled(GptOssExperts(transformers.GptOssConfig(**sizes)))


def nemotron(activation="relu2"):
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "n_routed_experts": EXPERTS}
    return filled(NemotronHExperts(transformers.NemotronHConfig(**sizes, mlp_hidden_act=activation)))


def llama4(activation="silu", hidden=HIDDEN, width=WIDTH, experts=EXPERTS):
    sizes = {"hidden_size": hidden, "intermediate_size": width, "num_local_experts": experts}
    module = Llama4TextExperts(transformers.Llama4TextConfig(**sizes, hidden_act=activation))
    module.config = transformers.Llama4TextConfig(**sizes)
    return filled(module)


def quantized(module, **options):
    options = {"weight_dtype": WoqWeightDtype.INT4, "group_size": 32, **options}
    module.qconfig = get_weight_only_quant_qconfig_mapping(**options).global_qconfig
    return WeightOnlyQuantizedExperts.from_float(module)


def arguments(tokens=7, module=None):
    generator = torch.Generator().manual_seed(1)
    if isinstance(module, Llama4TextExperts):
        rows = torch.randn(EXPERTS, tokens, HIDDEN, generator=generator)
        rows[:2, 1:] = 0  # tokens that go elsewhere
        return (rows.view(-1, HIDDEN),)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    return x, torch.randint(0, EXPERTS, (tokens, 2), generator=generator), torch.rand(tokens, 2, generator=generator)


def dequantized(module, packed):
    """The float module with the quantized one's weights."""
    reference = copy.deepcopy(module)
    *gate, up, down = packed.dequantized_weight(torch.float32).split(WIDTH, dim=1)
    if isinstance(module, NemotronHExperts):
        reference.up_proj.data, reference.down_proj.data = up, down.transpose(1, 2)
        return reference
    (gate,) = gate
    if isinstance(module, Llama4TextExperts):
        reference.gate_up_proj.data, reference.down_proj.data = torch.cat((gate, up), 1).transpose(1, 2), down
    elif isinstance(module, GptOssExperts):
        reference.gate_up_proj.data = torch.stack((gate, up), 2).flatten(1, 2).transpose(1, 2)
        reference.down_proj.data = down
    else:
        reference.gate_up_proj.data, reference.down_proj.data = torch.cat((gate, up), 1), down.transpose(1, 2)
    return reference


MAKERS = [qwen, lambda: qwen("gelu"), lambda: qwen("gelu_pytorch_tanh"), gpt_oss, nemotron, llama4]
MAKERS += [lambda: nemotron("silu"), lambda: nemotron("relu"), lambda: llama4("gelu")]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [WoqWeightDtype.INT8, WoqWeightDtype.INT4, WoqWeightDtype.NF4])
def test_computes_what_its_weights_say(make, dtype):
    module = make()
    packed = quantized(module, weight_dtype=dtype)
    given = arguments(module=module)
    torch.testing.assert_close(packed(*given), dequantized(module, packed)(*given), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(packed(*given), module(*given), rtol=1e-4, atol=1e-3)


def test_every_expert_is_quantized_as_a_linear():
    module, scheme = gpt_oss(), WeightScheme(WoqWeightDtype.INT4, False, 32)
    packed = quantized(module)
    for projection in ("gate_up", "down"):
        stack = packed.quantized_stack(projection)
        for expert in range(EXPERTS):
            expected = affine.quantize(expert_weight(module, projection, expert), scheme)
            assert torch.equal(stack[expert].codes, expected.codes)
            assert torch.equal(stack[expert].zero_points, expected.zero_points)
    assert torch.equal(expert_weight(module, "gate_up", 1)[WIDTH + 3], module.gate_up_proj[1, :, 7])
    assert torch.equal(packed._gate_up_bias[1, WIDTH + 3], module.gate_up_proj_bias[1, 7])


def test_biases_of_zeros_are_dropped():
    module = gpt_oss()
    module.down_proj_bias.data.zero_()
    packed = quantized(module)
    assert packed._down_bias is None
    assert packed.describe()["bias"] == [True, False]


@pytest.mark.parametrize("change", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_equal_and_independent(change):
    module = quantized(gpt_oss(), lowp_mode=WoqLowpMode.INT8)
    other = change(module)
    assert torch.equal(other(*arguments()), module(*arguments()))
    assert other._gate_up_packed.data_ptr() != module._gate_up_packed.data_ptr()
    assert other.describe() == module.describe()


@pytest.mark.parametrize("act_order", [False, True])
def test_a_state_dict_brings_everything(act_order):
    module = quantized(gpt_oss())
    stacks = [module.quantized_stack(name) for name in ("gate_up", "down")]
    if act_order:
        orders = [torch.stack([torch.randperm(s.shape[2]) // 32 for _ in range(EXPERTS)]).int() for s in stacks]
        stacks = [
            QuantizedStack(s.codes, s.scales, s.zero_points, order, s.scheme, s.shape)
            for s, order in zip(stacks, orders, strict=True)
        ]
        biases = module._gate_up_bias, module._down_bias
        module = WeightOnlyQuantizedExperts.from_stacks(tuple(stacks), module.gate, biases)
    state = module.state_dict()
    other = WeightOnlyQuantizedExperts(SHAPE, module.gate, module.scheme)
    with pytest.raises(RuntimeError, match="has no weights yet"):
        other(*arguments())
    assert not other.state_dict()
    other.load_state_dict(state)
    assert ("gate_up_g_idx" in state) == act_order
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in state.items())
    assert torch.equal(other(*arguments()), module(*arguments()))
    for name in ("gate_up_codes", "down_scales", "down_bias"):
        with pytest.raises(RuntimeError, match=name):
            module.load_state_dict({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(RuntimeError, match=r"codes: expected shape \[4, 64, 20\], got \[3, 64, 20\]"):
        module.load_state_dict(state | {"down_codes": state["down_codes"][:3]})
    assert torch.equal(other(*arguments()), module(*arguments()))


def test_weight_is_gate_up_and_the_transpose_of_down():
    module = qwen()
    packed = quantized(module, weight_dtype=WoqWeightDtype.INT8)
    expected = torch.cat((module.gate_up_proj, module.down_proj.transpose(1, 2)), dim=1)
    assert packed.weight.shape == expected.shape == packed.weight_shape
    torch.testing.assert_close(packed.weight.clone(), expected, rtol=0, atol=0.01)
    assert packed.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert packed._gate_up_packed.dtype == torch.uint8


@pytest.mark.parametrize("make", [nemotron, llama4])
@pytest.mark.parametrize("change", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), "state dict"])
def test_copies_know_their_layout(make, change):
    module = make()
    packed, given = quantized(module), arguments(module=module)
    if change == "state dict":
        entry = packed.describe()
        place = WeightOnlyQuantizedExperts.placeholder(module, entry)
        for name, tensor in packed.state_dict().items():
            setattr(place, name, tensor)
        (other,) = WeightOnlyQuantizedExperts.from_placeholders([place])
    else:
        other = change(packed)
    assert torch.equal(other(*given), packed(*given))
    assert other.weight.shape == packed.weight.shape == (EXPERTS, (3 if make is llama4 else 2) * WIDTH, HIDDEN)
    assert other.gate == packed.gate


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_graph_traced_where_gradients_are_recorded_can_be_saved():
    packed = quantized(qwen())
    x, experts, weights = arguments()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(packed, (x.requires_grad_(), experts, weights)), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x, experts, weights), packed(x, experts, weights))


def test_rows_of_zeros_need_no_weights():
    """Llama 4's way of not choosing an expert; the result is the same whether they are skipped or not.

    Its bits may not be: fewer rows can take another kernel, which adds floats in another order.
    """
    packed = quantized(llama4())
    (rows,) = arguments(module=llama4())
    experts = torch.arange(EXPERTS).repeat_interleave(7)[:, None]
    result, whole = packed(rows), packed._run(rows, experts, torch.ones(len(rows), 1))
    torch.testing.assert_close(result, whole)
    assert not result.view(EXPERTS, 7, HIDDEN)[:2, 1:].any()
    assert not packed(torch.zeros_like(rows)).any()
    rows[3] = torch.nan
    assert packed(rows)[3].isnan().all()


def test_autocast():
    packed = quantized(qwen())
    with torch.autocast("cpu", torch.bfloat16):
        result = packed(*arguments())
    x, *routing = arguments()
    assert torch.equal(result, packed(x.bfloat16(), *routing))


def test_a_move_off_the_cpu_raises():
    with pytest.raises(RuntimeError, match="packed for the CPU"):
        quantized(qwen()).to("meta")


def test_stacks_that_do_not_fit_raise():
    module = quantized(qwen())
    stacks = module.quantized_stack("gate_up"), module.quantized_stack("down")
    with pytest.raises(ValueError, match=r"gate_up, down: expected int4 asym g32 of shapes"):
        WeightOnlyQuantizedExperts.from_stacks((stacks[1], stacks[1]), module.gate)
    with pytest.raises(ValueError, match=r"down_bias: expected shape \[4, 64\], got \[64\]"):
        WeightOnlyQuantizedExperts.from_stacks(stacks, module.gate, (None, torch.zeros(64)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_order": True}, "act_order: expected two of true or false"),
        ({"bias": [True, "no"]}, "bias: expected two of true or false"),
        ({"weight_dtype": "int7"}, "expected one of"),
        ({"lowp_mode": "int8"}, "lowp_mode int8 quantizes activations"),
    ],
)
def test_a_damaged_entry_raises(change, message):
    entry = quantized(qwen()).describe() | change
    with pytest.raises(ValueError, match=message):
        WeightOnlyQuantizedExperts.placeholder(qwen(), entry)


def test_a_placeholder_needs_experts():
    entry = quantized(qwen()).describe()
    with pytest.raises(ValueError, match="got a Linear: it holds no experts"):
        WeightOnlyQuantizedExperts.placeholder(nn.Linear(2, 2), entry)


class TestStructure:
    def test_known_gates(self):
        gates = {"silu": PostOp.SILU, "gelu": PostOp.GELU, "gelu_pytorch_tanh": PostOp.NEW_GELU}
        for name, activation in gates.items():
            assert expert_gate(qwen(name)) == ExpertGate(activation)
        assert expert_gate(gpt_oss()) == ExpertGate(PostOp.SILU, (7.0, 1.702, 1.0))
        assert expert_gate(qwen("relu")) is None

    def test_gates_of_experts_without_one(self):
        for name, activation in {"relu2": PostOp.RELU2, "relu": PostOp.RELU, "silu": PostOp.SILU}.items():
            assert expert_gate(nemotron(name)) == ExpertGate(activation, gated=False)

    @pytest.mark.parametrize("sizes", [(64, 40, 4), (64, 64, 4), (64, 32, 4), (8, 4, 8), (4, 16, 4), (12, 8, 16)])
    def test_batched_experts_of_any_sizes(self, sizes):
        hidden, width, experts = sizes
        module = llama4("gelu", hidden, width, experts)
        assert expert_gate(module) == ExpertGate(PostOp.GELU)
        assert experts_shape(module) == (experts, hidden, width)

    def test_shapes(self):
        assert experts_shape(qwen()) == experts_shape(gpt_oss()) == SHAPE

    def test_what_cannot_be_replaced(self):
        assert experts_obstacle(qwen()) is None
        assert experts_obstacle(gpt_oss()) is None
        assert experts_obstacle(nemotron()) is None
        assert experts_obstacle(llama4()) is None
        assert experts_obstacle(nemotron("tanh")) == "the activation of its experts has no kernel"
        assert experts_obstacle(llama4("tanh")) == "Llama4TextExperts does not tell how its experts are laid out"
        module = qwen()
        module.has_post_expert_norm = True
        assert experts_obstacle(module) == "its experts have a norm"
        module = nn.Module()
        module.weights = nn.Parameter(torch.ones(2, 3, 4))
        assert experts_obstacle(module) == "Module does not tell how its experts are laid out"
        module = qwen()
        module.scale = nn.Parameter(torch.ones(1))
        assert experts_obstacle(module) == "the parameters of its experts are none that are known"

    def test_what_cannot_be_quantized(self):
        assert experts_weight_obstacle(qwen()) is None
        assert "float64" in experts_weight_obstacle(qwen().double())
        assert "meta" in experts_weight_obstacle(qwen().to("meta"))

    def test_modes_are_the_qconfigs(self):
        packed = quantized(qwen(), lowp_mode=WoqLowpMode.INT8, act_quant_mode=WoqActQuantMode.PER_BATCH)
        described = packed.describe()
        assert (described["lowp_mode"], described["act_quant_mode"]) == ("int8", "per_batch")
        assert "scheme=int4 asym g32, lowp_mode=int8, act_quant_mode=per_batch" in repr(packed)
