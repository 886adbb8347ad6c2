"""The Triton kernel: products of a block-sparse weight with dense activations on a GPU that touch active tiles only.

Tiles ("slots") are grouped by block-row, and the numbers of tiles in two block-rows differ by at most one (see
topology/blocks.py). This file imports nothing of this package, so that it can be compiled alone in a test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError:
    triton = None

SMALLEST_TILE = 16  # the smallest product that tensor cores compute
LARGEST_PART = 128  # the side of the part of a tile that one program computes; a wider accumulator leaves no registers


class TritonKernel:
    """float32, bfloat16 and float16 on a CUDA device; tiles of 16, 32, 64, 128 or 256."""

    name = "triton"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    smallest_fast_tile = SMALLEST_TILE
    remedy = "install triton"
    fused = None

    def is_available(self) -> bool:
        """Whether triton is installed and there is a CUDA device, or triton's interpreter is on."""
        return triton is not None and (_INTERPRETED.value or torch.cuda.is_available())

    def supports(self, device: str, dtype: torch.dtype, block_size: int) -> bool:
        """Whether dtype and tile are such; on a CPU triton's interpreter runs the same code."""
        return dtype in self.dtypes and block_size >= SMALLEST_TILE

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, out_features: int) -> Tensor:
        """As `Kernel.forward`; the bias is added in float32."""
        return _product(x, weight, bias, (columns, None, None), out_features, out_features)

    def input_gradient(
        self,
        grad: Tensor,
        weight: Tensor,
        slots_by_column: Tensor,
        column_starts: Tensor,
        out_features: int,
        in_features: int,
    ) -> Tensor:
        """As `Kernel.input_gradient`."""
        return _product(grad, weight, None, (None, slots_by_column, column_starts), out_features, in_features)

    def weight_gradient(self, grad: Tensor, x: Tensor, columns: Tensor, block_size: int) -> Tensor:
        """As `Kernel.weight_gradient`."""
        _require_triton()
        grad, x, columns = _unit_inner_stride(grad), _unit_inner_stride(x), columns.contiguous()
        gradient = torch.empty((columns.numel(), block_size, block_size), dtype=x.dtype, device=x.device)
        if gradient.numel() == 0:
            return gradient
        part = min(block_size, LARGEST_PART)
        # Tokens per step: many for a small tile, so that enough loads are under way; few for a large one, which fills
        # shared memory, and for float32, whose unrolled scalar instructions would spill
        depth = 32 if x.dtype == torch.float32 else min(128, 8192 // part)
        with torch.cuda.device_of(x):
            _weight_gradient_kernel[(gradient.numel() // part**2,)](
                grad, grad.stride(0), x, x.stride(0), columns, gradient, len(x), len(gradient),
                grad.shape[1] // block_size, _bucket(len(x)), block_size, part, depth, _precision(x.dtype),
                enable_fp_fusion=True,
            )  # fmt: skip
        return gradient


TRITON = TritonKernel()


def _product(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Sequence[Tensor | None],
    out_features: int,
    width: int,
) -> Tensor:
    """The (T, width) product of `source` and the tiles, which are transposed when `index` has no columns.

    `index`: columns, slots by column, and where each column starts in them; None stands for what is not needed.
    """
    _require_triton()
    source, weight = _unit_inner_stride(source), weight.contiguous()
    bias, *index = (None if tensor is None else tensor.contiguous() for tensor in (bias, *index))
    result = torch.empty((len(source), width), dtype=source.dtype, device=source.device)
    if result.numel() == 0:
        return result
    tile = weight.shape[1]
    part = min(tile, LARGEST_PART)
    depth = 128 // source.element_size()  # 128 bytes of a row: the widest swizzle of shared memory

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(len(source), meta["token_block"]) * (width // part),)

    with torch.cuda.device_of(source):
        _product_kernel[grid](
            source, source.stride(0), weight, bias, *index, result, len(source), len(weight), out_features // tile,
            width // tile, _bucket(len(source)), tile, part, depth, index[0] is None, _precision(source.dtype),
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


def _bucket(tokens: int) -> int:
    """Token counts with the same bucket share a tuned configuration; all from 2**14 on do."""
    return min(max(tokens.bit_length(), 6), 15)


def _precision(dtype: torch.dtype) -> str:
    """What tl.dot may do to float32 operands: the user's choice for torch's own products."""
    # fp32_precision also tells what was set by allow_tf32, while allow_tf32 raises after the other was set
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _fitting(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """Configurations whose accumulators leave registers for the operands; the others spill and compile slowly."""
    largest = 64 if arguments["weight" if "weight" in arguments else "x"].element_size() == 4 else 128
    part = arguments["part"]
    return [
        config for config in configs if config.kwargs.get("token_block", part) * part <= largest * 32 * config.num_warps
    ]


if triton is not None:
    _INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

    def _tuned(key: list[str], configs: list[tuple[dict[str, int], int, int]]) -> Callable[[Any], Any]:
        """Decorator: the best of `configs` (sizes, warps, stages), of which the interpreter takes the first."""
        configs = configs[:1] if _INTERPRETED else configs
        tuner: Callable[[Any], Any] = triton.autotune(
            [triton.Config(sizes, num_warps=warps, num_stages=stages) for sizes, warps, stages in configs],
            [*key, "token_bucket", "tile", "precision"],
            prune_configs_by={"early_config_prune": _fitting},
            cache_results=True,
        )
        return tuner

    @triton.jit
    def _place(program, token_blocks, parts):  # type: ignore[no-untyped-def]
        # Programs that run together should read the same memory. Eight token blocks pass through all parts of the
        # output before the next eight: a tile is read once for eight programs that follow each other, and the rows
        # of eight token blocks stay in the L2 cache while every block-row picks the columns it needs from them.
        group = program // (8 * parts)
        height = tl.minimum(token_blocks - group * 8, 8)
        inside = program % (8 * parts)
        return group * 8 + inside % height, inside // height

    @triton.jit
    def _first_slot(row, slots, rows):  # type: ignore[no-untyped-def]
        return (row.to(tl.int64) * slots // rows).to(tl.int32)

    @triton.jit
    def _row_of(slot, slots, rows):  # type: ignore[no-untyped-def]
        return (((slot.to(tl.int64) + 1) * rows - 1) // slots).to(tl.int32)

    @triton.jit  # type: ignore[untyped-decorator]
    def _add_product(left, right, total, precision: tl.constexpr):  # type: ignore[no-untyped-def]
        if _INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        return tl.dot(left, right, total, input_precision=precision)

    # Operands wait for the load of an index, which takes every second stage: 4 stages would buffer no more than 3
    @_tuned(
        ["transposed"], [({"token_block": n}, w, s) for n, w in ((64, 4), (128, 4), (128, 8), (256, 8)) for s in (3, 5)]
    )
    @triton.jit(do_not_specialize=["token_bucket"])  # type: ignore[untyped-decorator]
    def _product_kernel(  # type: ignore[no-untyped-def]
        source, source_stride, weight, bias, columns, slots_by_column, column_starts, result, tokens, slots, rows,
        blocks, token_bucket, tile: tl.constexpr, part: tl.constexpr, depth: tl.constexpr, transposed: tl.constexpr,
        precision: tl.constexpr, token_block: tl.constexpr,
    ):  # fmt: skip
        parts = tile // part
        where, position = _place(tl.program_id(0), tl.cdiv(tokens, token_block), blocks * parts)
        block = position // parts
        if transposed:
            first = tl.load(column_starts + block)
            count = tl.load(column_starts + block + 1) - first
        else:
            first = _first_slot(block, slots, rows)
            count = _first_slot(block + 1, slots, rows) - first
        token = where.to(tl.int64) * token_block + tl.arange(0, token_block)
        present = (token < tokens)[:, None]
        beside = (position % parts) * part + tl.arange(0, part)
        stride_along: tl.constexpr = tile if transposed else 1
        stride_beside: tl.constexpr = 1 if transposed else tile
        total = tl.zeros((token_block, part), tl.float32)
        # One flat loop, which the compiler pipelines: `depth` features are part of a large tile or several small ones
        for start in range(0, count * tile, depth):
            inner = start + tl.arange(0, depth)
            active = inner < count * tile
            if tile < depth:
                entry = first + inner // tile
                listed = active
            else:  # a scalar takes fewer registers and copies than a vector of equal numbers
                entry = first + start // tile
                listed = start < count * tile
            if transposed:
                slot = tl.load(slots_by_column + entry, mask=listed, other=0)
                other = _row_of(slot, slots, rows)
            else:
                slot = entry
                other = tl.load(columns + entry, mask=listed, other=0)
            along = inner % tile
            feature = other * tile + along
            values = tl.load(
                source + token[:, None] * source_stride + feature[None, :], mask=present & active[None, :], other=0.0
            )
            row = slot.to(tl.int64) * tile * tile + along * stride_along
            weights = tl.load(weight + row[:, None] + beside[None, :] * stride_beside, mask=active[:, None], other=0.0)
            total = _add_product(values, weights, total, precision)
        column = block * tile + beside
        if bias is not None:
            total += tl.load(bias + column).to(tl.float32)[None, :]
        target = result + token[:, None] * (blocks * tile) + column[None, :]
        tl.store(target, total.to(result.dtype.element_ty), mask=present)

    @_tuned([], [({}, 4, 3), ({}, 4, 4), ({}, 2, 4), ({}, 8, 3)])
    @triton.jit(do_not_specialize=["token_bucket"])  # type: ignore[untyped-decorator]
    def _weight_gradient_kernel(  # type: ignore[no-untyped-def]
        grad, grad_stride, x, x_stride, columns, gradient, tokens, slots, rows, token_bucket,
        tile: tl.constexpr, part: tl.constexpr, depth: tl.constexpr, precision: tl.constexpr,
    ):  # fmt: skip
        # Neighbours in the launch order work on one tile, then on its block-row, and walk through the tokens together:
        # the columns of `grad` that they share, and the same rows of `x`, are in the L2 cache.
        parts: tl.constexpr = tile // part
        slot = tl.program_id(0) // (parts * parts)
        out = (tl.program_id(0) // parts) % parts * part + tl.arange(0, part)
        beside = tl.program_id(0) % parts * part + tl.arange(0, part)
        grad += _row_of(slot, slots, rows) * tile
        x += tl.load(columns + slot) * tile
        total = tl.zeros((part, part), tl.float32)
        for start in range(0, tokens, depth):
            token = start + tl.arange(0, depth).to(tl.int64)
            present = token < tokens
            upstream = tl.load(grad + out[:, None] + token[None, :] * grad_stride, mask=present[None, :], other=0.0)
            values = tl.load(x + token[:, None] * x_stride + beside[None, :], mask=present[:, None], other=0.0)
            total = _add_product(upstream, values, total, precision)
        target = gradient + slot.to(tl.int64) * tile * tile + out[:, None] * tile + beside[None, :]
        tl.store(target, total.to(gradient.dtype.element_ty))
