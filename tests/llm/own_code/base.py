"""What the models of this folder share: shapes that transformers lacks, and caches of tensors in tuples."""

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class OwnConfig(PretrainedConfig):
    model_type = "own_code"

    def __init__(self, hidden_size=64, heads=4, layers=2, inner=96, vocab_size=96, longest=64, option="", **kwargs):
        self.hidden_size, self.heads, self.layers, self.inner = hidden_size, heads, layers, inner
        self.vocab_size, self.longest, self.option = vocab_size, longest, option
        self.num_hidden_layers, self.num_attention_heads, self.use_cache = layers, heads, True
        super().__init__(**kwargs)

    @property
    def head_size(self):
        return self.hidden_size // self.heads


class OwnModel(PreTrainedModel, GenerationMixin):
    """Embeds tokens, calls `run_layers` and the head; subclasses make `embedding`, `layers`, `norm` and `head`."""

    config_class = OwnConfig
    ends_its_init = True

    def __init__(self, config, layer, norm, bias=False):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.layers))
        self.norm = norm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=bias)
        if self.ends_its_init:
            self.post_init()

    def _init_weights(self, module):
        if hasattr(module, "init_buffers"):
            module.init_buffers()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, new):
        self.head = new

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=True,
        return_dict=True,
    ):
        past = tuple(past_key_values) if past_key_values is not None else (None,) * len(self.layers)
        length = past[0][0].shape[self.time_axis] if past[0] is not None else 0
        if position_ids is None:
            position_ids = torch.arange(length, length + input_ids.shape[1])[None].expand(len(input_ids), -1)
        hidden, present = self.run_layers(self.embedding(input_ids), attention_mask, position_ids, past, use_cache)
        logits = self.head(self.norm(hidden))
        return CausalLMOutputWithPast(logits=logits, past_key_values=tuple(present) if use_cache else None)


def causal(queries, keys):
    """Bool ``[queries, keys]``, true where a query sees a key."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def angles(positions, size, dtype=torch.float32):
    """Angles ``[*positions.shape, size / 2]`` of a rotation of `size` features."""
    return positions[..., None].float() / 10000 ** (torch.arange(0, size, 2) / size)


def rotate_halves(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
