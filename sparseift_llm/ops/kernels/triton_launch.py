"""Launches of the Triton kernels on torch's tensors: arguments, sizes of programs, second stages.

What the GPU runs is in triton_product.py and triton_code.py, and how its configuration is chosen in triton_tuning.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseift_llm.ops.kernels import triton_code, triton_tuning
from sparseift_llm.ops.kernels.triton_descriptors import may_describe
from sparseift_llm.ops.kernels.triton_product import TOKENS_PER_SUM
from sparseift_llm.ops.kernels.triton_tuning import THIN, bucket_of

LARGEST_PART = 128  # the side of the part of a tile that one program computes; a wider accumulator leaves no registers
THIN_PART = 32  # the same for few tokens: a program reads little, so that there are enough programs to fill a GPU
MULTIPROCESSORS = 132  # of the GPU that tokens are split for; results do not depend on the one at hand
TOKENS_PER_PIECE = 512  # the least that a program of a weight gradient sums over
ADDED_AT_ONCE = 4096  # numbers of a weight gradient that one program adds up


class Operand(NamedTuple):
    """Activations and the tiles that they are multiplied with.

    Attributes:
        source: (T, .), with any row stride.
        weight: the tiles (N, b, b).
        others: the block of the source that every entry reads, int32 (N,).
        order: the slot of every entry, int32 (N,), for products with transposed tiles; None: the entry itself.
        starts: where each output block starts in the entries, int32; None: block-rows, as they are stored.
        heavy_first: the order in which output blocks are computed, int32; None: as they come.
    """

    source: Tensor
    weight: Tensor
    others: Tensor
    order: Tensor | None = None
    starts: Tensor | None = None
    heavy_first: Tensor | None = None

    @classmethod
    def transposed(cls, source: Tensor, weight: Tensor, by_column: Sequence[Tensor]) -> Operand:
        """For a product with W, where `by_column` are the tables of `topology.blocks.ByColumn`."""
        slots, rows, starts, heavy_first = by_column
        return cls(source, weight, rows, slots, starts, heavy_first)

    def ready(self) -> Operand:
        """With the strides that the kernels read."""
        source = unit_inner_stride(self.source)
        weight, *tables = (None if tensor is None else tensor.contiguous() for tensor in self[1:])
        return Operand(source, weight, *tables)  # type: ignore[arg-type]


class Epilogue(NamedTuple):
    """What is done to a product before it is written; every tensor is (T, width) and contiguous where not said.

    Attributes:
        activation: a name of `ops.activations.ACTIVATIONS`.
        hidden: of a product with W^T, where the product itself is written, the result being f(product) or
            f(gate) * product; None: it is not written. Of a product with W, the gradient of the activation, where that
            was written before; the result is the gradient of hidden.
        gate: what gate gave.
        grad_gate: where its gradient is written, for a product with W.
        active: the same for the activation; None: it is not written.
        sums: float32 (ceil(T / TOKENS_PER_SUM), width), where sums of the result over tokens are written, or None.
        gate_sums: the same for `grad_gate`.
    """

    activation: str
    hidden: Tensor | None
    gate: Tensor | None = None
    grad_gate: Tensor | None = None
    active: Tensor | None = None
    sums: Tensor | None = None
    gate_sums: Tensor | None = None


def is_available() -> bool:
    """Whether triton is installed and there is a CUDA device, or triton's interpreter is on."""
    return triton_code.HAS_TRITON and (triton_code.INTERPRETED.value or torch.cuda.is_available())


