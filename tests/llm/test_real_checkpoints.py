"""Checkpoints that the formats' own tools wrote, and the logits of the float32 model with their weights.

The truth was made by formula, apart from this package and the tools: weights dequantized in float32, logits stored in
float16. `about.json` names the tool and the random model it quantized.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ipex_quant as ipex
import ipex_quant.llm.utils
from ipex_quant.checkpoints import find_gguf, open_gguf
from ipex_quant.checkpoints.registry import FORMATS
from ipex_quant.evaluation import model_bytes
from ipex_quant.llm.gguf import gguf_config
from ipex_quant.quantization import WoqWeightDtype, get_weight_only_quant_qconfig_mapping

DATA = Path(__file__).parent / "data"
NAMES = sorted(path.parent.name for path in DATA.glob("*/about.json"))

ROWS = (
    ("`ipex_quant`", "`llm.save`, `save_pretrained`", "all that is quantized here", "yes", ""),
    (
        "`gptq`",
        "GPTQ versions 1 and 2, act-order, `dynamic`, quantized head",
        "INT2, INT3, INT4, INT8",
        "yes",
        "",
    ),
    ("`gptq`", "GPTQModel's planes (`gptq_p`), 2 to 8 bits", "INT2 to INT6, INT8", "", ""),
    ("`gptq`", "neural-compressor: round-to-nearest, GPTQ, AWQ, NF4", "INT4, INT8, NF4", "", ""),
    ("`neural-compressor`", 'its layout "default" (`qconfig.json`)', "INT4, INT8, NF4", "", ""),
    ("`awq`", "AWQ `gemm`", "INT4", "yes", "autoawq_old"),
    ("`awq`", "AWQ `gemv`, `gemv_fast`, `llm-awq`", "INT4, with float minimums", "", ""),
    (
        "a GGUF file",
        "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4, F32, F16, BF16",
        "INT4, INT5, INT8, FP4, floats",
        "yes",
        "gguf_q5_0",
    ),
    ("a GGUF file", "Q2_K to Q6_K, IQ4_NL, IQ4_XS", "INT2 to INT6, IQ4, two-level scales", "yes", ""),
    ("`gguf`", "GPTQModel's: GGUF's blocks in safetensors", "as above", "", ""),
    ("`hqq`", "HQQ, 2 to 8 bits, `axis` 1", "INT2 to INT6, INT8, float minimums", "", ""),
    ("`quark`", "Quark: INT4, UINT4, INT8, UINT8, FP8, MXFP4", "INT4, INT8, FP8, FP4", "", ""),
    (
        "`auto-round`, `intel/auto-round`",
        "three packings, `extra_config`",
        "INT2, INT3, INT4, INT8",
        "",
        "ar_autoround_asym_g32",
    ),
    (
        "`compressed-tensors`",
        "`pack-quantized`, 2 to 8 bits, act-order",
        "INT2 to INT6, INT8",
        "yes",
        "ct_w4a16_actgroup",
    ),
    (
        "`compressed-tensors`",
        "`int-quantized`: W8A8 static and dynamic, W4A8",
        "INT8 with INT8 inputs; INT4",
        "W8A8",
        "",
    ),
    ("`compressed-tensors`", "`float-quantized`, `mxfp8-quantized`", "FP8", "`float-quantized`", ""),
    ("`compressed-tensors`", "`nvfp4-pack-quantized`, `mxfp4-pack-quantized`", "FP4", "yes", "ct_nvfp4a16"),
    ("`bitsandbytes`", "NF4, FP4, with double quantization; INT8", "NF4, BNB_FP4, INT8", "", "bnb_fp4"),
    ("`fp8`", "DeepSeek's blocks, stacked experts; GPTQModel's rows", "FP8", "", ""),
    ("`mxfp4`", "gpt-oss's experts", "FP4", "", ""),
    ("`torchao`", "INT8, INT4, float8 weight-only, dynamic INT8", "INT8, INT4, FP8", "", ""),
)
"""Method, what is read, what a weight becomes, what is written, and the checkpoint in `data` of it."""

CLOSE = {"rtol": 0, "atol": 4e-3}
"""Logits reach 6, where float16 has steps of 0.004; one wrong layer changes them by 0.3 and more."""


def from_directory(directory):
    return ipex.llm.from_pretrained(directory, dtype=torch.float32)


def into_a_float_model(directory):
    checkpoint = ipex.llm.utils.load_low_precision_checkpoint(directory)
    gguf = find_gguf(directory)
    config = gguf_config(open_gguf(gguf)) if gguf else transformers.AutoConfig.from_pretrained(directory)
    if not gguf:
        del config.quantization_config
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
    options = {"quantization_config": mapping, "low_precision_checkpoint": checkpoint, "inplace": True}
    return ipex.llm.optimize(model, dtype=torch.float32, **options)


def by_transformers(directory):
    try:
        ipex.llm.register_with_transformers()
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    finally:
        ipex.llm.unregister_from_transformers()
    assert not any(info.values())
    return model


WAYS = [
    *((name, way) for name in NAMES for way in (from_directory, into_a_float_model)),
    *((name, by_transformers) for name in NAMES if not find_gguf(DATA / name)),
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_logits_are_the_true_ones(name, way):
    truth = load_file(DATA / name / "truth.safetensors")
    model = way(DATA / name)
    with torch.inference_mode():
        logits = model(input_ids=truth["input_ids"].long()).logits
    torch.testing.assert_close(logits, truth["logits"].float(), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_is_saved_in_its_bytes_and_comes_back(name, tmp_path):
    model = from_directory(DATA / name)
    ipex.llm.save(model, tmp_path)
    assert sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values()) <= model_bytes(model)
    tokens = load_file(DATA / name / "truth.safetensors")["input_ids"].long()
    with torch.inference_mode():
        assert torch.equal(ipex.llm.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def test_each_names_its_producer():
    for name in NAMES:
        about = json.loads((DATA / name / "about.json").read_text())
        assert about.keys() == {"format", "producer", "base", "truth"}


def table():
    lines = ["| `quant_method` | read | codes | written | tested with |", "|---|---|---|---|---|"]
    for *row, name in ROWS:
        about = json.loads((DATA / name / "about.json").read_text()) if name else {"producer": "values by formula"}
        lines.append(f"| {' | '.join(row[:-1])} | {row[-1] or 'no'} | {about['producer']} |")
    return "\n".join(lines)


@pytest.mark.parametrize("page", ["README.md", "docs/checkpoints.md"])
def test_the_tables_of_formats(page):
    path = Path(__file__).parents[2] / page
    text = path.read_text(encoding="utf-8")
    made = re.sub(r"(<!-- formats -->\n).*?(<!-- end -->)", rf"\g<1>{table()}\n\g<2>", text, flags=re.DOTALL)
    if os.environ.get("UPDATE_TABLES"):
        path.write_text(made, encoding="utf-8")
    assert text == made, f"{page}: run this test with UPDATE_TABLES=1"


def test_the_table_has_all_formats_and_all_data():
    methods = {method for row in ROWS for method in re.findall(r"`([^`]+)`", row[0])}
    assert methods == {*FORMATS, "ipex_quant"}
    assert {row[-1] for row in ROWS if row[-1]} == set(NAMES)


def test_only_methods_that_are_read_can_be_registered():
    with pytest.raises(ValueError, match=r"methods: expected some of .*'gptq'.* got \['eetq'\]"):
        ipex.llm.register_with_transformers(["gptq", "eetq"])
