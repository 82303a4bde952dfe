import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from ipex_quant.llm.modules import GatedMLPMOE

TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
E, H, I, T = 8, 24, 10, 7  # noqa: E741


def weights(dtype=torch.float32):
    return (torch.randn(E, 2 * I, H) / 5).to(dtype), (torch.randn(E, H, I) / 3).to(dtype)


def dense(x, w13, w2, mixture):
    """Every expert of every token, in float64, times `mixture` ``[T, E]``."""
    gate, up = torch.einsum("th,eih->tei", x.double(), w13.double()).chunk(2, -1)
    return torch.einsum("tei,ehi,te->th", F.silu(gate) * up, w2.double(), mixture.double())


def top(scores, k):
    values, experts = scores.topk(k, -1)
    return torch.zeros_like(scores).scatter_(1, experts, values)


class TestRouting:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("renormalize", [False, True])
    @pytest.mark.parametrize("k", [1, 3, E])
    def test_mixes_the_best_experts(self, dtype, renormalize, k):
        (w13, w2), x, logits = weights(dtype), torch.randn(T, H).to(dtype), torch.randn(T, E)
        mixture = top(logits.softmax(-1), k)
        if renormalize:
            mixture /= mixture.sum(-1, keepdim=True)
        result = GatedMLPMOE(w13, w2)(x, False, k, logits, renormalize)
        assert result.dtype == dtype
        torch.testing.assert_close(result, dense(x, w13, w2, mixture).to(dtype), **TOLERANCE[dtype])

    def test_three_weights(self):
        (w13, w2), x, logits = weights(), torch.randn(T, H), torch.randn(T, E)
        gate, up = w13.chunk(2, 1)
        expected = GatedMLPMOE(w13, w2)(x, False, 2, logits, True)
        torch.testing.assert_close(GatedMLPMOE(gate, w2, up)(x, False, 2, logits, True), expected)

    def test_sigmoid_scores(self):
        (w13, w2), x, logits = weights(), torch.randn(T, H), torch.randn(T, E)
        result = GatedMLPMOE(w13, w2)(x, False, 2, logits, False, scoring_func="sigmoid")
        torch.testing.assert_close(result, dense(x, w13, w2, top(logits.sigmoid(), 2)).float(), rtol=1e-4, atol=1e-5)

    def test_bias_chooses_but_does_not_weigh(self):
        (w13, w2), x, logits = weights(), torch.randn(T, H), torch.zeros(T, E)
        bias = torch.arange(E).float()
        result = GatedMLPMOE(w13, w2)(x, False, 1, logits, False, e_score_correction_bias=bias)
        mixture = torch.zeros(T, E)
        mixture[:, -1] = 1 / E
        torch.testing.assert_close(result, dense(x, w13, w2, mixture).float(), rtol=1e-4, atol=1e-5)

    def test_custom_routing(self):
        (w13, w2), x, logits = weights(), torch.randn(T, H), torch.randn(T, E)
        given = {}

        def route(hidden_states, gating_output, topk, renormalize):
            given.update(tokens=hidden_states, logits=gating_output, topk=topk, renormalize=renormalize)
            return torch.full((T, 2), 0.5), torch.tensor([[1, 6]] * T, dtype=torch.int32)

        result = GatedMLPMOE(w13, w2)(x, False, 2, logits, True, custom_routing_function=route)
        mixture = torch.zeros(T, E)
        mixture[:, [1, 6]] = 0.5
        torch.testing.assert_close(result, dense(x, w13, w2, mixture).float(), rtol=1e-4, atol=1e-5)
        assert torch.equal(given["tokens"], x)
        assert given["logits"] is logits
        assert (given["topk"], given["renormalize"]) == (2, True)

    def test_groups_without_bias_count_by_their_best_expert(self):
        (w13, w2), x = weights(), torch.randn(1, H)
        logits = torch.tensor([[4.0, 0.0, 3.0, 3.0, 2.9, 2.9, 2.9, 2.9]])  # groups of two: the first two have the best
        result = GatedMLPMOE(w13, w2)(x, True, 3, logits, False, topk_group=2, num_expert_group=4)
        mixture = logits.softmax(-1) * torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 0])
        torch.testing.assert_close(result, dense(x, w13, w2, mixture).float(), rtol=1e-4, atol=1e-5)


