"""lm-evaluation-harness, on tasks in files of our own."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ipex_quant as ipex
from ipex_quant import data, evaluation
from ipex_quant.nn import QuantizedModule
from ipex_quant.recipes.apply import apply_recipe
from ipex_quant.recipes.recipe import load_recipe

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (package lm_eval) is not installed", exc_type=ImportError)

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from ipex_quant.integrations.lm_eval import Flips, IpexQuantLM, flips

FLOAT_DIR = data.embedded_model_dir()
PASSAGES = [passage for passage in data.held_out_text().split("\n\n") if 300 < len(passage) < 500][:5]
CHOICE = """
task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: passages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/passages.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A choice between the true end of a passage and those of two others, and the perplexity of passages."""
    folder = tmp_path_factory.mktemp("tasks")
    ends = [passage[150:] for passage in PASSAGES]
    choices = [
        {"context": passage[:150], "choices": [ends[i], ends[i - 1], ends[i - 2]], "answer": 0}
        for i, passage in enumerate(PASSAGES)
    ]
    for name, lines in (("choices", choices), ("passages", [{"text": passage} for passage in PASSAGES])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FLOAT_DIR, local_files_only=True)


def float_model(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(FLOAT_DIR, dtype=dtype, local_files_only=True).eval()


def scores(tasks, model, **arguments):
    found = simple_evaluate(
        model,
        model_args=arguments or None,
        tasks=["next_line", "passages"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    return {
        f"{task}/{name}": value
        for task, metrics in found.items()
        for name, value in metrics.items()
        if name.endswith(",none") and "stderr" not in name
    }


@pytest.fixture(scope="module")
def float_scores(tasks):
    return scores(tasks, "hf", pretrained=str(FLOAT_DIR), dtype="float32", device="cpu")


def test_a_float_model_scores_as_with_the_harness_own_backend(tasks, float_scores):
    ours = scores(tasks, "ipex_quant", pretrained=str(FLOAT_DIR), dtype="float32", batch_size=3)
    assert ours.keys() == float_scores.keys()
    assert len(ours) == 4
    assert 0 < float_scores["next_line/acc,none"] <= 1
    assert ours == pytest.approx(float_scores, rel=1e-5)


def test_perplexity_is_that_of_our_own_evaluation(tasks, tokenizer, float_scores):
    """The harness puts the first token before a text, and divides by bytes; every passage fits one window."""
    loss = size = 0
    for passage in PASSAGES:
        text = tokenizer.bos_token + passage
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"]) - 1
        loss += tokens * math.log(evaluation.perplexity(float_model(), tokenizer, text, 256))
        size += len(passage.encode())
    assert float_scores["passages/byte_perplexity,none"] == pytest.approx(math.exp(loss / size), rel=1e-5)


class Answers(LM):
    """Answers question i with choice ``answers[i]``."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def loglikelihood(self, requests):
        choices = len(requests) // len(self.answers)
        return [(-float(self.answers[i // choices] != i % choices), False) for i in range(len(requests))]

    def loglikelihood_rolling(self, requests):
        return [-1.0] * len(requests)

    def generate_until(self, requests):
        raise NotImplementedError


@pytest.fixture(scope="module")
def choice_folder(tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice")
    (folder / "choice.yaml").write_text((tasks / "choice.yaml").read_text())
    return folder


def test_flips_are_the_answers_that_change(choice_folder):
    found = flips(Answers([0, 0, 0, 1, 1]), Answers([0, 1, 0, 2, 0]), choice_folder)
    assert found == {"next_line": Flips(5, changed=3, lost=1, gained=1, reference_accuracy=0.6, accuracy=0.6)}
    found = flips(Answers([0, 0]), Answers([0, 1]), choice_folder, limit=2)
    assert found == {"next_line": Flips(2, changed=1, lost=1, gained=0, reference_accuracy=1.0, accuracy=0.5)}


def test_flips_are_of_choices_only(tasks, tmp_path):
    with pytest.raises(ValueError, match="passages: expected a multiple-choice task"):
        flips(Answers([0] * 5), Answers([0] * 5), tasks)
    with pytest.raises(ValueError, match="expected YAML files of lm-evaluation-harness' tasks, found none"):
        flips(Answers([0]), Answers([0]), tmp_path)


@pytest.fixture(scope="module")
def quantized():
    return apply_recipe(load_recipe("w4a8-g128"), float_model(torch.bfloat16))


def test_every_way_to_give_a_quantized_model_scores_the_same(tasks, tokenizer, quantized, float_scores, tmp_path):
    ipex.llm.save(quantized, tmp_path / "saved", tokenizer)
    found = [
        scores(tasks, "ipex_quant", pretrained=str(tmp_path / "saved")),
        scores(tasks, "ipex_quant", pretrained=str(FLOAT_DIR), recipe="w4a8-g128"),
        scores(tasks, IpexQuantLM(quantized)),
    ]
    assert found[0] == found[1] == found[2]
    perplexity = "passages/byte_perplexity,none"
    assert found[0][perplexity] != float_scores[perplexity]
    assert found[0][perplexity] == pytest.approx(float_scores[perplexity], rel=0.05)


def test_a_recipe_that_calibrates(tmp_path):
    (tmp_path / "text.txt").write_text(data.calibration_text()[:20000], encoding="utf-8")
    (tmp_path / "gptq.yaml").write_text("algorithm: gptq\nweight_dtype: int4\nsamples: 2\nsequence_length: 32\n")
    recipe, dataset = str(tmp_path / "gptq.yaml"), str(tmp_path / "text.txt")
    lm = IpexQuantLM(FLOAT_DIR, recipe=recipe, dataset=dataset)
    assert isinstance(lm.model.model.layers[0].mlp.up_proj, QuantizedModule)


def test_texts_are_generated(quantized, tokenizer):
    request = ("Return the", {"until": ["\n\n"], "max_gen_toks": 12})
    lm = IpexQuantLM(quantized)
    (text,) = lm.generate_until([Instance("generate_until", {}, request, 0)])
    inputs = tokenizer("Return the", return_tensors="pt")
    with torch.inference_mode():
        output = quantized.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == expected.split("\n\n")[0]


def test_the_harness_knows_the_model():
    assert get_model("ipex_quant") is IpexQuantLM


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pretrained": "no/such"}, ValueError, r"pretrained: expected a directory with a config\.json, got no/such"),
        ({"pretrained": FLOAT_DIR, "dtype": "int8"}, ValueError, "dtype: expected one of float32, bfloat16, float16"),
        ({"pretrained": FLOAT_DIR, "recipe": "w3"}, ValueError, "recipe: expected a file or one of"),
        ({"pretrained": FLOAT_DIR, "dataset": "x"}, ValueError, "dataset: it is what a recipe calibrates on"),
        ({"pretrained": torch.nn.Linear(2, 2)}, TypeError, "pretrained: expected a transformers model, got Linear"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        IpexQuantLM(**arguments)


def test_a_quantized_model_takes_no_recipe(quantized, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"recipe, .* for a directory with a float model, got a model in memory"):
        IpexQuantLM(quantized, recipe="w8a16")
    ipex.llm.save(quantized, tmp_path / "saved", tokenizer)
    with pytest.raises(ValueError, match=r"saved holds a quantized one"):
        IpexQuantLM(tmp_path / "saved", dtype="float32")
