import pytest
import torch
from outliers import inject_outliers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ipex_quant import data, evaluation
from ipex_quant.quantization import calibration_dataloader

SAMPLES, SEQUENCE_LENGTH, TUNING_TOKENS = 16, 256, 2048


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(data.embedded_model_dir(), local_files_only=True)


@pytest.fixture(scope="session")
def batches(tokenizer, tmp_path_factory):
    """Calibration batches of the embedded model's kind of text."""
    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text(data.calibration_text(), encoding="utf-8")
    return list(calibration_dataloader(path, tokenizer, SAMPLES, SEQUENCE_LENGTH))


@pytest.fixture(scope="session")
def make_model():
    """Makes the embedded model, with the outliers of large models."""

    def make(outliers=True):
        model = AutoModelForCausalLM.from_pretrained(
            data.embedded_model_dir(), local_files_only=True, dtype=torch.float32
        ).eval()
        if outliers:
            inject_outliers(model, lambda: model(**model.dummy_inputs))
        return model

    return make


@pytest.fixture
def eval_func(tokenizer):
    """Negative perplexity on the beginning of the held-out text; counts its calls."""

    def evaluate(model):
        evaluate.calls += 1
        return -evaluation.perplexity(model, tokenizer, data.held_out_text(), SEQUENCE_LENGTH, TUNING_TOKENS)

    evaluate.calls = 0
    return evaluate


PLANTED = "model.layers.3.mlp.down_proj"


@pytest.fixture
def plant():
    """Gives one layer two large weights that cancel, for inputs that are equal: no smoothing mends such a layer."""

    def change(model):
        mlp = model.model.layers[3].mlp
        with torch.no_grad():
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight[1] = linear.weight[0]
            mlp.down_proj.weight[:, 0] += 2e4
            mlp.down_proj.weight[:, 1] -= 2e4
        return model

    return change
