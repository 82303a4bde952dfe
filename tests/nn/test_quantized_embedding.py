import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ipex_quant.nn import QuantizedEmbedding, WeightOnlyQuantizedLinear
from ipex_quant.nn.embeddings import RowFactor, ScaledEmbedding
from ipex_quant.numerics import affine
from ipex_quant.quantization import WoqWeightDtype, get_weight_only_quant_qconfig_mapping

IDS = torch.tensor([[1, 0, 9], [4, 4, 2]])


def embedding(dtype=torch.float32, kind=nn.Embedding, **options):
    torch.manual_seed(0)
    module = kind(10, 24, padding_idx=0, dtype=dtype)
    options = {"weight_dtype": WoqWeightDtype.INT8, **options}
    module.qconfig = get_weight_only_quant_qconfig_mapping(**options).global_qconfig
    return module.eval()


@pytest.fixture
def module():
    return QuantizedEmbedding.from_float(embedding(group_size=8))


def tied_pair():
    source = embedding()
    head = nn.Linear(24, 10)
    head.weight, head.qconfig = source.weight, source.qconfig
    quantized, linear = QuantizedEmbedding.from_float(source), WeightOnlyQuantizedLinear.from_float(head)
    quantized.share(linear)
    return nn.ModuleDict({"embed": quantized, "head": linear})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", list(WoqWeightDtype))
def test_rows_are_those_of_the_dequantized_weight(dtype, weight_dtype):
    module = QuantizedEmbedding.from_float(embedding(dtype, weight_dtype=weight_dtype, group_size=8))
    assert module.weight.dtype == module(IDS).dtype == dtype
    assert torch.equal(module(IDS), affine.dequantize(module.quantized_weight(), dtype)[IDS])
    assert torch.equal(module(IDS), module.weight[IDS])


def test_a_float_embedding_is_matched_to_the_precision_of_int8():
    source = embedding()
    torch.testing.assert_close(QuantizedEmbedding.from_float(source)(IDS), source(IDS), rtol=0, atol=0.02)
    assert not QuantizedEmbedding.from_float(source)(IDS)[0, 1].any()  # padding stays zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [False, True])
def test_rows_are_multiplied_as_the_float_embedding_does(dtype, rounded):
    source = embedding(dtype, ScaledEmbedding)
    source.factor = RowFactor(640**0.5, rounded)
    module = QuantizedEmbedding.from_float(source)
    source.weight.data = module.weight.clone()
    assert torch.equal(module(IDS), source(IDS))
    back = module.dequantize()
    assert type(back) is ScaledEmbedding
    assert torch.equal(back(IDS), module(IDS))


def test_dequantize(module):
    back = module.dequantize()
    assert type(back) is nn.Embedding
    assert (back.padding_idx, back.training, back.weight.requires_grad) == (0, False, False)
    assert torch.equal(back(IDS), module(IDS))


def test_another_dtype(module):
    narrow = copy.deepcopy(module).to(torch.bfloat16)
    assert torch.equal(narrow(IDS), module(IDS).bfloat16())
    with pytest.raises(RuntimeError, match="packed for the CPU"):
        module.to("meta")


@pytest.mark.parametrize("ids", [[-1], [10]])
def test_an_id_out_of_range(module, ids):
    with pytest.raises(RuntimeError, match=r"expected values in 0\.\.9"):
        module(torch.tensor(ids))


def test_what_does_more_than_look_up_is_refused():
    source = embedding()
    source.max_norm = 1.0
    with pytest.raises(ValueError, match="max_norm"):
        QuantizedEmbedding.from_float(source)


def test_it_is_an_embedding_without_parameters(module):
    assert isinstance(module, nn.Embedding)
    assert not list(module.parameters())
    assert not list(module.children())
    assert module.nbytes == module.table.nbytes > 0
    assert "num_embeddings=10, embedding_dim=24, weight_dtype=int8" in repr(module)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: reloaded(m)])
def test_copies(module, copied):
    other = copied(module)
    assert torch.equal(other(IDS), module(IDS))
    assert other.padding_idx == 0


def reloaded(module):
    torch.save(module.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    other = QuantizedEmbedding.from_float(embedding(group_size=8).requires_grad_(False))
    other.weight.zero_()
    assert not other(IDS).any()
    other.load_state_dict(torch.load(buffer))
    return other


def test_a_state_dict_holds_plain_tensors_and_loads_whole_or_not_at_all(module):
    state = module.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "codes": (10, 24),
        "scales": (10, 3),
        "zero_points": (10, 3),
    }
    with pytest.raises(RuntimeError, match="loads whole or not at all"):
        module.load_state_dict({name: state[name] for name in ("codes", "scales")})


def test_a_tied_pair_holds_one_weight_also_when_copied_loaded_or_written():
    pair = tied_pair()
    assert pair.embed.table is pair.head
    assert (pair.embed.nbytes, pair.head.nbytes) == (0, pair.head._packed.nbytes + pair.head._bias.nbytes)
    for other in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert other.embed.table is other.head is not pair.head
        other.embed.weight.zero_()
        assert not other.head.weight.any()
        other.load_state_dict(pair.state_dict())
        assert other.embed.table is other.head
        assert torch.equal(other.embed(IDS), pair.embed(IDS))
        assert torch.equal(other.head(torch.ones(1, 24)), pair.head(torch.ones(1, 24)))


def test_a_table_of_another_shape_is_not_shared(module):
    with pytest.raises(ValueError, match=r"table: expected shape \[10, 24\], got \[10, 16\]"):
        module.share(WeightOnlyQuantizedLinear(16, 10))


@pytest.mark.parametrize("shared", [False, True])
def test_compiled_without_graph_breaks(module, shared):
    module = tied_pair().embed if shared else module
    module.factor = RowFactor(3.5, True)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(IDS), module(IDS))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced(module):
    traced = torch.jit.freeze(torch.jit.trace(module, (IDS,)).eval())
    torch.jit.save(traced, buffer := io.BytesIO())
    buffer.seek(0)
    other = torch.arange(8)
    assert torch.equal(torch.jit.load(buffer)(other), module(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding_idx": 10}, r"padding_idx: expected null or 0\.\.9"),
        ({"padding_idx": True}, "padding_idx"),
        ({"factor": float("nan")}, "factor: expected a finite number"),
        ({"factor": "2"}, "factor: expected a finite number"),
        ({"rounds_factor": 1}, "rounds_factor: expected true or false"),
        ({"group_size": 3}, "power of 2"),
    ],
)
def test_a_saved_entry_is_checked(module, change, message):
    entry = {"kind": "embedding", **module.describe()}
    QuantizedEmbedding.placeholder(embedding(), entry)
    with pytest.raises(ValueError, match=message):
        QuantizedEmbedding.placeholder(embedding(), {**entry, **change})


def test_a_placeholder_is_for_an_embedding(module):
    with pytest.raises(ValueError, match=r"expected an nn\.Embedding, got a Linear"):
        QuantizedEmbedding.placeholder(nn.Linear(24, 10), module.describe())
