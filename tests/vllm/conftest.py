"""Fixtures for vLLM in this process, beside this package's own `generate`; without vLLM there are no tests here."""

import copy
import gc
import importlib.util
import math
import os

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

# Before vLLM is imported: everything in one process, no network, no thread bound to a core.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
PROMPTS = ("The import statement", "def main(self, other):", "A class is", "The value of the expression is")
TOKENS = 20
CACHE_BYTES = 16 << 20


@pytest.fixture(scope="session", autouse=True)
def settings():
    """Settings of vLLM for the whole session; `test_serving.py` starts processes of its own."""
    os.environ.update(SETTINGS)


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    from ipex_quant.data import embedded_model_dir

    return AutoTokenizer.from_pretrained(embedded_model_dir())


@pytest.fixture(scope="session")
def float_model():
    """Returns a new embedded model in bfloat16."""
    from transformers import AutoModelForCausalLM

    from ipex_quant.data import embedded_model_dir

    return lambda: AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def calibration(tokenizer):
    """Batches of text."""
    from ipex_quant.data import calibration_text

    ids = tokenizer(calibration_text()[:20_000], return_tensors="pt").input_ids
    return list(ids[:, : 4 * 128].reshape(4, 1, 128))


@pytest.fixture(scope="session")
def int8_model(float_model, calibration):
    """`int8_model(kind)`: the embedded model in W8A8, its activations "static", "smoothed" before, or "dynamic"."""
    from ipex_quant import llm, quantization

    def make(kind):
        if kind == "dynamic":
            chosen = copy.deepcopy(quantization.default_dynamic_qconfig_mapping)
            chosen.set_module_name("lm_head", None)  # vLLM reads no W8A8 output layer of compressed-tensors
            return llm.optimize(float_model().eval(), dtype=torch.bfloat16, quantization_config=chosen)
        mappings = {
            "static": quantization.default_static_qconfig_mapping,
            "smoothed": quantization.get_smooth_quant_qconfig_mapping(),
        }
        model = float_model().float().eval()
        prepared = quantization.prepare(model, mappings[kind], example_inputs=calibration[0], inplace=True)
        with torch.no_grad():
            for batch in calibration:
                prepared(batch)
        return llm.optimize(quantization.convert(prepared), dtype=torch.bfloat16)

    return make


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Token ids of some texts of different lengths."""
    return [tokenizer(text).input_ids for text in PROMPTS]


@pytest.fixture
def generate_in_vllm():
    """`generate_in_vllm(directory, prompts, **options)`: the token ids that vLLM adds greedily to each prompt."""

    def generate(directory, prompts, tokens=TOKENS, **options):
        from vllm import LLM, SamplingParams
        from vllm.distributed import cleanup_dist_env_and_memory

        defaults = {
            "dtype": "bfloat16",
            "enforce_eager": True,
            "max_model_len": 128,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": CACHE_BYTES,
        }
        llm = LLM(str(directory), **(defaults | options))
        try:
            sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            results = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
            return [list(result.outputs[0].token_ids) for result in results]
        finally:
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()

    return generate


@pytest.fixture
def check_tokens():
    """`check_tokens(model, prompts, found)`: `found` is what `model` adds to each prompt, but for ties."""

    def check(model, prompts, found):
        assert len(found) == len(prompts)
        forks = 0
        for prompt, tokens in zip(prompts, found, strict=True):
            own = model.generate(torch.tensor([prompt]), max_new_tokens=len(tokens), do_sample=False, eos_token_id=-1)
            own = own[0, len(prompt) :].tolist()
            assert len(own) == len(tokens)
            same = next((i for i, (one, other) in enumerate(zip(own, tokens, strict=True)) if one != other), None)
            if same is not None:
                forks += 1
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + own[:same]])).logits[0, -1].float()
                best, other = logits[own[same]].item(), logits[tokens[same]].item()
                ulp = 2.0 ** (math.floor(math.log2(abs(best))) - 7)
                assert best - other <= 2 * ulp, f"{own} became {tokens} where the logits are {best} and {other}"
        assert forks < len(prompts), "no prompt gives the same tokens"

    return check
