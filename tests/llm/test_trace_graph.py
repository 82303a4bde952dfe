"""`trace_graph`: graphs that are saved, loaded and generated with."""

import copy

import pytest
import torch

import ipex_quant as ipex
from ipex_quant.llm.cache.naming import CACHE
from ipex_quant.quantization import WoqWeightDtype, get_weight_only_quant_qconfig_mapping

from .conftest import build
from .test_convention import IDS, POSITIONS, empty_past, optimized

set_optimized = ipex._set_optimized_model_for_generation
PROMPTS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(4))
MASK = torch.ones_like(PROMPTS)
MASK[1, :3] = 0

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module", params=["llama", "opt"])
def pair(request, tmp_path_factory):
    """An optimized model, and the path of its saved graph."""
    path = tmp_path_factory.mktemp("graph") / "model.pt"
    with torch.no_grad():
        model = optimized(request.param)
        model.trace_graph.save(path)
    return model, path


def without_weights(model):
    """A model of the same kind on the meta device."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config)).eval()


@pytest.fixture
def loaded(pair):
    """A model without weights that computes with the saved graph."""
    model, path = pair
    empty = without_weights(model)
    assert set_optimized(empty, optimized_model=torch.jit.freeze(torch.jit.load(path).eval())) is empty
    return empty


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=["greedy", "beams", "sample"]
)
def test_generate_with_a_graph(pair, loaded, options):
    sequences = []
    for model in (pair[0], loaded):
        torch.manual_seed(0)
        sequences.append(model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, min_new_tokens=8, **options))
    assert torch.equal(*sequences)


def test_token_latency(loaded):
    loaded.config.token_latency = True
    tokens, seconds = loaded.generate(IDS, max_new_tokens=3, min_new_tokens=3)
    assert tokens.shape == (1, 12)
    assert len(seconds) == 3


def test_forward_with_a_graph(pair, loaded):
    expected = pair[0](IDS).logits
    torch.testing.assert_close(loaded(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    output = loaded(IDS[:, :5], torch.ones(1, 5), empty_past())
    torch.testing.assert_close(
        loaded(IDS[:, 5:], **{CACHE: output[CACHE]}, logits_to_keep=1).logits,
        expected[:, -1:],
        rtol=1e-4,
        atol=1e-4,
    )
    assert type(loaded(IDS, return_dict=False)) is tuple


def test_the_graph_itself(pair, loaded):
    arguments = IDS, torch.ones(1, 9), tuple(empty_past()), POSITIONS
    expected = pair[0](IDS).logits
    for graph in (pair[0].trace_graph, loaded.trace_graph):
        torch.testing.assert_close(graph(*arguments)[0], expected, rtol=1e-4, atol=1e-4)
    loaded.config.return_dict = False
    assert type(loaded.trace_graph(*arguments)) is tuple


def test_a_graph_of_its_own_for_the_first_token(pair):
    model, calls = pair[0], []

    def first(*arguments):
        calls.append("first")
        return model(*arguments)

    def other(*arguments):
        calls.append("other")
        return model(*arguments)

    empty = set_optimized(without_weights(model), other, first_token_optimized_model=first)
    tokens = empty.generate(IDS, max_new_tokens=3, min_new_tokens=3)
    assert torch.equal(tokens, model.generate(IDS, max_new_tokens=3, min_new_tokens=3))
    assert calls == ["first", "other", "other"]
    assert empty.trace_graph_first.graph is first


def test_deployment_mode():
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8)
    model = ipex.llm.optimize(build("llama"), quantization_config=mapping, deployment_mode=False)
    assert not hasattr(model, "trace_graph")
    static = ipex.quantization.default_static_qconfig_mapping
    assert not hasattr(ipex.llm.optimize(build("llama"), quantization_config=static), "trace_graph")
    optimized_model = ipex.llm.optimize(build("llama"), quantization_config=mapping)
    assert copy.deepcopy(optimized_model).trace_graph.model is not optimized_model


def test_what_cannot_be(tmp_path, pair):
    with pytest.raises(RuntimeError, match="not called with tuples"):
        optimized("t5").trace_graph.save(tmp_path / "t5.pt")
    with pytest.raises(TypeError, match="decoder-only"):
        set_optimized(build("t5"), pair[0])
    with pytest.raises(TypeError, match="expected a traced graph, got str"):
        set_optimized(build("llama"), "model.pt")
    model = set_optimized(build("llama"), optimized("llama"))
    with pytest.raises(RuntimeError, match="only TorchScript can be saved"):
        model.trace_graph.save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="not labels"):
        model(IDS, labels=IDS)
