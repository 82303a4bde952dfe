"""Mixture of experts: a router chooses a few of many gated MLPs for every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ... import ops
from ...ops.gradient import needs_gradient
from .gated import silu_mul

RoutingFunction = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class GatedMLPMOE(nn.Module):
    """``sum of weight_e * (silu(x @ gate_e.T) * (x @ up_e.T)) @ W2_e.T`` over the experts e that a token is routed to.

    `W13` is ``[E, 2 * I, H]``, the gate and then the up projection of every expert; with `W3` ``[E, I, H]``, the up
    projections, it is ``[E, I, H]``, the gates alone. `W2` is ``[E, H, I]``. Only the weights of experts that some
    token is routed to are read. `use_prepack` changes nothing: the weights are used as they are. Raises ValueError for
    shapes that do not fit each other.
    """

    def __init__(
        self, W13: torch.Tensor, W2: torch.Tensor, W3: torch.Tensor | None = None, use_prepack: bool = True
    ) -> None:
        super().__init__()
        _check_weights(W13, W2, W3)
        self.num_experts, self.hidden_size, _ = W2.shape
        for name, weight in (("W13", W13), ("W2", W2), ("W3", W3)):
            if isinstance(weight, nn.Parameter):
                self.register_parameter(name, weight)
            else:
                self.register_buffer(name, weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        use_grouped_topk: bool,
        top_k: int,
        router_logits: torch.Tensor,
        renormalize: bool,
        topk_group: int | None = None,
        num_expert_group: int | None = None,
        custom_routing_function: RoutingFunction | None = None,
        scoring_func: str = "softmax",
        e_score_correction_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Route every token to `top_k` experts and return the weighted sums of their results, like `hidden_states`.

        - `hidden_states`: ``[..., H]`` in the dtype of the weights, T tokens in all.
        - `router_logits`: ``[T, E]``; `scoring_func`, "softmax" or "sigmoid", makes float32 scores of them.
        - `use_grouped_topk`: choose among the experts of the `topk_group` best of `num_expert_group` groups. The score
          of a group is that of its best expert, or, with `e_score_correction_bias`, the sum of its best two.
        - `renormalize`: divide the weights of a token by their sum.
        - `custom_routing_function`: called with hidden_states, gating_output, topk and renormalize, returns weights and
          expert indices ``[T, top_k]``; used unless `use_grouped_topk`.
        - `e_score_correction_bias`: ``[E]``, added to the scores that choose the experts, but not to the weights.

        Raises ValueError when an argument does not fit, and for an expert index out of range.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        if tokens.shape[1] != self.hidden_size or router_logits.shape != (len(tokens), self.num_experts):
            raise ValueError(
                f"expected hidden_states [..., {self.hidden_size}] and router_logits [tokens, {self.num_experts}], got "
                f"{list(hidden_states.shape)} and {list(router_logits.shape)}"
            )
        groups = _groups(num_expert_group, topk_group, self.num_experts) if use_grouped_topk else (1, 1)
        candidates = self.num_experts * groups[1] // groups[0]
        if not 0 < top_k <= candidates:
            raise ValueError(f"top_k: expected 1..{candidates}, got {top_k}")
        if custom_routing_function is not None and not use_grouped_topk:
            weights, experts = custom_routing_function(
                hidden_states=tokens, gating_output=router_logits, topk=top_k, renormalize=renormalize
            )
        else:
            scores = _scores(router_logits, scoring_func)
            choice = scores if e_score_correction_bias is None else scores + e_score_correction_bias
            if use_grouped_topk:
                choice = _within_groups(choice, *groups, 1 if e_score_correction_bias is None else 2)
            experts = choice.topk(top_k, dim=-1).indices
            weights = scores.gather(1, experts)
            if renormalize:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        return self._mixed(tokens, weights.float(), experts).view(hidden_states.shape)

    def _mixed(self, tokens: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        if weights.shape != experts.shape or experts.dim() != 2 or len(experts) != len(tokens):
            raise ValueError(
                f"routing: expected weights and experts [{len(tokens)}, top_k], got {list(weights.shape)} and "
                f"{list(experts.shape)}"
            )
        if experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < self.num_experts:
            raise ValueError(f"experts: expected indices 0..{self.num_experts - 1}, got one beyond")
        order = experts.flatten().argsort(stable=True)  # routed pairs (token, choice), sorted by expert
        rows = order // experts.shape[1]
        pair_weights = weights.flatten()[order][:, None]
        used, counts = experts.flatten().unique(return_counts=True)
        result = torch.zeros(tokens.shape, dtype=torch.float32)
        start = 0
        for expert, count in zip(used.tolist(), counts.tolist(), strict=True):
            part = slice(start, start + count)
            output = self._expert(expert, tokens[rows[part]])
            result.index_add_(0, rows[part], output.float() * pair_weights[part])
            start += count
        return result.to(tokens.dtype)

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        hidden = ops.float_linear(x, self.W13[expert])
        if self.W3 is not None:
            hidden = silu_mul(hidden, ops.float_linear(x, self.W3[expert]))
        elif needs_gradient(hidden):
            hidden = silu_mul(*hidden.chunk(2, dim=-1))
        else:
            hidden = ops.silu_mul_halves(hidden)
        return ops.float_linear(hidden, self.W2[expert])


def _scores(router_logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    if scoring_func == "softmax":
        return router_logits.softmax(dim=-1, dtype=torch.float32)
    if scoring_func == "sigmoid":
        return router_logits.float().sigmoid()
    raise ValueError(f'scoring_func: expected "softmax" or "sigmoid", got {scoring_func!r}')


def _groups(num_expert_group: int | None, topk_group: int | None, num_experts: int) -> tuple[int, int]:
    if not num_expert_group or num_experts % num_expert_group or not topk_group or topk_group > num_expert_group:
        raise ValueError(
            f"num_expert_group, topk_group: expected a divisor of {num_experts} experts and 1 up to it, got "
            f"{num_expert_group} and {topk_group}"
        )
    return num_expert_group, topk_group


def _within_groups(choice: torch.Tensor, groups: int, topk_group: int, best: int) -> torch.Tensor:
    """`choice` ``[T, E]``, where the experts outside of each token's best groups are -inf."""
    grouped = choice.unflatten(1, (groups, -1))
    group_scores = grouped.topk(min(best, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    chosen = torch.zeros_like(group_scores, dtype=torch.bool)
    chosen.scatter_(1, group_scores.topk(topk_group, dim=-1).indices, True)
    return grouped.masked_fill(~chosen[..., None], float("-inf")).flatten(1)


def _check_weights(W13: torch.Tensor, W2: torch.Tensor, W3: torch.Tensor | None) -> None:
    shapes = [None if weight is None else tuple(weight.shape) for weight in (W13, W2, W3)]
    if W2.dim() == 3:
        experts, hidden, width = W2.shape
        expected = [(experts, 2 * width, hidden), None] if W3 is None else [(experts, width, hidden)] * 2
        if [shapes[0], shapes[2]] == expected:
            return
    raise ValueError(
        f"W13, W2, W3: expected [E, 2 * I, H], [E, H, I] and None, or [E, I, H], [E, H, I] and [E, I, H], got {shapes}"
    )
