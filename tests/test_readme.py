"""README's Python is run as it stands there, one block after the other."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ipex_quant import data, llm, quantization
from ipex_quant.nn import Int8Linear, QuantizedModule, WeightOnlyQuantizedLinear

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the blocks take for granted, in a directory of their own: a small model, its text, a GPTQ checkpoint."""
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(data.embedded_model_dir(), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(data.embedded_model_dir(), local_files_only=True)
    small = type(model)(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 1})).eval()
    small.load_state_dict(model.state_dict(), strict=False)
    small.save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("text.txt").write_text(data.calibration_text()[:100_000], encoding="utf-8")
    ids = tokenizer("The following statement", return_tensors="pt")["input_ids"]
    quantization.gptq(small, [ids], save_dir="model-gptq")
    module = nn.ModuleDict({"body": nn.Linear(32, 32), "head": nn.Linear(32, 4)})
    return {"directory": "model", "input_ids": ids, "module": module}


@pytest.mark.filterwarnings("ignore:source. the text gives")
def test_the_python_in_readme_runs(names):
    results = []
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
        results.append({name: names.get(name) for name in ("model", "quantized", "int8_model", "tuned")})
    assert len(results) == 5
    woq, plain, gptq, smooth, tuning = results
    assert isinstance(woq["model"].lm_head, WeightOnlyQuantizedLinear)
    assert isinstance(llm.load("quantized").lm_head, WeightOnlyQuantizedLinear)
    assert isinstance(plain["quantized"]["body"], QuantizedModule)
    assert isinstance(plain["quantized"]["head"], nn.Linear)
    assert isinstance(gptq["model"].model.layers[0].mlp.up_proj, WeightOnlyQuantizedLinear)
    assert isinstance(tuning["tuned"].model.layers[0].mlp.up_proj, WeightOnlyQuantizedLinear)
    assert Path("report.html").stat().st_size > 1000
    deployed, converted = smooth["model"], smooth["int8_model"]
    assert isinstance(converted.lm_head, Int8Linear)
    assert isinstance(deployed.lm_head, Int8Linear)
    ids = names["input_ids"]
    with torch.inference_mode():
        logits, expected = deployed(ids).logits.float(), converted(ids).logits.float()
    assert (logits - expected).norm() < 0.05 * expected.norm()
