"""The native kernel: the C++ in ops/native/, on a CPU. It is compiled on first use (see ops/native_library.py)."""

from __future__ import annotations

import ctypes
import enum
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseift_llm.ops.kernels.base import FeedForwardShape, Kept, Projection
from sparseift_llm.ops.native_library import native_library
from sparseift_llm.topology.blocks import rows_of_slots
from sparseift_llm.topology.groups import row_starts


class _Outcome(enum.IntEnum):
    """What an entry point returns, as in ops/native/arguments.h."""

    DONE = 0
    NO_CODE = 1
    NO_MEMORY = 2
    WRONG_ARGUMENT = 3


class _Array(ctypes.Structure):
    """A tensor as ops/native/arguments.h receives it, with its dtype and shape."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("num_sides", ctypes.c_int64),
        ("shape", ctypes.c_int64 * 3),
        ("stride", ctypes.c_int64),
    )
    _TYPES: ClassVar = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.int32: 3}

    @classmethod
    def of(cls, tensor: Tensor) -> _Array:
        """Describe a tensor of one to three sides. The tensor must outlive the description."""
        if tensor.device.type != "cpu" or tensor.dtype not in cls._TYPES or not 1 <= tensor.ndim <= 3:
            found = f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            raise ValueError(f"the native block kernels read tensors of one to three sides on the CPU, got {found}")
        if tensor.ndim > 1 and tensor.numel() and not tensor[0].is_contiguous():
            raise ValueError("the native block kernels read tensors that are contiguous but for their first side")
        shape = (*tensor.shape, 1, 1)[:3]
        return cls(tensor.data_ptr(), cls._TYPES[tensor.dtype], tensor.ndim, shape, tensor.stride(0))


_POINTER = ctypes.POINTER(_Array)
# The arguments are described where they are received: in ops/native/linear.cpp and feed_forward.cpp.
_ENTRY_POINTS: dict[str, tuple[Any, ...]] = {
    "gather": (_POINTER, _POINTER, ctypes.c_int64, *[_POINTER] * 5),
    "outer": (_POINTER,) * 5,
    "feed_forward": (_POINTER, ctypes.c_int64, *[_POINTER] * 18),
    "feed_forward_gradient": (_POINTER, _POINTER, ctypes.c_int64, *[_POINTER] * 28),
}
# As ops/native/activations.h numbers them.
_ACTIVATIONS = {"gelu_tanh": 0, "gelu_erf": 1, "silu": 2, "relu": 3, "relu_squared": 4}


class _NativeFeedForward:
    """A feed-forward block in one pass; the activation lives in cache, a few hundred tokens at a time."""

    def supports(self, shape: FeedForwardShape) -> bool:
        """Whether the activation is not to be kept: to read it from memory takes no less time than to compute it."""
        return shape.activation in _ACTIVATIONS and shape.keep in ("nothing", "hidden")

    def forward(
        self, x: Tensor, up: Projection, gate: Projection | None, down: Projection, shape: FeedForwardShape
    ) -> tuple[Tensor, Kept]:
        """As `FusedFeedForward.forward`."""
        x = _unit_stride(x)
        y = torch.empty(len(x), shape.out_features, dtype=x.dtype)
        hidden, gate_hidden = (
            torch.empty(len(x), shape.hidden_features, dtype=x.dtype) if is_there and shape.keep == "hidden" else None
            for is_there in (True, gate is not None)
        )
        _call(
            "feed_forward", x, _ACTIVATIONS[shape.activation], *_by_rows(up, shape.hidden_features),
            *_by_rows(gate, shape.hidden_features), *_by_rows(down, shape.out_features), y, hidden, gate_hidden,
        )  # fmt: skip
        return y, Kept(hidden, gate_hidden, None)

    def gradient(
        self,
        grad: Tensor,
        x: Tensor,
        kept: Kept,
        up: Projection,
        gate: Projection | None,
        down: Projection,
        shape: FeedForwardShape,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """As `FusedFeedForward.gradient`; what was not kept is computed again."""
        grad, x = _unit_stride(grad), _unit_stride(x)
        bias, of_gate = (shape.hidden_features,), (0,) if gate is None else gate.weight.shape
        shapes = (x.shape, up.weight.shape, bias, of_gate, bias, down.weight.shape)
        gradients = [torch.empty(of, dtype=x.dtype) if want else None for of, want in zip(shapes, needed, strict=True)]
        _call(
            "feed_forward_gradient", grad, x, _ACTIVATIONS[shape.activation],
            *_by_rows(up, shape.hidden_features), *_column_map(up.by_column),
            *_by_rows(gate, shape.hidden_features), *((None,) * 3 if gate is None else _column_map(gate.by_column)),
            down.weight.contiguous(), *_column_map(down.by_column),
            _contiguous(kept.hidden), _contiguous(kept.gate), *gradients,
        )  # fmt: skip
        return gradients


class NativeKernel:
    """float32, float64 and bfloat16 on a CPU; the side of a tile is a multiple of 4."""

    name = "native"
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    smallest_fast_tile = 16
    remedy = "install a C++ compiler (on Linux), or use larger tiles (block_size)"
    fused = _NativeFeedForward()

    def is_available(self) -> bool:
        """Whether the C++ is, or can be, compiled here; the first call may take a minute."""
        return native_library() is not None

    def supports(self, device: str, dtype: torch.dtype, block_size: int) -> bool:
        """Whether device, dtype and tile are such."""
        return device == "cpu" and dtype in self.dtypes and block_size % 4 == 0

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, out_features: int) -> Tensor:
        """As `Kernel.forward`."""
        return _gather(x, weight, True, _row_map(weight, columns, out_features), bias)

    def input_gradient(
        self, grad: Tensor, weight: Tensor, by_column: Sequence[Tensor], out_features: int, in_features: int
    ) -> Tensor:
        """As `Kernel.input_gradient`."""
        return _gather(grad, weight, False, _column_map(by_column), None)

    def weight_gradient(self, grad: Tensor, x: Tensor, columns: Tensor, block_size: int) -> Tensor:
        """As `Kernel.weight_gradient`."""
        grad, x = _unit_stride(grad), _unit_stride(x)
        result = torch.empty(len(columns), block_size, block_size, dtype=x.dtype)
        _, rows, _ = _fixed_index(len(columns), grad.shape[1] // block_size)
        _call("outer", grad, x, rows, columns.contiguous(), result)
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
    """(starts, sources, tiles) for a product with W^T: an output block is a block-row, and its sources are columns."""
    starts, _, slots = _fixed_index(len(weight), out_features // weight.shape[1])
    return starts, columns.contiguous(), slots


def _by_rows(projection: Projection | None, out_features: int) -> tuple[Tensor | None, ...]:
    """Tiles, bias and map of a product with W^T as the C++ takes them; five times nothing for no projection."""
    if projection is None:
        return (None,) * 5
    weight = projection.weight.contiguous()
    return weight, _contiguous(projection.bias), *_row_map(weight, projection.columns, out_features)


def _column_map(by_column: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(starts, sources, tiles) for a product with W."""
    slots, rows, starts, _ = by_column
    return starts.contiguous(), rows.contiguous(), slots.contiguous()


