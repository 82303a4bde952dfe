"""Estimate, layer by layer, how much quantizing a weight changes the predictions of a causal language model.

Let `g` be the gradient, at a layer's output, of the log-likelihood of a token drawn from the model's own prediction,
and `d` the change of that output by quantization. The Kullback-Leibler divergence then grows by
``1/2 E[sum_n (g_n d_n)^2]``: the second order of its Taylor series, with the diagonal of the Fisher information as its
Hessian. One backward pass over a few batches serves all layers and schemes. For models without logits the estimate is
the relative error of `sensitivity`.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..conversion.example import Example
from ..nn.fused_forward import restored_forwards
from ..nn.linears import weight_matrix
from ..nn.modes import evaluating
from ..smoothquant.tracing import input_tensor

SAMPLE_ROWS = 256
"""Number of input vectors, and of gradients, that are kept for each layer."""

MAX_BATCHES = 8


@dataclass
class LayerSample:
    """A sample of inputs ``[R, K]`` of a layer, and of the gradients ``[R, N]`` at its outputs, if there are any."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)

    def error(self, module: nn.Module, weight: torch.Tensor) -> float:
        """The error of replacing the weight by `weight` ``[N, K]``: a divergence in nats per token, or relative."""
        inputs = torch.cat(self.inputs).float()
        exact = weight_matrix(module).float()
        change = nn.functional.linear(inputs, weight.float() - exact)
        if self.gradients:
            return float((change * torch.cat(self.gradients).float()).square().sum() / (2 * len(inputs)))
        power = nn.functional.linear(inputs, exact).square().sum()
        return float(change.square().sum() / power.clamp(min=torch.finfo(torch.float32).tiny))


def sample_layers(
    model: nn.Module, batches: Sequence[Example], names: Collection[str], seed: int = 0
) -> dict[str, LayerSample]:
    """Samples of the linear layers `names` of `model`, from at most `MAX_BATCHES` of `batches`, by name.

    Layers that no batch reaches are left out. `model` is unchanged afterwards.
    """
    batches = batches[:MAX_BATCHES]
    samples: dict[str, LayerSample] = {}
    rows = -(-SAMPLE_ROWS // len(batches))
    generator = torch.Generator().manual_seed(seed)
    # A native KV cache takes no gradients.
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with evaluating(model), restored_forwards(model), _without_gradients(model), torch.enable_grad():
        for batch in tqdm(batches, "sampling layers"):
            draw = int(torch.randint(1 << 30, (), generator=generator))
            with _hooks(model, names, partial(_see, samples, rows, draw)):
                output = model(*batch.args, **{**batch.kwargs, **options})
                logits = getattr(output, "logits", None)
                if isinstance(logits, torch.Tensor) and logits.requires_grad:
                    _log_likelihood(logits, batch, generator).backward()
    return samples


def _see(
    samples: dict[str, LayerSample], rows: int, draw: int, name: str, x: torch.Tensor, output: torch.Tensor
) -> None:
    """Keep a sample of the input vectors of a call, and in the backward pass the gradients of its outputs."""
    vectors = x.detach().reshape(-1, x.shape[-1])
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(draw))[:rows]
    sample = samples.setdefault(name, LayerSample())
    sample.inputs.append(vectors[chosen])
    output.register_hook(lambda g: sample.gradients.append(g.reshape(-1, g.shape[-1])[chosen]))


def _log_likelihood(logits: torch.Tensor, batch: Example, generator: torch.Generator) -> torch.Tensor:
    """Log-likelihood of tokens drawn from the prediction of `logits` ``[..., V]``, summed over unmasked positions."""
    log_probs = torch.log_softmax(logits.float(), -1).reshape(-1, logits.shape[-1])
    tokens = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
    likelihood = log_probs.gather(1, tokens)[:, 0]
    mask = batch.kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == logits.shape[:-1]:
        likelihood = likelihood * mask.reshape(-1)
    return likelihood.sum()


@contextmanager
def _hooks(model: nn.Module, names: Collection[str], see: Any) -> Iterator[None]:
    def hook(name: str, module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()  # the first layer: parameters have no gradients here
        see(name, input_tensor(args, kwargs), output)

    handles = [model.get_submodule(name).register_forward_hook(partial(hook, name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Turn off `requires_grad` of all parameters inside the context."""
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
