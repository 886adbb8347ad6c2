"""Rows of a block-sparse matrix by number, as a custom operator with a gradient: what an embedding in tiles computes.

Legend: T is the number of tokens, b the side of a tile, N the number of stored tiles ("slots"), R and C the tiles along
the vocabulary and along the hidden side, and K the largest number of tiles in a block-row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseift_llm.ops.operands import check_operands, refuse_second_derivatives

NO_PADDING = -1  # as `padding_idx`: no row is that of a padding token


@torch.library.custom_op("sparseift::block_lookup", mutates_args=())
def block_lookup_op(
    weight: Tensor, ids: Tensor, columns: Tensor, num_embeddings: int, in_features: int, padding_idx: int
) -> Tensor:
    """weight (N, b, b), ids (T,) of int32 or int64 -> (T, in_features), 0 where a row stores no tile.

    Args:
        num_embeddings: ids are below it. The matrix has ceil(num_embeddings / b) block-rows.
        in_features: C * b.
        padding_idx: the row that gets no gradient, or `NO_PADDING`.

    Raises:
        IndexError: an id is outside of the vocabulary. On a GPU it is an assertion of the device, as torch's own is.
    """
    _check(weight, ids, columns)
    _check_range(ids, num_embeddings)
    size = weight.shape[1]
    places = _places(ids, columns, size, num_embeddings)
    rows = weight[places.slots, (ids.long() % size)[:, None]]  # (T, K, b)
    rows = rows.masked_fill(places.is_empty[:, None, None], 0)
    result = weight.new_zeros(len(ids), in_features)
    tokens = torch.arange(len(ids), device=ids.device)[:, None]
    result.view(len(ids), in_features // size, size)[tokens, places.blocks] = rows
    return result


@block_lookup_op.register_fake
def _(weight: Tensor, ids: Tensor, columns: Tensor, num_embeddings: int, in_features: int, padding_idx: int) -> Tensor:
    _check(weight, ids, columns)
    return weight.new_empty(ids.shape[0], in_features)


@torch.library.custom_op("sparseift::block_lookup_gradient", mutates_args=())
def block_lookup_gradient_op(
    grad: Tensor, ids: Tensor, columns: Tensor, block_size: int, num_embeddings: int, padding_idx: int
) -> Tensor:
    """grad (T, C * b), ids (T,) -> the gradient of weight (N, b, b).

    The rows of equal ids are summed in float32 or wider and in a fixed order, so that equal calls give equal bits.
    """
    _check(grad, ids, columns)
    places = _places(ids, columns, block_size, num_embeddings)
    tokens = torch.arange(len(ids), device=ids.device)[:, None]
    rows = grad.reshape(len(ids), grad.shape[1] // block_size, block_size)[tokens, places.blocks]  # (T, K, b)
    rows = rows.masked_fill((~places.is_stored | (ids == padding_idx)[:, None])[:, :, None], 0)
    targets = places.slots * block_size + (ids.long() % block_size)[:, None]
    summed = sum_rows(rows.flatten(0, 1), targets.flatten(), len(columns) * block_size, NO_PADDING)
    return summed.to(grad.dtype).view(len(columns), block_size, block_size)


@block_lookup_gradient_op.register_fake
def _(grad: Tensor, ids: Tensor, columns: Tensor, block_size: int, num_embeddings: int, padding_idx: int) -> Tensor:
    _check(grad, ids, columns)
    return grad.new_empty(columns.shape[0], block_size, block_size)


def sum_rows(rows: Tensor, targets: Tensor, num_rows: int, padding_idx: int) -> Tensor:
    """Add row i of `rows` (M, width) to row `targets[i]` of zeros (num_rows, width), in float32 or wider.

    Rows whose target is `padding_idx` are left out. The order of additions is fixed on every device, unlike that of
    `index_add_`.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    summed: Tensor = torch.ops.aten.embedding_dense_backward(wide, targets, num_rows, padding_idx, False)
    return summed


class _Places(NamedTuple):
    """Where the rows of some tokens are stored.

    Args:
        slots: int64 (T, K), the tiles of each token's block-row. A row with fewer than K tiles repeats its last one.
        blocks: int64 (T, K), the block-columns of these tiles.
        is_stored: bool (T, K), false for such repetitions.
        is_empty: bool (T,), whether the token's block-row has no tile at all. `slots` then name another row's.
    """

    slots: Tensor
    blocks: Tensor
    is_stored: Tensor
    is_empty: Tensor


def _places(ids: Tensor, columns: Tensor, block_size: int, num_embeddings: int) -> _Places:
    num_tiles, num_rows = len(columns), -(-num_embeddings // block_size)
    row = ids.long() // block_size
    first, end = row * num_tiles // num_rows, (row + 1) * num_tiles // num_rows  # as in topology/blocks.py
    slots = first[:, None] + torch.arange(-(-num_tiles // num_rows), device=ids.device)
    is_stored = slots < end[:, None]
    slots = slots.minimum(end[:, None] - 1).clamp(min=0)
    return _Places(slots, columns[slots].long(), is_stored, first == end)


def _check(values: Tensor, ids: Tensor, columns: Tensor) -> None:
    check_operands((values,), (columns,))
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"token ids must be int32 or int64, got {ids.dtype}")
    if ids.device != values.device:
        raise ValueError(f"token ids and weight must be on one device, got {ids.device} and {values.device}")


def _check_range(ids: Tensor, num_embeddings: int) -> None:
    """The block-row at the end may have rows that are no token's, so that nothing else would notice a wrong id."""
    if ids.device.type == "cuda":  # without waiting for the device
        torch._assert_async(((ids >= 0) & (ids < num_embeddings)).all(), "a token id is outside of the vocabulary")
    elif len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < num_embeddings:
        raise IndexError(
            f"token ids from {int(ids.min())} to {int(ids.max())} are not all within a vocabulary of {num_embeddings}"
        )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, columns, ctx.num_embeddings, _, ctx.padding_idx = inputs
    ctx.block_size = weight.shape[1]
    ctx.save_for_backward(ids, columns)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, columns = ctx.saved_tensors
    grad_weight = block_lookup_gradient_op(grad, ids, columns, ctx.block_size, ctx.num_embeddings, ctx.padding_idx)
    return grad_weight, None, None, None, None, None


torch.library.register_autograd("sparseift::block_lookup", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("sparseift::block_lookup_gradient", refuse_second_derivatives)
