"""LoRA for batches whose tokens have adapters of their own (Punica, Chen et al., 2023, arXiv:2310.18547).

An adapter adds ``scaling * x @ A.T @ B.T`` to a linear layer (Hu et al., 2021, arXiv:2106.09685): `bgmv_shrink` and
`sgmv_shrink` compute the first product, the `expand` functions the second. `bgmv` functions take an index for each
token, `sgmv` functions one for each sequence. In all of them:

- `inputs`: float32, bfloat16 or float16 ``[tokens, K]``.
- `lora_a_weights`, `lora_b_weights`: ``[adapters, N, K]`` or ``[adapters, 1, N, K]`` in any of these dtypes.
- `output_tensor`: ``[tokens, N or more]`` in any of them; written in place, other columns are left, and returned.
- `lora_indices_tensor`: integers; tokens of index -1 have no adapter, and their rows are left as they are.

Products are summed in float32 and rounded once. Gradients do not pass. Raises ValueError or TypeError when an argument
does not fit, IndexError for an adapter that does not exist; nothing is written then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...numerics.scheme import FLOAT_DTYPES


def bgmv_shrink(
    inputs: torch.Tensor,
    lora_a_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    scaling: float = 1.0,
) -> torch.Tensor:
    """Write ``scaling * lora_a_weights[i] @ inputs[t]`` for each token t, whose index is i."""
    return _multiply(inputs, lora_a_weights, output_tensor, lora_indices_tensor, scaling=scaling)


def bgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    add_inputs: bool = True,
) -> torch.Tensor:
    """Add ``lora_b_weights[i] @ inputs[t]`` for each token t, whose index is i; write it unless `add_inputs`."""
    return _multiply(inputs, lora_b_weights, output_tensor, lora_indices_tensor, add=add_inputs)


def bgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> torch.Tensor:
    """`bgmv_expand` into the columns `slice_offset` to ``slice_offset + slice_size``, where `slice_size` is N."""
    columns = _columns(output_tensor, slice_offset, slice_size, lora_b_weights)
    _multiply(inputs, lora_b_weights, columns, lora_indices_tensor, add=add_inputs)
    return output_tensor


def sgmv_shrink(
    inputs: torch.Tensor,
    lora_a_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    b_seq_start_loc: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    batches: int,
    max_seq_length: int,
    scaling: float,
) -> torch.Tensor:
    """`bgmv_shrink` with an index for each sequence.

    Sequences follow each other in `inputs`: `seq_len_tensor` ``[batches]`` has their numbers of tokens, at most
    `max_seq_length`, and `b_seq_start_loc` ``[batches]`` where they start.
    """
    indices = _per_token(len(inputs), b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length)
    return bgmv_shrink(inputs, lora_a_weights, output_tensor, indices, scaling)


def sgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    b_seq_start_loc: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    batches: int,
    max_seq_length: int,
    add_inputs: bool = False,
) -> torch.Tensor:
    """`bgmv_expand` with an index for each sequence, as in `sgmv_shrink`."""
    indices = _per_token(len(inputs), b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length)
    return bgmv_expand(inputs, lora_b_weights, output_tensor, indices, add_inputs)


def sgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    b_seq_start_loc: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    batches: int,
    max_seq_length: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = False,
) -> torch.Tensor:
    """`bgmv_expand_slice` with an index for each sequence, as in `sgmv_shrink`."""
    indices = _per_token(len(inputs), b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length)
    return bgmv_expand_slice(inputs, lora_b_weights, output_tensor, indices, slice_offset, slice_size, add_inputs)


def _multiply(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    indices: torch.Tensor,
    scaling: float = 1.0,
    add: bool = False,
) -> torch.Tensor:
    weights = weights.squeeze(1) if weights.dim() == 4 else weights
    _check(inputs, weights, output, indices)
    order = indices.argsort(stable=True)
    adapters, counts = indices[order].unique_consecutive(return_counts=True)
    for adapter, rows in zip(adapters.tolist(), order.split(counts.tolist()), strict=True):
        if adapter < 0:
            continue
        product = F.linear(inputs.detach()[rows].float(), weights.detach()[adapter].float()) * scaling
        columns = output[:, : product.shape[1]]
        columns[rows] = (columns[rows] + product if add else product).to(output.dtype)
    return output


def _columns(output: torch.Tensor, offset: int, size: int, weights: torch.Tensor) -> torch.Tensor:
    """The columns of `output` from `offset` on, `size` of them, which is that of the `weights`."""
    if output.dim() != 2 or size != weights.shape[-2] or not 0 <= offset <= output.shape[1] - size:
        raise ValueError(
            f"slice_offset, slice_size: expected {weights.shape[-2]} columns, those of lora_b_weights, within "
            f"output_tensor {list(output.shape)}, got {size} from {offset} on"
        )
    return output[:, offset : offset + size]


def _per_token(
    tokens: int,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    indices: torch.Tensor,
    batches: int,
    max_seq_length: int,
) -> torch.Tensor:
    """The index of each token, from those of its sequence."""
    for name, tensor in (("b_seq_start_loc", starts), ("seq_len_tensor", lengths), ("lora_indices_tensor", indices)):
        if tensor.shape != (batches,) or tensor.is_floating_point():
            raise ValueError(f"{name}: expected integers [{batches}], got {tensor.dtype} {list(tensor.shape)}")
    sizes = lengths.tolist()
    ends = torch.tensor([0, *sizes]).cumsum(0)
    if any(not 0 <= size <= max_seq_length for size in sizes) or int(ends[-1]) != tokens:
        raise ValueError(
            f"seq_len_tensor: expected lengths up to {max_seq_length} that sum to the {tokens} tokens, got {sizes}"
        )
    if starts.tolist() != ends[:-1].tolist():
        raise ValueError(f"b_seq_start_loc: expected {ends[:-1].tolist()}, got {starts.tolist()}")
    return indices.repeat_interleave(lengths)


def _check(inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor) -> None:
    if weights.dim() != 3 or inputs.dim() != 2 or weights.shape[2] != inputs.shape[1]:
        raise ValueError(
            f"inputs, weights: expected [tokens, K] and [adapters, N, K], got {list(inputs.shape)} and "
            f"{list(weights.shape)}"
        )
    if output.dim() != 2 or len(output) != len(inputs) or output.shape[1] < weights.shape[1]:
        raise ValueError(
            f"output_tensor: expected [{len(inputs)}, {weights.shape[1]} or more], got {list(output.shape)}"
        )
    if indices.shape != (len(inputs),) or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"lora_indices_tensor: expected integers [{len(inputs)}], got {indices.dtype} {list(indices.shape)}"
        )
    dtypes = (inputs.dtype, weights.dtype, output.dtype)
    if any(dtype not in FLOAT_DTYPES for dtype in dtypes):
        raise TypeError(f"inputs, weights, output_tensor: expected float32, bfloat16 or float16, got {dtypes}")
    if indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < len(weights):
        raise IndexError(
            f"lora_indices_tensor: expected -1..{len(weights) - 1}, got {int(indices.min())}..{int(indices.max())}"
        )