@functools.lru_cache(maxsize=64)
def _fixed_index(num_tiles: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """What no mask update changes: first slot of every block-row, block-row of every slot, number of every slot.

    All calls share the tensors, so they must not be written to.
    """
    with torch.device("cpu"):
        rows = rows_of_slots(num_tiles, num_rows).to(torch.int32)
        return row_starts(num_tiles, num_rows), rows, torch.arange(num_tiles, dtype=torch.int32)


def _gather(
    x: Tensor, weight: Tensor, transpose: bool, tile_map: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
) -> Tensor:
    """Output block j: the sum over e, starts[j] <= e < starts[j + 1], of input block sources[e] times tile tiles[e].

    `tile_map` is (starts, sources, tiles). A tile is (output, input) of this product if `transpose`, else the reverse.
    """
    size, out_blocks = weight.shape[1], len(tile_map[0]) - 1
    x, weight = _unit_stride(x), weight.contiguous()
    y = torch.empty(len(x), out_blocks * size, dtype=x.dtype)
    _call("gather", x, weight, transpose, *tile_map, _contiguous(bias), y)
    return y


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _call(name: str, *arguments: Tensor | int | None) -> None:
    """Call an entry point of the C++ library, which checks all dtypes and sizes.

    Raises:
        ValueError: tensors do not fit together, or a tensor is not on the CPU.
        RuntimeError: there is no library, or no code for such tiles.
        torch.OutOfMemoryError: there is no memory for packed operands.
    """
    library = native_library()
    if library is None:
        raise RuntimeError("the native block kernels need Linux and a C++ compiler; install one or use kernel 'blas'")
    function = getattr(library, name)
    function.argtypes = _ENTRY_POINTS[name]
    given = [_Array.of(argument) if isinstance(argument, Tensor) else argument for argument in arguments]
    outcome = function(*(ctypes.byref(item) if isinstance(item, _Array) else item for item in given))
    if outcome == _Outcome.NO_MEMORY:
        raise torch.OutOfMemoryError("the native block kernels ran out of memory. Use smaller batches")
    if outcome != _Outcome.DONE:
        library.last_mistake.restype = ctypes.c_char_p
        mistake = library.last_mistake().decode()
        if outcome == _Outcome.NO_CODE:
            raise RuntimeError(f"the native block kernels {mistake}")
        raise ValueError(f"the native block kernel {name} was given tensors that do not fit together: {mistake}")