def product(
    operand: Operand,
    bias: Tensor | None,
    out_features: int,
    width: int,
    epilogue: Epilogue | None = None,
    second: Operand | None = None,
) -> Tensor:
    """The (T, width) product of an operand, plus that of a second one of the same form, plus bias.

    Args:
        operand: see `Operand`.
        bias: (width,) or None.
        out_features: rows of W.
        width: W's rows for a product with W^T, its columns for one with W.
        epilogue: what is done to the sum.
        second: another product with transposed tiles of the same side.
    """
    require_triton()
    operand, second = operand.ready(), None if second is None else second.ready()
    source, weight, *tables = operand
    result = torch.empty((len(source), width), dtype=source.dtype, device=source.device)
    if result.numel() == 0:
        return result
    tile, transposed, precision = weight.shape[1], operand.order is not None, precision_of(source.dtype)
    part = min(tile, THIN_PART if len(source) <= THIN else LARGEST_PART)
    depth = 128 // source.element_size()  # 128 bytes of a row: the widest swizzle of shared memory
    blocks, second_slots = width // tile, 0 if second is None else len(second.weight)
    activation, *tensors = (None,) * 7 if epilogue is None else epilogue
    described = (source, weight) if second is None else (source, weight, second.source, second.weight)
    can_describe = int(len(source) > THIN and tile >= depth and may_describe(*described))
    call = (source.device, source.dtype, transposed, len(weight), second_slots, blocks, tile, precision)
    bucket = bucket_of(
        len(source), ("product", *call, can_describe, activation, *(tensor is None for tensor in tensors))
    )
    added = (None,) * 6 if second is None else (second.source, second.source.stride(0), second.weight, *second[2:5])

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (-(-len(source) // meta["token_block"]) * (width // part),)

    with torch.cuda.device_of(source):
        triton_tuning.product[grid](
            source, source.stride(0), weight, None if bias is None else bias.contiguous(), *tables, *added,
            result, *tensors, len(source), len(weight), second_slots, out_features // tile, blocks, bucket,
            can_describe, tile, part, depth, transposed, activation, precision,
            enable_fp_fusion=True,  # triton's default is about to change
        )  # fmt: skip
    return result


def empty_token_sums(tokens: int, width: int, device: torch.device) -> Tensor:
    """Memory for `Epilogue.sums`; their sum over the first side is the sum over all tokens."""
    return torch.empty((-(-tokens // TOKENS_PER_SUM), width), dtype=torch.float32, device=device)


def weight_gradient(grad: Tensor, x: Tensor, columns: Tensor, block_size: int) -> Tensor:
    """The stored tiles of grad.T @ x, as `Kernel.weight_gradient`.

    Tokens are split into pieces that programs sum over, see `token_pieces`. A second launch adds the pieces' sums,
    float32, in their order.
    """
    require_triton()
    grad, x, columns = unit_inner_stride(grad), unit_inner_stride(x), columns.contiguous()
    gradient = torch.empty((columns.numel(), block_size, block_size), dtype=x.dtype, device=x.device)
    if gradient.numel() == 0:
        return gradient
    part = min(block_size, LARGEST_PART)
    # Tokens per step: many for a small tile, so that enough loads are under way; few for a large one, which fills
    # shared memory, and for float32, whose unrolled scalar instructions would spill
    depth = 32 if x.dtype == torch.float32 else min(128, 8192 // part)
    programs = gradient.numel() // part**2
    pieces = token_pieces(programs, len(x))
    sums = gradient if pieces == 1 else _empty_pieces(pieces, gradient)
    piece_tokens = -(-len(x) // (pieces * depth)) * depth
    rows, precision = grad.shape[1] // block_size, precision_of(x.dtype)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        in_row = math.ceil(math.ceil(len(gradient) / rows) / (2 if meta["paired"] else 1))
        return (rows * in_row * (block_size // part) ** 2 * pieces,)

    can_describe = int(may_describe(grad, x))
    bucket = bucket_of(len(x), ("weight", x.device, x.dtype, len(gradient), block_size, precision, can_describe))
    with torch.cuda.device_of(x):
        triton_tuning.weight_gradient[grid](
            grad, grad.stride(0), x, x.stride(0), columns, sums, len(x), len(gradient), rows, piece_tokens,
            bucket, can_describe, block_size, part, depth, precision,
            enable_fp_fusion=True,  # triton's default is about to change
        )  # fmt: skip
        if pieces > 1:
            triton_code.add_pieces_kernel[(-(-gradient.numel() // ADDED_AT_ONCE),)](
                sums, gradient, gradient.numel(), pieces, ADDED_AT_ONCE, num_warps=8, enable_fp_fusion=True
            )
    return gradient


def token_pieces(programs: int, tokens: int) -> int:
    """Into how many pieces of tokens a weight gradient is split, so that all multiprocessors end at about one time.

    The time of n pieces, in that of one program that sums over all tokens: the busiest multiprocessor computes
    ceil(programs * n / MULTIPROCESSORS) pieces of 1 / n each. And each piece's sums are written and read again, for
    which 3.8 / tokens of the time goes by per program and piece (600 TFLOP/s, 4.8 TB/s, float32).

    >>> token_pieces(144, 16384), token_pieces(12, 16384), token_pieces(10_000, 16384), token_pieces(144, 512)
    (5, 11, 1, 1)
    """

    def seconds(pieces: int) -> float:
        passed_on = 3.8 * programs * pieces / tokens if pieces > 1 else 0.0
        return math.ceil(programs * pieces / MULTIPROCESSORS) / pieces + passed_on

    return min(range(1, max(2, min(16, tokens // TOKENS_PER_PIECE) + 1)), key=seconds)


def _empty_pieces(pieces: int, gradient: Tensor) -> Tensor:
    return torch.empty((pieces, *gradient.shape), dtype=torch.float32, device=gradient.device)


def require_triton() -> None:
    if not is_available():
        raise RuntimeError(
            "block-sparse Triton kernels need triton (pip install 'sparseift_llm[gpu]') and a CUDA device, "
            "or TRITON_INTERPRET=1 in the environment before the first import of triton"
        )


def unit_inner_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def precision_of(dtype: torch.dtype) -> str:
    """What tl.dot may do to float32 operands: the user's choice for torch's own products."""
    # fp32_precision also tells what was set by allow_tf32, while allow_tf32 raises after the other was set
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
