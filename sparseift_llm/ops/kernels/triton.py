"""The Triton kernel: products of a block-sparse weight with dense activations on a GPU that touch active tiles only.

What the GPU runs is in triton_code.py, and how its configuration is chosen in triton_tuning.py. Nothing of this package
but these two files is imported, so that kernels can be compiled in a test without transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseift_llm.ops.kernels import triton_code, triton_tuning
from sparseift_llm.ops.kernels.triton_tuning import THIN, bucket_of

SMALLEST_TILE = 16  # the smallest product that tensor cores compute
LARGEST_PART = 128  # the side of the part of a tile that one program computes; a wider accumulator leaves no registers
THIN_PART = 32  # the same for few tokens: a program reads little, so that there are enough programs to fill a GPU
MULTIPROCESSORS = 132  # of the GPU that tokens are split for; results do not depend on the one at hand
TOKENS_PER_PIECE = 512  # the least that a program of a weight gradient sums over
ADDED_AT_ONCE = 4096  # numbers of a weight gradient that one program adds up


class TritonKernel:
    """float32, bfloat16 and float16 on a CUDA device; tiles of 16, 32, 64, 128 or 256."""

    name = "triton"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    smallest_fast_tile = SMALLEST_TILE
    remedy = "install triton"
    fused = None

    def is_available(self) -> bool:
        """Whether triton is installed and there is a CUDA device, or triton's interpreter is on."""
        return triton_code.HAS_TRITON and (triton_code.INTERPRETED.value or torch.cuda.is_available())

    def supports(self, device: str, dtype: torch.dtype, block_size: int) -> bool:
        """Whether dtype and tile are such; on a CPU triton's interpreter runs the same code."""
        return dtype in self.dtypes and block_size >= SMALLEST_TILE

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, out_features: int) -> Tensor:
        """As `Kernel.forward`; the bias is added in float32."""
        return _product(x, weight, bias, (columns, None, None, None), out_features, out_features)

    def input_gradient(
        self, grad: Tensor, weight: Tensor, by_column: Sequence[Tensor], out_features: int, in_features: int
    ) -> Tensor:
        """As `Kernel.input_gradient`."""
        slots, rows, starts, heavy_first = by_column
        return _product(grad, weight, None, (rows, slots, starts, heavy_first), out_features, in_features)

    def weight_gradient(self, grad: Tensor, x: Tensor, columns: Tensor, block_size: int) -> Tensor:
        """As `Kernel.weight_gradient`.

        Tokens are split into pieces that programs sum over, see `token_pieces`. A second launch adds the pieces' sums,
        float32, in their order.
        """
        _require_triton()
        grad, x, columns = _unit_inner_stride(grad), _unit_inner_stride(x), columns.contiguous()
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
        rows, precision = grad.shape[1] // block_size, _precision(x.dtype)
        bucket = bucket_of(len(x), ("weight", x.device, x.dtype, len(gradient), block_size, precision))
        with torch.cuda.device_of(x):
            triton_tuning.weight_gradient[(programs * pieces,)](
                grad, grad.stride(0), x, x.stride(0), columns, sums, len(x), len(gradient), rows, piece_tokens,
                bucket, block_size, part, depth, precision,
                enable_fp_fusion=True,  # triton's default is about to change
            )  # fmt: skip
            if pieces > 1:
                triton_code.add_pieces_kernel[(-(-gradient.numel() // ADDED_AT_ONCE),)](
                    sums, gradient, gradient.numel(), pieces, ADDED_AT_ONCE, num_warps=8, enable_fp_fusion=True
                )
        return gradient


TRITON = TritonKernel()


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


def _product(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Sequence[Tensor | None],
    out_features: int,
    width: int,
) -> Tensor:
    """The (T, width) product of `source` and the tiles, which are transposed when `index` has slots.

    `index`: the block of the source that an entry reads, the slot of every entry, where each output block starts in
    them, and the order in which output blocks are computed. None stands for what follows from the storage.
    """
    _require_triton()
    source, weight = _unit_inner_stride(source), weight.contiguous()
    bias, *index = (None if tensor is None else tensor.contiguous() for tensor in (bias, *index))
    if not len(weight):
        zeros = source.new_zeros(len(source), width)
        return zeros if bias is None else zeros + bias
    result = torch.empty((len(source), width), dtype=source.dtype, device=source.device)
    if result.numel() == 0:
        return result
    tile, transposed, precision = weight.shape[1], index[1] is not None, _precision(source.dtype)
    part = min(tile, THIN_PART if len(source) <= THIN else LARGEST_PART)
    depth = 128 // source.element_size()  # 128 bytes of a row: the widest swizzle of shared memory
    blocks = width // tile
    bucket = bucket_of(
        len(source), ("product", source.device, source.dtype, transposed, len(weight), blocks, tile, precision)
    )

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (-(-len(source) // meta["token_block"]) * (width // part),)

    with torch.cuda.device_of(source):
        triton_tuning.product[grid](
            source, source.stride(0), weight, bias, *index, result, len(source), len(weight), out_features // tile,
            blocks, bucket, tile, part, depth, transposed, precision,
            enable_fp_fusion=True,  # triton's default is about to change
        )  # fmt: skip
    return result


def _require_triton() -> None:
    if not TRITON.is_available():
        raise RuntimeError(
            "block-sparse Triton kernels need triton (pip install 'sparseift_llm[gpu]') and a CUDA device, "
            "or TRITON_INTERPRET=1 in the environment before the first import of triton"
        )


def _unit_inner_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """What tl.dot may do to float32 operands: the user's choice for torch's own products."""
    # fp32_precision also tells what was set by allow_tf32, while allow_tf32 raises after the other was set
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
