"""The native kernel: the C++ in ops/native/, on a CPU. It is compiled on first use (see ops/native_library.py)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparseift_llm.ops.native_library import native_library
from sparseift_llm.topology.blocks import row_starts, rows_of_slots

_NO_MEMORY = 2  # of enum Outcome in kernels.h


class _NativeFeedForward:
    """A feed-forward block in one pass; the activation lives in cache, a few hundred tokens at a time."""

    def forward(
        self,
        x: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        up_columns: Tensor,
        hidden_features: int,
        down: Tensor,
        down_bias: Tensor | None,
        down_columns: Tensor,
        out_features: int,
    ) -> Tensor:
        """As `FusedFeedForward.forward`."""
        x, size = _unit_stride(x), up.shape[1]
        y = torch.empty(len(x), out_features, dtype=x.dtype)
        _call(
            "feed_forward", x.dtype, x, x.stride(0), len(x), x.shape[1] // size, up.contiguous(), len(up),
            _contiguous(up_bias), *_row_map(up, up_columns, hidden_features), hidden_features // size,
            down.contiguous(), len(down), _contiguous(down_bias), *_row_map(down, down_columns, out_features),
            out_features // size, y, size,
        )  # fmt: skip
        return y

    def gradient(
        self,
        grad: Tensor,
        x: Tensor,
        up_tiles: tuple[Tensor, ...],
        up_bias: Tensor | None,
        hidden_features: int,
        down_tiles: tuple[Tensor, ...],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """As `FusedFeedForward.gradient`."""
        (up, up_columns, *up_index), (down, _, *down_index) = up_tiles, down_tiles
        grad, x, size, out_features = _unit_stride(grad), _unit_stride(x), up.shape[1], grad.shape[1]
        shapes = (x.shape, up.shape, (hidden_features,), down.shape)
        results = [
            torch.empty(shape, dtype=x.dtype) if want else None for shape, want in zip(shapes, needed, strict=True)
        ]
        _call(
            "feed_forward_gradient", x.dtype, grad, grad.stride(0), x, x.stride(0), len(x), x.shape[1] // size,
            up.contiguous(), len(up), _contiguous(up_bias), *_row_map(up, up_columns, hidden_features),
            *_column_map(up, up_index, hidden_features), hidden_features // size, down.contiguous(), len(down),
            *_column_map(down, down_index, out_features), out_features // size, *results, size,
        )  # fmt: skip
        return results


class NativeKernel:
    """float32, float64 and bfloat16 on a CPU; the side of a tile is a multiple of 4."""

    name = "native"
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    smallest_fast_tile = 16
    remedy = "install a C++ compiler (on Linux), or use larger tiles (block_size)"
    fused = _NativeFeedForward()

    def is_available(self) -> bool:
        """Whether the C++ is, or can be, compiled here; the first call may take half a minute."""
        return native_library() is not None

    def supports(self, device: str, dtype: torch.dtype, block_size: int) -> bool:
        """Whether device, dtype and tile are such."""
        return device == "cpu" and dtype in self.dtypes and block_size % 4 == 0

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, out_features: int) -> Tensor:
        """As `Kernel.forward`."""
        return _gather(x, weight, True, _row_map(weight, columns, out_features), bias)

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
        return _gather(grad, weight, False, _column_map(weight, (slots_by_column, column_starts), out_features), None)

    def weight_gradient(self, grad: Tensor, x: Tensor, columns: Tensor, block_size: int) -> Tensor:
        """As `Kernel.weight_gradient`."""
        grad, x = _unit_stride(grad), _unit_stride(x)
        result = torch.empty(len(columns), block_size, block_size, dtype=x.dtype)
        out_blocks, in_blocks = grad.shape[1] // block_size, x.shape[1] // block_size
        _, rows, _ = _fixed_index(len(columns), out_blocks)
        _call(
            "outer", x.dtype, grad, grad.stride(0), out_blocks, x, x.stride(0), in_blocks, len(x), rows,
            columns.contiguous(), len(columns), result, block_size,
        )  # fmt: skip
        return result

    def scratch_bytes(self) -> int:
        """Bytes of packed operands that threads keep for the next call. Torch's allocator does not count them."""
        library = native_library()
        if library is None:
            return 0
        library.scratch_bytes.restype = ctypes.c_int64
        return int(library.scratch_bytes())

    def release_scratch(self) -> None:
        """Give back what `scratch_bytes` counts; not to be called while another thread multiplies."""
        library = native_library()
        if library is not None:
            library.release_scratch()


NATIVE = NativeKernel()


def _row_map(weight: Tensor, columns: Tensor, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """For a product with W^T: where each output block's entries begin, their input blocks, and their tiles."""
    starts, _, slots = _fixed_index(len(weight), out_features // weight.shape[1])
    return starts, columns.contiguous(), slots


def _column_map(weight: Tensor, by_column: Sequence[Tensor], out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a product with W; `by_column`: its slots by column, and where each column begins."""
    slots, starts = by_column
    _, rows, _ = _fixed_index(len(weight), out_features // weight.shape[1])
    return starts.contiguous(), rows[slots.long()], slots.contiguous()


@functools.lru_cache(maxsize=64)
def _fixed_index(num_tiles: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """What no mask update changes: the rows' first slots, the slots' rows, and the slots' numbers; read only."""
    with torch.device("cpu"):
        rows = rows_of_slots(num_tiles, num_rows).to(torch.int32)
        return row_starts(num_tiles, num_rows), rows, torch.arange(num_tiles, dtype=torch.int32)


def _gather(
    x: Tensor, weight: Tensor, transpose: bool, tile_map: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
) -> Tensor:
    """Output block j: sum over e in starts[j]..starts[j+1] of input block sources[e] times tile slots[e].

    Tiles are (output of this product, its input) when `transpose`, else the other way round.
    """
    size, out_blocks = weight.shape[1], len(tile_map[0]) - 1
    x, weight = _unit_stride(x), weight.contiguous()
    y = torch.empty(len(x), out_blocks * size, dtype=x.dtype)
    _call(
        "gather", x.dtype, x, x.stride(0), len(x), x.shape[1] // size, weight, int(transpose), len(weight),
        *tile_map, out_blocks, _contiguous(bias), y, size,
    )  # fmt: skip
    return y


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | None) -> None:
    """Call a kernel; tensors are passed as pointers, which `arguments` keeps alive."""
    library = native_library()
    if library is None:
        raise RuntimeError("the native block kernels need Linux and a C++ compiler; install one or use kernel 'blas'")
    function = library[f"{name}_{str(dtype).removeprefix('torch.')}"]
    converted = [
        ctypes.c_void_p(argument.data_ptr())
        if isinstance(argument, Tensor)
        else argument
        if argument is None
        else ctypes.c_int64(argument)
        for argument in arguments
    ]
    outcome = function(*converted)
    if outcome == _NO_MEMORY:
        raise torch.OutOfMemoryError("the native block kernels ran out of memory. Use smaller batches")
    if outcome != 0:
        raise RuntimeError(f"the native block kernels have no code for block size {arguments[-1]}")
