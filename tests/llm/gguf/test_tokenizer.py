"""Tokenizers out of metadata."""

import json

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ipex_quant.checkpoints import open_gguf
from ipex_quant.cli import main
from ipex_quant.llm.gguf import gguf_tokenizer
from ipex_quant.llm.gguf.pre_tokenizers import pre_tokenizer_name

BYTES = list(bytes_to_unicode().values())
TOKENS = [*BYTES, "<|end|>", "th", "the", "\u0120the"]
METADATA = {
    "general.architecture": "qwen2",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * 256 + [3, 1, 1, 1],
    "tokenizer.ggml.merges": ["t h", "th e", "\u0120 the"],
    "tokenizer.ggml.eos_token_id": 256,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{{ messages[0].content }}<|end|>",
}


@pytest.fixture
def tokenizer_of(tmp_path, write_gguf):
    def tokenizer(**changes):
        changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        metadata = {key: value for key, value in (METADATA | changes).items() if value is not None}
        return gguf_tokenizer(open_gguf(write_gguf(tmp_path / "m.gguf", metadata, {})))

    return tokenizer


def test_text_there_and_back(tokenizer_of):
    tokenizer = tokenizer_of()
    ids = tokenizer("the the<|end|>").input_ids
    assert ids == [258, 259, 256]
    assert tokenizer.decode(ids) == "the the<|end|>"
    assert tokenizer.decode(tokenizer("Gr\u00fc\u00dfe\n\n 12").input_ids) == "Gr\u00fc\u00dfe\n\n 12"
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token) == ("<|end|>", 256, None)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "the<|end|>"


def test_the_first_token_is_added_where_the_file_says_so(tokenizer_of):
    tokenizer = tokenizer_of(add_bos_token=True, bos_token_id=256)
    assert tokenizer("the").input_ids == [256, 258]


def test_gemma_4(tokenizer_of):
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"]
    special = {"padding_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "unknown_token_id": 3}
    parts = {"tokens": tokens, "token_type": [3] * 4 + [6] * 256 + [1] * 3, "merges": ["\u2581 a"]}
    tokenizer = tokenizer_of(model="gemma4", pre=None, add_bos_token=True, add_space_prefix=False, **special, **parts)
    ids = tokenizer("a a<eos>\n").input_ids
    assert ids == [261, 262, 1, 4 + 10]
    assert tokenizer.decode(ids) == "a a<eos>\n"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gpt-2", ["a", "\u01201234", "\u010a", "'s"]),
        ("smollm", ["a", "\u0120", "1", "2", "3", "4", "\u010a", "'s"]),
        ("llama-bpe", ["a", "\u0120", "123", "4", "\u010a", "'s"]),
        ("qwen2", ["a", "\u0120", "1", "2", "3", "4", "\u010a", "'s"]),
    ],
)
def test_texts_are_divided_as_the_file_says(tokenizer_of, name, parts):
    tokenizer = tokenizer_of(pre=name)
    divided = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 1234\n's")
    assert [part for part, _ in divided] == parts
    assert pre_tokenizer_name(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]) == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, r"tokenizer\.ggml\.tokens: expected the tokens of a vocabulary"),
        ({"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens: expected the tokens of a vocabulary"),
        ({"tokens": "abc"}, r"tokenizer\.ggml\.tokens: expected a list, got 'abc'"),
        ({"token_type": [1]}, r"tokenizer\.ggml\.token_type: expected a number for each of 260 tokens"),
        ({"scores": ["x"] * 260}, r"tokenizer\.ggml\.scores: expected a number for each of 260 tokens"),
        ({"merges": ["x ?y"]}, "transformers makes no tokenizer of it .*out of vocabulary"),
        ({"tokens": ["x" * 2000] * 260}, r"tokenizer\.ggml\.tokens: expected at most 1024 characters in each"),
        ({"merges": ["the"]}, r"tokenizer\.ggml\.merges: expected pairs of tokens"),
        ({"eos_token_id": 260}, r"the token 260 is none of 260"),
        ({"model": "unknown"}, r"transformers makes no tokenizer of it .*'unknown'"),
        ({"merges": None}, "transformers makes no tokenizer of it"),
    ],
)
def test_what_is_wrong_is_named(tokenizer_of, changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_of(**changes)


def test_the_command_generates_with_a_file(make_tiny, gguf_of, capsys):
    model = make_tiny("qwen2", vocab_size=len(TOKENS))
    tokenizer = {key: value for key, value in METADATA.items() if key.startswith("tokenizer")}
    path = gguf_of(model, "qwen2", "qwen2", "Q8_0", **tokenizer)
    assert main(["generate", str(path), "--prompt", "the", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("the")
