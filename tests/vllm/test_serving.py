"""Processes of their own: two ranks of tensor parallelism, and the OpenAI server over HTTP."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import requests
import torch

from ipex_quant import llm, quantization
from ipex_quant.conversion.qconfig import get_weight_only_quant_qconfig_mapping
from ipex_quant.numerics.scheme import WoqLowpMode, WoqWeightDtype

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
PORT = 18_473
START_SECONDS = 400
LENGTH = 128
BLOCK = 32
BLOCKS = 10
"""Of the server's cache: two sequences of `LENGTH` tokens, so that more are preempted. One block is never used."""

TWO_RANKS = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=128, max_num_seqs=8,
              tensor_parallel_size=2)
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    print("RESULT", json.dumps([list(each.outputs[0].token_ids) for each in llm.generate(prompts, sampling)]))
"""
INT8 = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, lowp_mode=WoqLowpMode.INT8)


def environment(**more):
    return os.environ | ENVIRONMENT | more


@pytest.fixture(scope="module")
def gptq(tmp_path_factory, float_model, calibration, tokenizer):
    """Returns the directory of a GPTQ checkpoint with zero points, in act-order or not."""

    def make(act_order):
        directory = tmp_path_factory.mktemp("gptq") / "model"
        # Groups of 64 divide a rank's input features, 128 and 384.
        quantization.gptq(float_model(), calibration, group_size=64, act_order=act_order, save_dir=directory)
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        tokenizer.save_pretrained(directory)
        return directory

    return make


def run_two_ranks(directory, prompts, tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    return subprocess.run(
        [sys.executable, str(script), str(directory), json.dumps(prompts)],
        env=environment(VLLM_CPU_OMP_THREADS_BIND="0|0"),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )


def test_two_ranks(gptq, check_tokens, prompts, tmp_path):
    directory = gptq(act_order=False)
    ran = run_two_ranks(directory, prompts, tmp_path)
    results = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, ran.stdout[-3000:] + ran.stderr[-3000:]
    check_tokens(llm.from_pretrained(directory, torch.bfloat16, INT8), prompts, json.loads(results[0][7:]))


def test_two_ranks_refuse_act_order(gptq, prompts, tmp_path):
    ran = run_two_ranks(gptq(act_order=True), prompts, tmp_path)
    assert ran.returncode != 0
    assert "act-order: a rank's input features would have parts of groups" in ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def server(gptq, tmp_path_factory):
    """Address of a running server, and its model's directory."""
    directory = gptq(act_order=False)
    command = [sys.executable, "-m", "ipex_quant.integrations.vllm.serve", str(directory)]
    options = ["--port", str(PORT), "--host", "127.0.0.1", "--dtype", "bfloat16", "--enforce-eager"]
    options += ["--max-model-len", str(LENGTH), "--max-num-seqs", "8", "--served-model-name", "tiny"]
    options += ["--block-size", str(BLOCK), "--num-gpu-blocks-override", str(BLOCKS)]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], env=environment(), stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{PORT}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(address):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield address, directory
    finally:
        process.terminate()
        process.wait(30)


def _answers(address):
    try:
        return requests.get(f"{address}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


def complete(address, prompt, **options):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": True} | options
    return requests.post(f"{address}/v1/completions", json=body, timeout=60)


def metric(address, name):
    """The sum of a metric of vLLM's over its labels."""
    lines = requests.get(f"{address}/metrics", timeout=60).text.splitlines()
    values = [float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{")]
    assert values, f"vLLM has no metric {name}"
    return sum(values)


def test_completion(server, check_tokens, prompts):
    address, directory = server
    texts = [complete(address, ids, return_token_ids=True).json()["choices"][0]["token_ids"] for ids in prompts]
    check_tokens(llm.from_pretrained(directory, torch.bfloat16, INT8), prompts, texts)


def test_chat_is_the_completion_of_its_template(server):
    address, _ = server
    body = {"model": "tiny", "messages": [{"role": "user", "content": "A class is"}], "max_tokens": 20}
    answer = requests.post(f"{address}/v1/chat/completions", json=body | {"temperature": 0}, timeout=60).json()
    text = complete(address, "A class is", ignore_eos=False).json()["choices"][0]["text"]
    assert answer["choices"][0]["message"]["content"] == text


def test_streaming_gives_the_same_text_in_pieces(server):
    address, _ = server
    body = {"model": "tiny", "prompt": "A class is", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    with requests.post(f"{address}/v1/completions", json=body | {"stream": True}, stream=True, timeout=60) as answer:
        lines = [line[6:] for line in answer.iter_lines(decode_unicode=True) if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
    assert len(pieces) > 5
    assert "".join(pieces) == complete(address, "A class is").json()["choices"][0]["text"]


def test_a_request_that_is_too_long_fails_alone(server, prompts):
    address, _ = server
    expected = [complete(address, ids).json()["choices"][0]["text"] for ids in prompts]
    results = {}

    def ask(key, prompt, tokens):
        results[key] = complete(address, prompt, max_tokens=tokens)

    calls = [(str(i), ids, 20) for i, ids in enumerate(prompts)] + [("long", [5] * (LENGTH + 1), 4)]
    threads = [threading.Thread(target=ask, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results["long"].status_code == 400
    assert str(LENGTH) in results["long"].text
    assert [results[str(i)].status_code for i in range(len(prompts))] == [200] * len(prompts)
    assert all(results[str(i)].json()["choices"][0]["text"] for i in range(len(prompts)))
    # After the failure, alone as before it.
    assert [complete(address, ids).json()["choices"][0]["text"] for ids in prompts] == expected


def test_preempted_sequences_go_on_as_if_alone(server, check_tokens, calibration):
    address, directory = server
    prompts = [text[0, start : start + 10 + 3 * start].tolist() for text in calibration for start in range(6)]
    before = metric(address, "num_preemptions_total")
    results = [None] * len(prompts)

    def ask(index):
        results[index] = complete(address, prompts[index], max_tokens=80, return_token_ids=True)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.status_code for result in results] == [200] * len(prompts)
    assert metric(address, "num_preemptions_total") - before > len(prompts) / 4
    found = [result.json()["choices"][0]["token_ids"] for result in results]
    assert all(len(tokens) == 80 for tokens in found)
    check_tokens(llm.from_pretrained(directory, torch.bfloat16, INT8), prompts, found)


def test_clients_that_hang_up_leave_their_places(server, prompts):
    address, _ = server
    expected = [complete(address, ids).json()["choices"][0]["text"] for ids in prompts]
    before = metric(address, "generation_tokens_total")
    tokens, clients = LENGTH - 20, 8
    for index in range(clients):
        body = {"model": "tiny", "prompt": prompts[index % len(prompts)], "max_tokens": tokens, "ignore_eos": True}
        with requests.post(
            f"{address}/v1/completions", json=body | {"stream": True}, stream=True, timeout=60
        ) as answer:
            assert next(answer.iter_lines())
    deadline = time.monotonic() + 60
    while metric(address, "num_requests_running") or metric(address, "num_requests_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert metric(address, "kv_cache_usage_perc") == 0
    assert metric(address, "generation_tokens_total") - before < clients * tokens
    assert [complete(address, ids).json()["choices"][0]["text"] for ids in prompts] == expected
