"""Estimate, layer by layer, how much quantizing a weight changes the predictions of a causal language model.

Let `g` be the gradient, at a layer's output, of the log-likelihood of a token drawn from the model's own prediction,
and `d` the change of that output by quantization, of the weight or of the input. The Kullback-Leibler divergence then
grows by ``1/2 E[sum_n (g_n d_n)^2]``: the second order of its Taylor series, with the diagonal of the Fisher
information as its Hessian. Where a layer's outputs are the logits, the divergence is computed as it is. One backward
pass over a few batches serves all layers and schemes. For models without logits the estimate is the relative error of
`sensitivity`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..conversion.example import Example
from ..evaluation import row_divergences
from ..nn.embeddings import is_embedding, row_factor
from ..nn.fused_forward import restored_forwards
from ..nn.linears import weight_matrix
from ..nn.modes import evaluating
from ..numerics.scheme import PER_CHANNEL, WoqActQuantMode
from ..ops.reference import ACT_BLOCK, quantize_activation
from ..smoothquant.tracing import input_tensor

SAMPLE_ROWS = 512
"""Number of input vectors, and of gradients, that are kept for each layer."""

MAX_BATCHES = 8

_LOGIT_ROWS = 64
"""Rows of logits at a time, which are as long as the vocabulary."""


@dataclass
class LayerSample:
    """A sample of inputs ``[R, K]`` of a linear layer, or of the ids ``[R]`` that an embedding looks up.

    `gradients` are those ``[R, N]`` at the outputs, if there are any. If `makes_logits`, the outputs are the logits.
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    makes_logits: bool = False

    @property
    def is_divergence(self) -> bool:
        """Whether `error` is a divergence."""
        return self.makes_logits or bool(self.gradients)

    def error(self, module: nn.Module, weight: torch.Tensor) -> float:
        """The error of replacing the weight by `weight` ``[N, K]``: a divergence in nats per token, or relative."""
        if is_embedding(module):
            factor = row_factor(module)
            own = torch.ones(()) if factor is None else torch.tensor(factor.value)
            ids = torch.cat(self.inputs)
            exact = module.weight.detach()[ids].float() * own
            return self._error_of(exact, weight[ids].float() * own - exact)
        change = weight.float() - weight_matrix(module).float()
        return self._error(module, lambda inputs: nn.functional.linear(inputs, change))

    def activation_error(self, module: nn.Module, group_size: int, mode: WoqActQuantMode) -> float:
        """The error of quantizing the inputs of a linear layer, in blocks of a weight's `group_size` features."""
        weight, block = weight_matrix(module).float(), ACT_BLOCK if group_size == PER_CHANNEL else group_size

        def change(inputs: torch.Tensor) -> torch.Tensor:
            quantized = quantize_activation(inputs, block, mode)
            blocks = torch.arange(inputs.shape[1]) // quantized.block
            rounded = (quantized.codes - quantized.zero_points[:, blocks]) * quantized.scales[:, blocks]
            return nn.functional.linear(rounded - inputs, weight)

        return self._error(module, change)

    def _error(self, module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """The error of a linear layer whose outputs ``change(inputs)``."""
        inputs = torch.cat(self.inputs).float()
        weight, bias = weight_matrix(module).float(), None if module.bias is None else module.bias.detach().float()
        if self.makes_logits:
            parts = ((nn.functional.linear(x, weight, bias), change(x)) for x in inputs.split(_LOGIT_ROWS))
            # Rounding makes less than nothing of no change.
            return max(sum(_divergence(*part) for part in parts), 0.0) / len(inputs)
        return self._error_of(
            inputs.new_zeros(()) if self.gradients else nn.functional.linear(inputs, weight), change(inputs)
        )

    def _error_of(self, exact: torch.Tensor, change: torch.Tensor) -> float:
        """The error of a `change` of the outputs `exact`, which do not count if there are gradients."""
        if self.gradients:
            return float((change * torch.cat(self.gradients).float()).square().sum() / (2 * len(change)))
        return float(change.square().sum() / exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny))


def sample_layers(
    model: nn.Module, batches: Sequence[Example], names: Collection[str], seed: int = 0
) -> dict[str, LayerSample]:
    """Samples of the linear layers and embeddings `names` of `model`, from at most `MAX_BATCHES` of `batches`, by name.

    Layers that no batch reaches are left out. `model` is unchanged afterwards. Raises ValueError, with the name of a
    layer, for inputs or gradients that are not finite.
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
            outputs: dict[str, torch.Tensor] = {}
            with _hooks(model, names, partial(_see, samples, outputs, rows, draw)):
                output = model(*batch.args, **{**batch.kwargs, **options})
                logits = getattr(output, "logits", None)
                if isinstance(logits, torch.Tensor) and logits.requires_grad:
                    for name, own in outputs.items():
                        samples[name].makes_logits = own is logits
                    outputs.clear()
                    _log_likelihood(logits, batch, generator).backward()
                    for sample in samples.values():
                        if sample.makes_logits:
                            sample.gradients.clear()  # as long as the vocabulary
    for name, sample in samples.items():
        if not all(each.isfinite().all() for each in (*sample.inputs, *sample.gradients)):
            raise ValueError(f"{name}: expected finite inputs and gradients on the calibration data, got NaN or Inf")
    return samples


def _see(
    samples: dict[str, LayerSample],
    outputs: dict[str, torch.Tensor],
    rows: int,
    draw: int,
    name: str,
    x: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Keep a sample of the input vectors of a call, and in the backward pass the gradients of its outputs."""
    vectors = x.detach().reshape(-1, x.shape[-1]) if x.is_floating_point() else x.detach().reshape(-1)
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(draw))[:rows]
    sample = samples.setdefault(name, LayerSample())
    sample.inputs.append(vectors[chosen])
    outputs[name] = output
    output.register_hook(lambda g: sample.gradients.append(g.reshape(-1, g.shape[-1])[chosen]))


def _divergence(logits: torch.Tensor, change: torch.Tensor) -> float:
    """The sum of the KL divergences of predictions from `logits` ``[R, V]`` after a change of these."""
    return float(row_divergences(logits.log_softmax(-1), (logits + change).log_softmax(-1)).sum())


def _log_likelihood(logits: torch.Tensor, batch: Example, generator: torch.Generator) -> torch.Tensor:
    """Log-likelihood of tokens drawn from the prediction of `logits` ``[..., V]``, summed over unmasked positions."""
    log_probs = torch.log_softmax(logits.float(), -1).reshape(-1, logits.shape[-1])
    if not log_probs.isfinite().all():
        raise ValueError("calibration: the float model's logits are not finite on this data; check model and data")
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
