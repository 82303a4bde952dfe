"""README and the pages of docs/: their code runs, one block after the other, and the names in them exist."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import ipex_quant as ipex
from ipex_quant import data, llm, quantization
from ipex_quant.nn import Int8Linear, QuantizedModule, WeightOnlyQuantizedLinear

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def run(page, names):
    """Run the blocks of `page`; the names that each leaves behind."""
    results = []
    for block in blocks_of(page):
        exec(compile(block, str(page), "exec"), names)
        results.append(dict(names))
    return results


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
    module = nn.ModuleDict({"body": nn.Linear(32, 32), "head": nn.Linear(32, 4)})
    return {"directory": "model", "input_ids": ids, "module": module, "small": small}


@pytest.mark.filterwarnings("ignore:source. the text gives")
def test_readme(names):
    woq, smooth, plain = run(README, names)
    assert isinstance(woq["model"].lm_head, WeightOnlyQuantizedLinear)
    assert isinstance(llm.load("quantized").lm_head, WeightOnlyQuantizedLinear)
    assert isinstance(smooth["int8_model"].lm_head, Int8Linear)
    assert isinstance(plain["quantized"]["body"], QuantizedModule)
    assert isinstance(plain["quantized"]["head"], nn.Linear)


@pytest.mark.filterwarnings("ignore:source. the text gives")
def test_start(names):
    quantization.gptq(names["small"], [names["input_ids"]], save_dir="model-gptq")
    woq, plain, smooth, gptq, tuning = run(DOCS / "index.md", names)
    assert isinstance(woq["same"].lm_head, WeightOnlyQuantizedLinear)
    assert isinstance(plain["quantized"]["body"], QuantizedModule)
    assert isinstance(plain["quantized"]["head"], nn.Linear)
    assert isinstance(gptq["model"].model.layers[0].mlp.up_proj, WeightOnlyQuantizedLinear)
    assert isinstance(tuning["tuned"].model.layers[0].mlp.up_proj, WeightOnlyQuantizedLinear)
    assert Path("report.html").stat().st_size > 1000
    deployed, converted = smooth["model"], smooth["int8_model"]
    assert isinstance(converted.lm_head, Int8Linear)
    assert isinstance(deployed.lm_head, Int8Linear)
    with torch.inference_mode():
        logits, expected = (model(names["input_ids"]).logits.float() for model in (deployed, converted))
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_explain(names, capsys):
    run(DOCS / "explain.md", names)
    header, *printed = capsys.readouterr().out.splitlines()
    (text,) = re.findall(r"^```text\n(.*?)^```", (DOCS / "explain.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    columns, *shown = text.splitlines()
    assert re.split(r"\s{2,}", columns) == re.split(r"\s{2,}", header)
    printed_names = {line.split()[0] for line in printed}
    rows = [line.split()[0] for line in shown if line.startswith(("model.", "lm_head", "norms", "attention"))]
    assert rows[0] == "model.embed_tokens"
    assert printed_names.issuperset(rows)


def test_serving(names):
    mapping = quantization.get_weight_only_quant_qconfig_mapping()
    llm.save(llm.optimize(names["small"], quantization_config=mapping), "DIR")
    (batch,) = run(DOCS / "serving.md", {"prompts": [[5, 6, 7], [8, 9]]})
    assert [bool(result.generated_tokens) for result in batch["results"].values()] == [True, True]


def test_every_page_with_code_is_run():
    assert {page.name for page in DOCS.rglob("*.md") if blocks_of(page)} == {
        "index.md",
        "explain.md",
        "migrating-from-ipex.md",
        "serving.md",
    }
    assert run(DOCS / "migrating-from-ipex.md", {})[0]["ipex"] is ipex


def test_the_names_that_the_migration_guide_gives_exist():
    text = (DOCS / "migrating-from-ipex.md").read_text(encoding="utf-8")
    here, missing = text.split("## What is not here")
    for name in sorted(set(re.findall(r"`ipex\.([\w.]+)", here))):
        found(name)
    for line in re.findall(r"^\| (`ipex[^|]*)\|", missing, flags=re.MULTILINE):
        for name in re.findall(r"`ipex\.([\w.]+)`", line):
            with pytest.raises(AttributeError):
                found(name)


def found(dotted):
    value = ipex
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def test_every_environment_variable_is_described():
    read = re.compile(r"""(?:getenv\(|environ\.get\(|environ\[)["'](\w+)["']""")
    sources = [path for folder in ("csrc", "ipex_quant") for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = (path.read_text(encoding="utf-8") for path in sources if path.suffix in (".py", ".cpp", ".h"))
    variables = {name for text in texts for name in read.findall(text)}
    assert "IPEX_QUANT_ISA" in variables
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    assert [name for name in variables if f"| `{name}` |" not in page] == []