class TestAgainstTransformers:
    def test_mixtral(self):
        config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=2)
        block = MixtralSparseMoeBlock(config)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.2)
        x = torch.randn(2, T, H)
        logits = F.linear(x.view(-1, H), block.gate.weight)
        result = GatedMLPMOE(block.experts.gate_up_proj, block.experts.down_proj)(x, False, 2, logits, True)
        torch.testing.assert_close(result, block(x), rtol=1e-4, atol=1e-5)

    def test_deepseek_v3(self):
        config = DeepseekV3Config(
            hidden_size=H,
            moe_intermediate_size=I,
            n_routed_experts=E,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            n_shared_experts=1,
            routed_scaling_factor=1.0,
            norm_topk_prob=True,
        )
        block = DeepseekV3MoE(config)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.2)
        bias = block.gate.e_score_correction_bias.normal_(std=0.1)
        x = torch.randn(2, T, H)
        logits = F.linear(x.view(-1, H), block.gate.weight)
        result = GatedMLPMOE(block.experts.gate_up_proj, block.experts.down_proj)(
            x, True, 3, logits, True, 2, 4, None, "sigmoid", bias
        )
        torch.testing.assert_close(result, block(x) - block.shared_experts(x), rtol=1e-4, atol=1e-5)


class TestModule:
    def test_reads_only_routed_experts(self):
        (w13, w2), x = weights(), torch.randn(T, H)
        logits = torch.full((T, E), -1e9)
        logits[:, [2, 5]] = 0.0
        w13[[0, 1, 3, 4, 6, 7]] = torch.nan
        w2[[0, 1, 3, 4, 6, 7]] = torch.nan
        assert GatedMLPMOE(w13, w2)(x, False, 2, logits, True).isfinite().all()

    def test_nan_stays_in_its_token(self):
        (w13, w2), x, logits = weights(), torch.randn(T, H), torch.randn(T, E)
        x[3] = torch.nan
        result = GatedMLPMOE(w13, w2)(x, False, 2, logits, True)
        assert result.isnan().any(-1).tolist() == [i == 3 for i in range(T)]

    def test_no_tokens(self):
        w13, w2 = weights()
        assert GatedMLPMOE(w13, w2)(torch.randn(0, H), False, 2, torch.randn(0, E), True).shape == (0, H)

    def test_state_dict_and_dtype(self):
        w13, w2 = weights()
        module = GatedMLPMOE(nn.Parameter(w13), w2)
        assert set(module.state_dict()) == {"W13", "W2"}
        assert module.to(torch.bfloat16).W2.dtype == torch.bfloat16

    def test_gradient(self):
        (w13, w2), x, logits = weights(), torch.randn(T, H), torch.randn(T, E)
        with torch.enable_grad():
            gradients = []
            for function in (
                lambda x: GatedMLPMOE(w13, w2)(x, False, E, logits, True),
                lambda x: dense(x, w13, w2, logits.softmax(-1)).float(),
            ):
                leaf = x.clone().requires_grad_()
                function(leaf).square().sum().backward()
                gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "shapes",
        [
            [(E, 2 * I, H), (E, H, I + 1), None],
            [(E, 2 * I, H), (E, H, I), (E, I, H)],
            [(E, I, H), (E, H, I), None],
            [(E - 1, 2 * I, H), (E, H, I), None],
            [(2 * I, H), (H, I), None],
        ],
    )
    def test_refuses_weights_that_do_not_fit(self, shapes):
        with pytest.raises(ValueError, match="W13, W2, W3: expected"):
            GatedMLPMOE(*(None if shape is None else torch.zeros(shape) for shape in shapes))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"top_k": 0}, "top_k: expected 1..8, got 0"),
            ({"top_k": E + 1}, "top_k: expected 1..8, got 9"),
            ({"top_k": 5, "use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}, "top_k: expected 1..4"),
            ({"use_grouped_topk": True, "num_expert_group": 3, "topk_group": 2}, "num_expert_group, topk_group"),
            ({"use_grouped_topk": True}, "num_expert_group, topk_group"),
            ({"scoring_func": "relu"}, "scoring_func: expected"),
            ({"router_logits": torch.zeros(T, E + 1)}, r"router_logits \[tokens, 8\]"),
            ({"hidden_states": torch.zeros(T, H + 1)}, r"hidden_states \[..., 24\]"),
            (
                {"custom_routing_function": lambda **_: (torch.ones(T, 2), torch.full((T, 2), E))},
                r"experts: expected indices 0\.\.7",
            ),
            (
                {"custom_routing_function": lambda **_: (torch.ones(T, 2), torch.zeros(T, 3, dtype=torch.long))},
                "routing: expected weights and experts",
            ),
        ],
    )
    def test_refuses_what_does_not_fit(self, change, message):
        arguments = {
            "hidden_states": torch.zeros(T, H),
            "use_grouped_topk": False,
            "top_k": 2,
            "router_logits": torch.zeros(T, E),
            "renormalize": True,
        }
        with pytest.raises(ValueError, match=message):
            GatedMLPMOE(*weights())(**{**arguments, **change})
