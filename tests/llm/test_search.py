"""IPEX's decoding functions: each is `generate` with one method of decoding."""

import pytest
import torch
from transformers import LogitsProcessorList, MaxLengthCriteria, MinLengthLogitsProcessor, StoppingCriteriaList

import ipex_quant as ipex

from .conftest import build

IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(5))
NEW = {"max_new_tokens": 4, "min_new_tokens": 4}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hf_greedy_search", {"do_sample": False}),
        ("hf_sample", {"do_sample": True}),
        ("hf_beam_search", {"do_sample": False, "num_beams": 3}),
        ("hf_beam_sample", {"do_sample": True, "num_beams": 3}),
    ],
)
def test_a_bound_function_generates(name, options):
    model = ipex.llm.optimize(build("llama"))
    method = getattr(ipex.llm.generation, name).__get__(model, type(model))
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    results = []
    for run, given in ((model.generate, options), (method, beams)):
        torch.manual_seed(0)
        results.append(run(IDS, **given, **NEW))
    assert torch.equal(*results)


def test_processors_and_criteria_by_position():
    model = build("llama")
    processors = LogitsProcessorList([MinLengthLogitsProcessor(10, 1)])
    criteria = StoppingCriteriaList([MaxLengthCriteria(10)])
    assert ipex.llm.generation.hf_greedy_search(model, IDS, processors, criteria).shape == (2, 10)


def test_errors():
    model = build("llama")
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ipex.llm.generation.hf_beam_search(model, IDS)
    with pytest.raises(ValueError, match="by position, got 4"):
        ipex.llm.generation.hf_sample(model, IDS, None, None, None, 5)
