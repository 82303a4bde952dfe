import pytest
import torch
import transformers

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
T5_SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2}),
    "llama_tied": (
        transformers.LlamaForCausalLM,
        {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "opt": (
        transformers.OPTForCausalLM,
        {**SIZES, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64},
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeForCausalLM,
        {
            **SIZES,
            "intermediate_size": 96,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        {**T5_SIZES, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
    ),
    "mamba": (transformers.MambaForCausalLM, {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96}),
}
"""Small random models: class and configuration. Mamba reads `weight.dtype` and the bias of its linear layers."""


def random_model(model_class, options, seed=0):
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**options)).eval()
    for parameter in model.parameters():  # weights of a size that gives clear predictions, biases that matter
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model


def build(name):
    model_class, options = MODELS[name]
    return random_model(model_class, {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, **options})


def inputs_of(model):
    tokens = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    return inputs


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=MODELS)
def any_model(request):
    return build(request.param)


@pytest.fixture
def make_model():
    """`make_model(name)` builds one of MODELS."""
    return build


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture
def logits():
    """`logits(model)` runs a model on tokens that are the same every time."""
    return lambda model: model(**inputs_of(model)).logits


@pytest.fixture
def tokens():
    """`tokens(model)` gives the inputs that `logits` runs a model on."""
    return inputs_of
