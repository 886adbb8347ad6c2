"""What the C++ entry points do with arguments that are in the wrong order, missing, or not what an index says."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseift_llm.ops.kernels import native
from sparseift_llm.ops.kernels.base import FeedForwardShape, Projection
from sparseift_llm.ops.kernels.native import NATIVE
from sparseift_llm.topology.blocks import by_column
from tests.helpers.block_cases import NEEDS_COMPILER, check, make_case
from tests.helpers.block_feed_forward_cases import make_case as make_feed_forward

pytestmark = NEEDS_COMPILER
Argument = Tensor | int | None


def linear() -> None:
    make_case().computed(NATIVE)


def feed_forward(gated: bool = False) -> None:
    # all sides, numbers of tiles and numbers of blocks differ, so that no two arguments look alike by chance
    case = make_feed_forward(block_counts=(2, 5, 3), tiles=(9, 7), gated=gated)
    up = Projection(case.up, case.up_bias, case.up_columns, by_column(case.up_columns, 5, 2))
    down = Projection(case.down, case.down_bias, case.down_columns, by_column(case.down_columns, 3, 5))
    gate = None
    if case.gate is not None and case.gate_columns is not None:
        gate = Projection(case.gate, case.gate_bias, case.gate_columns, by_column(case.gate_columns, 5, 2))
    shape = FeedForwardShape(80, 48, "gelu_tanh", gated, "hidden" if gated else "nothing")
    needed = [True, True, True, gated, gated, True]
    _, kept = NATIVE.fused.forward(case.x, up, gate, down, shape)
    NATIVE.fused.gradient(case.grad, case.x, kept, up, gate, down, shape, needed)


def gated_feed_forward() -> None:
    feed_forward(gated=True)


def calls_of(run: Callable[[], None]) -> dict[str, tuple[Argument, ...]]:
    """The arguments of the first call of every entry point that `run` makes."""
    calls: dict[str, tuple[Argument, ...]] = {}
    call = native._call

    def note(name: str, *arguments: Argument) -> None:
        calls.setdefault(name, arguments)
        call(name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_call", note)
        run()
    return calls


def look_alike(one: Argument, other: Argument) -> bool:
    """Whether two arguments have one dtype and one shape, so that the other's memory can be read in their place."""
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return tensors and (one.dtype, one.shape) == (other.dtype, other.shape)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("run", "name", "num_alike"),
    [
        (linear, "gather", 1),  # sources and tiles of the map
        (linear, "outer", 1),  # rows and columns of the tiles
        (feed_forward, "feed_forward", 2),
        (feed_forward, "feed_forward_gradient", 12),  # indices of as many tiles or rows; operands and their gradients
        (gated_feed_forward, "feed_forward", 11),  # what is up's and what is the gate's
        (gated_feed_forward, "feed_forward_gradient", 48),
    ],
)
def test_every_swapped_pair_is_an_error(run: Callable[[], None], name: str, num_alike: int) -> None:
    arguments = calls_of(run)[name]
    native._call(name, *arguments)
    alike = []
    for one, other in itertools.combinations(range(len(arguments)), 2):
        if arguments[one] is None and arguments[other] is None:
            continue
        swapped = list(arguments)
        swapped[one], swapped[other] = swapped[other], swapped[one]
        if look_alike(arguments[one], arguments[other]):
            alike.append((one, other))
            with contextlib.suppress(ValueError):  # the index may fit by its numbers, too: no memory is harmed
                native._call(name, *(item.clone() if isinstance(item, Tensor) else item for item in swapped))
            continue
        with pytest.raises((ValueError, ctypes.ArgumentError)):
            native._call(name, *swapped)
    assert len(alike) == num_alike, alike
    native._call(name, *arguments)


@pytest.mark.parametrize(
    ("run", "num_optional"),
    [
        (linear, {"gather": 1, "outer": 0}),
        (feed_forward, {"feed_forward": 2, "feed_forward_gradient": 5}),
        (gated_feed_forward, {"feed_forward": 3, "feed_forward_gradient": 8}),
    ],
)
def test_every_argument_is_checked(run: Callable[[], None], num_optional: dict[str, int]) -> None:
    """A shorter tensor, one of another dtype or with holes, and a missing one, wherever one is not optional."""
    for name, arguments in calls_of(run).items():
        missing_allowed = 0
        for place, argument in enumerate(arguments):
            if not isinstance(argument, Tensor):
                continue
            other_dtype = torch.float64 if argument.dtype == torch.float32 else torch.float32
            wrong: list[Any] = [argument[:-1], argument.to(other_dtype), argument[None], argument.tolist()]
            if argument.ndim != 2:  # activations may have holes between rows
                wrong.append(argument.repeat_interleave(2, 0)[::2])
            for value in wrong:
                with pytest.raises((ValueError, ctypes.ArgumentError, RuntimeError)):
                    native._call(name, *arguments[:place], value, *arguments[place + 1 :])
            try:
                native._call(name, *arguments[:place], None, *arguments[place + 1 :])
            except ValueError as error:
                assert "is missing" in str(error)  # noqa: PT017
            else:
                missing_allowed += 1
        assert missing_allowed == num_optional[name], name


@pytest.mark.parametrize("value", [-1, 5, 2**30])
@pytest.mark.parametrize("place", [4, 5])
def test_an_index_outside_is_an_error(value: int, place: int) -> None:
    """The C++ would read memory that is not the tensor's."""
    arguments = list(calls_of(lambda: make_case(num_tiles=5).computed(NATIVE))["gather"])
    index = arguments[place]
    assert isinstance(index, Tensor)
    arguments[place] = index.clone()
    arguments[place][2] = value  # type: ignore[index]
    with pytest.raises(ValueError, match=rf"gather.*map must be at least 0 and below \d, got {value}"):
        native._call("gather", *arguments)


@pytest.mark.parametrize("starts", [[0, 3, 2, 7], [1, 2, 4, 7], [0, 2, 4, 8], [0, 2, 4, 6]])
def test_starts_that_do_not_ascend_over_all_entries_are_an_error(starts: list[int]) -> None:
    case = make_case()
    arguments = list(calls_of(lambda: NATIVE.forward(case.x, case.weight, None, case.columns, 48))["gather"])  # type: ignore[arg-type, return-value]
    arguments[3] = torch.tensor(starts, dtype=torch.int32)
    with pytest.raises(ValueError, match="map must ascend from 0 to the number of its entries"):
        native._call("gather", *arguments)


def test_columns_outside_of_the_matrix_are_an_error() -> None:
    case = make_case()
    check(case, NATIVE)
    case.columns[0] = case.num_columns
    with pytest.raises(ValueError, match="below 5, got 5"):
        NATIVE.forward(case.x, case.weight, case.bias, case.columns, case.out_features)
    with pytest.raises(ValueError, match="columns must be at least 0 and below 5, got 5"):
        NATIVE.weight_gradient(case.grad, case.x, case.columns, case.block_size)


def test_a_tensor_on_another_device_is_an_error() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"on the CPU, got \(7, 16, 16\) of torch.float32 on meta"):
        NATIVE.forward(case.x, case.weight.to("meta"), case.bias, case.columns, case.out_features)
