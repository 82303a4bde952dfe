import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant import cli, cli_serving, data
from ipex_quant.quantization import WoqWeightDtype

GGUF = Path(__file__).parent / "llm" / "data" / "gguf_q5_0" / "model.gguf"
PROMPT = "Return the"
TOKENS = 6

needs_server = pytest.mark.skipif(
    not all(find_spec(name) for name in cli_serving.NEEDED), reason="needs the packages of the extra `serving`"
)


@pytest.fixture(scope="module")
def quantized_dir(tmp_path_factory):
    """The embedded model in INT4 with a chat template, in float32 where batches make no ties."""
    folder = tmp_path_factory.mktemp("served") / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(data.embedded_model_dir(), local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(data.embedded_model_dir(), local_files_only=True)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    mapping = ipex.quantization.get_weight_only_quant_qconfig_mapping()
    ipex.llm.save(ipex.llm.optimize(model, dtype=torch.float32, quantization_config=mapping), folder, tokenizer)
    return folder


def commands_of(monkeypatch):
    """The arguments with which commands of transformers would run."""
    found = []
    monkeypatch.setattr(cli_serving, "_run", lambda command, name, arguments: found.append([name, *arguments]) or 0)
    return found


def install(monkeypatch, *names):
    monkeypatch.setattr(cli_serving, "_installed", lambda name: name in names)


def test_vllm_serves_where_it_is_installed(quantized_dir, monkeypatch, capsys):
    install(monkeypatch, "vllm")
    runs = []
    monkeypatch.setattr("os.execv", lambda path, arguments: runs.append((path, arguments)))
    cli.main(["serve", str(quantized_dir), "--port", "1234", "--trust-remote-code"])
    module = ["-m", "ipex_quant.integrations.vllm.serve", str(quantized_dir)]
    expected = [sys.executable, *module, "--port", "1234", "--trust-remote-code"]
    assert runs == [(sys.executable, expected)]
    assert "vLLM serves" in capsys.readouterr().out


@pytest.mark.parametrize("engine", [(), ("--engine", "transformers")])
def test_transformers_serves_otherwise(quantized_dir, monkeypatch, capsys, engine):
    install(monkeypatch, *cli_serving.NEEDED, *["vllm"] * len(engine))
    found = commands_of(monkeypatch)
    assert cli.main(["serve", str(quantized_dir), *engine, "--port", "1234"]) == 0
    assert found == [["serve", str(quantized_dir), "--port", "1234", "--continuous-batching"]]
    assert f"transformers {transformers.__version__} serves" in capsys.readouterr().out
    ipex.llm.unregister_from_transformers()


def test_a_gguf_file_is_served_by_transformers(monkeypatch):
    install(monkeypatch, *cli_serving.NEEDED, "vllm")
    found = commands_of(monkeypatch)
    for path in (GGUF, GGUF.parent):
        assert cli.main(["serve", str(path), "--no-continuous-batching"]) == 0
    assert found == [["serve", f"{GGUF.parent}:model.gguf", "--no-continuous-batching"]] * 2
    ipex.llm.unregister_from_transformers()


def test_a_float_model_is_served_one_request_after_the_other(monkeypatch, capsys):
    install(monkeypatch, *cli_serving.NEEDED)
    found = commands_of(monkeypatch)
    assert cli.main(["serve", str(data.embedded_model_dir())]) == 0
    assert found == [["serve", str(data.embedded_model_dir())]]
    assert "one request after the other since it is a float model" in capsys.readouterr().out
    ipex.llm.unregister_from_transformers()


@pytest.mark.parametrize(
    ("installed", "arguments", "message"),
    [
        ((), (), "transformers' server needs fastapi, uvicorn, openai, pydantic, accelerate, psutil; run `pip install"),
        (cli_serving.NEEDED, ("--engine", "vllm"), "--engine vllm: vLLM is not installed; run `pip install"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(quantized_dir, monkeypatch, capsys, installed, arguments, message):
    install(monkeypatch, *installed)
    assert cli.main(["serve", str(quantized_dir), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_several_models_are_served_by_transformers(quantized_dir, monkeypatch, capsys):
    install(monkeypatch, *cli_serving.NEEDED, "vllm")
    found = commands_of(monkeypatch)
    assert cli.main(["serve", str(quantized_dir), str(GGUF), "--port", "1234"]) == 0
    assert found == [["serve", "--port", "1234", "--continuous-batching"]]
    assert f"serves {quantized_dir}, {GGUF.parent}:model.gguf" in capsys.readouterr().out
    assert cli.main(["serve", str(quantized_dir), str(data.embedded_model_dir())]) == 0
    assert found[1:] == [["serve"]]  # one is a float model
    ipex.llm.unregister_from_transformers()
    assert cli.main(["serve", str(quantized_dir), str(quantized_dir.parent / "other"), "--engine", "vllm"]) == 2
    (quantized_dir.parent / "same").symlink_to(quantized_dir)
    assert cli.main(["serve", str(quantized_dir), str(quantized_dir.parent / "same"), "--engine", "vllm"]) == 2
    assert "--engine vllm: it serves one model" in capsys.readouterr().err


def test_a_directory_without_a_model_is_bad_input(tmp_path, capsys):
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "expected a directory with a config.json" in capsys.readouterr().err


def test_chat_passes_its_arguments_on(monkeypatch):
    install(monkeypatch, "rich")
    found = commands_of(monkeypatch)
    assert cli.main(["chat", "any", "http://localhost:1", "do_sample=False", "--user", "me"]) == 0
    assert found == [["chat", "any", "http://localhost:1", "do_sample=False", "--user", "me"]]


def test_other_commands_take_no_other_options(quantized_dir, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["explain", str(quantized_dir), "--port", "1"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --port 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Llama", {}, None),
        ("Gemma2", {}, None),
        ("Bloom", {}, "a BloomForCausalLM has an attention of its own"),
        ("Mamba", {}, "the paged cache has no layers of linear_attention"),
        ("Falcon", {"alibi": True}, "a FalconForCausalLM has an attention of its own"),
        ("Qwen3Next", {}, "the paged cache has no layers of linear_attention"),
    ],
)
def test_why_requests_are_not_batched(name, options, reason):
    kind = getattr(transformers, f"{name}ForCausalLM")
    assert cli_serving._reason_of(kind, kind.config_class(**options)) == reason


def test_encoders_with_decoders_are_not_batched():
    kind = transformers.T5ForConditionalGeneration
    assert cli_serving._reason_of(kind, transformers.T5Config()) == f"a {kind.__name__} has no continuous batching"


class Server:
    """A process of `ipex-quant serve` on a port of its own."""

    def __init__(self, directories, log):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        code += "from ipex_quant.cli import main; sys.exit(main())"
        options = ["--port", f"{self.port}", "--engine", "transformers", "--cb-num-blocks", "8"]
        self.log = log
        with log.open("w") as output:
            command = [sys.executable, "-c", code, "serve", *map(str, directories), *options]
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        end = time.monotonic() + 120
        while "Uvicorn running" not in log.read_text():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.2)

    def open(self, path, body):
        connection = http.client.HTTPConnection("localhost", self.port, timeout=120)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def post(self, path="/v1/completions", **body):
        connection, response = self.open(path, {"temperature": 0, "max_tokens": TOKENS, **body})
        status, answer = response.status, json.loads(response.read())
        connection.close()
        return status, answer

    def text(self, prompt):
        status, answer = self.post(prompt=prompt)
        assert status == 200
        return answer["choices"][0]["text"]

    def events(self, path, **body):
        connection, response = self.open(path, {"temperature": 0, "max_tokens": TOKENS, "stream": True, **body})
        lines = [line for line in response.read().decode().splitlines() if line.startswith("data: {")]
        connection.close()
        return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(quantized_dir, tmp_path_factory):
    server = Server([quantized_dir], tmp_path_factory.mktemp("server") / "log.txt")
    yield server
    assert server.stop() == 130  # though the thread that batches requests is there


@pytest.fixture(scope="module")
def expected(quantized_dir):
    """The text that `generate` appends to the prompt."""
    model, tokenizer = ipex.llm.load(quantized_dir), ipex.llm.load_tokenizer(quantized_dir)
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=TOKENS, do_sample=False)[0]
    return tokenizer.decode(ids[-TOKENS:], skip_special_tokens=True)


@needs_server
def test_completions_and_chat(server, expected):
    assert "requests in batches" in server.log.read_text()
    assert server.text(PROMPT) == expected
    messages = [{"role": "user", "content": PROMPT}]
    status, answer = server.post("/v1/chat/completions", messages=messages)
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == expected


@needs_server
def test_streams(server, expected):
    pieces = server.events("/v1/completions", prompt=PROMPT)
    assert len(pieces) > 2
    assert "".join(piece.get("text", "") for piece in pieces) == expected
    pieces = server.events("/v1/chat/completions", messages=[{"role": "user", "content": PROMPT}])
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == expected


@needs_server
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "word " * 3000}, "tokens of the cache"),
        ({"prompt": PROMPT, "max_tokens": 4000}, "tokens of the cache"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_cannot_be_served_is_answered_and_the_server_goes_on(server, expected, body, message, stream):
    status, answer = server.post(**body, stream=stream)
    assert status == 400
    assert message in answer["detail"]
    assert server.text(PROMPT) == expected


@needs_server
def test_a_client_that_hangs_up_in_a_stream(server, expected):
    body = {"prompt": PROMPT, "max_tokens": 1500, "temperature": 0, "stream": True}
    connection, response = server.open("/v1/completions", body)
    assert response.read(20)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert server.text(PROMPT) == expected


@needs_server
def test_hundreds_of_requests_get_their_own_answers(server, expected):
    prompts = [PROMPT if i % 2 else f"Number {i % 7} is" for i in range(200)]
    alone = {prompt: server.text(prompt) for prompt in sorted(set(prompts))}
    assert alone[PROMPT] == expected
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(server.text, prompts)) == [alone[prompt] for prompt in prompts]


@needs_server
def test_two_models_in_one_server_answer_side_by_side(quantized_dir, expected, tmp_path):
    other = tmp_path / "other"
    mapping = ipex.quantization.get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT2, group_size=64)
    model = ipex.llm.from_pretrained(data.embedded_model_dir(), torch.float32, mapping)
    tokenizer = ipex.llm.load_tokenizer(quantized_dir)
    ipex.llm.save(model, other, tokenizer)
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=TOKENS, do_sample=False)[0]
    texts = {quantized_dir: expected, other: tokenizer.decode(ids[-TOKENS:], skip_special_tokens=True)}
    assert len(set(texts.values())) == 2
    server = Server(texts, tmp_path / "log.txt")
    try:
        asked = [*texts] * 8
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda path: server.post(prompt=PROMPT, model=str(path)), asked))
        assert [status for status, _ in answers] == [200] * len(asked)
        assert [answer["choices"][0]["text"] for _, answer in answers] == [texts[path] for path in asked]
    finally:
        assert server.stop() == 130


@needs_server
def test_chat_talks_to_the_server(server, quantized_dir, expected):
    code = "import sys; from ipex_quant.cli import main; sys.exit(main())"
    url = f"http://localhost:{server.port}"
    arguments = ["chat", str(quantized_dir), url, f"max_new_tokens={TOKENS}", "do_sample=False"]
    said = f"{PROMPT}\nn\n!exit\n"  # no more than the tokens asked for
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.run(command, input=said, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert " ".join(expected.split()) in " ".join(run.stdout.split())
