"""The Triton kernels with operands read by TMA: the same bits as without, and never where it cannot read them.

In Triton's interpreter, which follows a descriptor as a Hopper GPU does. What the compiler makes of these kernels is in
test_block_triton_compile.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseift_llm.ops.kernels import triton_code, triton_descriptors, triton_launch, triton_tuning
from sparseift_llm.ops.kernels.choice import use_block_kernel
from sparseift_llm.ops.kernels.triton_descriptors import may_describe
from tests.helpers.block_feed_forward_cases import make_case
from tests.helpers.block_triton_cases import CHECKS, DEVICE, check, problem, run

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="this GPU has no TMA"
)
KERNELS = (triton_tuning.product, triton_tuning.weight_gradient)


@pytest.fixture(autouse=True)
def wanted() -> Iterator[None]:
    triton_descriptors.use_tma(True)
    yield
    triton_descriptors.use_tma(None)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the matrices for which descriptors are made from now on."""
    found: list[tuple[int, ...]] = []
    make = triton_descriptors.rectangles

    def noted(matrix: Tensor, *size: int) -> Any:
        found.append(tuple(matrix.shape))
        return make(matrix, *size)

    monkeypatch.setattr(triton_descriptors, "rectangles", noted)
    return found


def use_configurations(monkeypatch: pytest.MonkeyPatch, tma: int, token_block: int = 64, paired: int = 0) -> None:
    """One of each kernel, so that nothing is tuned."""
    for kernel, sizes in zip(KERNELS, ({"token_block": token_block}, {"paired": paired}), strict=True):
        config = triton.Config({**sizes, "tma": tma}, num_warps=8, num_stages=3)
        monkeypatch.setattr(kernel, "configs", [config])


@pytest.mark.usefixtures("sums_in_order")
@pytest.mark.parametrize(
    ("tile", "tokens", "token_block", "paired", "dtype"),
    [
        (64, 19, 64, 0, torch.bfloat16), (64, 131, 128, 1, torch.float16), (128, 259, 256, 0, torch.bfloat16),
        (256, 70, 64, 1, torch.bfloat16),
    ],
)  # fmt: skip
def test_products_have_the_same_bits(
    tile: int, tokens: int, token_block: int, paired: int, dtype: torch.dtype, described: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Token counts are ragged, block-rows uneven, and tiles of 256 are computed in parts."""
    given = problem(tile, 2, 3, 5, tokens, dtype, first_column=0)
    use_configurations(monkeypatch, 0, token_block, paired)
    expected = run(given)
    assert not described
    use_configurations(monkeypatch, 1, token_block, paired)
    found = run(given)
    assert len(described) == 6, "two operands of each of three products"
    for name, value in found.items():
        CHECKS[name](given, value)
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("pieces", [2, 3])
def test_pieces_of_tokens(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rectangle ends with its piece, the last one with the tokens."""
    monkeypatch.setattr(triton_launch, "token_pieces", lambda programs, tokens: pieces)
    use_configurations(monkeypatch, 1)
    given = problem(64, 2, 2, 3, 290, torch.bfloat16)
    CHECKS["weight_gradient"](given, run(given)["weight_gradient"])


@pytest.mark.usefixtures("sums_in_order")
@pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter")
@pytest.mark.parametrize(("gated", "activation"), [(False, "gelu_tanh"), (True, "silu")])
def test_feed_forward_blocks_have_the_same_bits(
    gated: bool, activation: str, described: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a gated one the input gradient is two products, each with descriptors of its own."""
    case = make_case(
        tokens=70, size=64, block_counts=(1, 2, 1), tiles=(2, 1), dtype=torch.bfloat16, gated=gated,
        activation=activation,
    )  # fmt: skip
    use_block_kernel("triton")
    try:
        use_configurations(monkeypatch, 0)
        expected = case.computed("hidden")
        assert not described
        use_configurations(monkeypatch, 1)
        found = case.computed("hidden")
    finally:
        use_block_kernel(None)
    assert len(described) == (18 if gated else 12)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_rectangle_that_misses_a_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    use_configurations(monkeypatch, 1)
    make = triton_descriptors.rectangles

    def short(matrix: Tensor, *size: int) -> Any:
        descriptor = make(matrix, *size)
        descriptor.shape[0] -= 1
        return descriptor

    given = problem(64, 2, 3, 5, 19, torch.bfloat16)
    monkeypatch.setattr(triton_descriptors, "rectangles", short)
    for name, value in run(given).items():
        with pytest.raises(AssertionError, match="error"):
            CHECKS[name](given, value)


def at_an_odd_address(matrix: Tensor) -> Tensor:
    return torch.empty(matrix.numel() + 1, dtype=matrix.dtype, device=DEVICE)[1:].view(matrix.shape).copy_(matrix)


def with_odd_rows(matrix: Tensor) -> Tensor:
    surrounding = torch.full((len(matrix), matrix.shape[1] + 4), torch.nan, dtype=matrix.dtype, device=DEVICE)
    return surrounding[:, : matrix.shape[1]].copy_(matrix)


def one_row_for_all(matrix: Tensor) -> Tensor:
    return matrix[:1].expand(matrix.shape)


@pytest.mark.parametrize("layout", [at_an_odd_address, with_odd_rows, one_row_for_all])
def test_operands_that_it_cannot_read_are_read_without(
    layout: Callable[[Tensor], Tensor], described: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_configurations(monkeypatch, 1)
    given = problem(64, 2, 3, 5, 19, torch.bfloat16)
    assert may_describe(given.x, given.weight)
    given = replace(given, x=layout(given.x), grad=layout(given.grad))
    assert not may_describe(given.x, given.weight)
    check(given)
    assert not described


@pytest.mark.parametrize(
    ("tile", "slots", "tokens", "dtype"),
    [(32, 5, 19, torch.bfloat16), (64, 5, 19, torch.float32), (64, 5, 16, torch.float16), (64, 0, 19, torch.bfloat16)],
)
def test_products_that_it_is_not_for(
    tile: int, slots: int, tokens: int, dtype: torch.dtype, described: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Small tiles, of which a step reads several; float32; few tokens; no tiles."""
    use_configurations(monkeypatch, 1)
    given = problem(tile, 2, 3, slots, tokens, dtype)
    found = run(given)
    assert all(shape == tuple(given.x.shape) or shape == tuple(given.grad.shape) for shape in described), "of tiles"
    for name, value in found.items():
        CHECKS[name](given, value)


def test_strided_rows_are_read_by_it(described: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What surrounds them is nan."""
    use_configurations(monkeypatch, 1)
    given = problem(64, 2, 3, 5, 19, torch.bfloat16)

    def inside(matrix: Tensor) -> Tensor:
        tokens, width = matrix.shape
        surrounding = torch.full((tokens + 9, width + 48), torch.nan, dtype=matrix.dtype, device=DEVICE)
        return surrounding[4 : tokens + 4, 16 : width + 16].copy_(matrix)

    check(replace(given, x=inside(given.x), grad=inside(given.grad)))
    assert len(described) == 6


def test_it_is_off_until_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(64, 64, dtype=torch.bfloat16, device=DEVICE)
    triton_descriptors.use_tma(None)
    for word, expected in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("SPARSEIFT_BLOCK_TMA", word)
        assert may_describe(x) is expected
    triton_descriptors.use_tma(False)
    assert not may_describe(x)
    triton_descriptors.use_tma(None)
    monkeypatch.setenv("SPARSEIFT_BLOCK_TMA", "yes")
    with pytest.raises(ValueError, match="SPARSEIFT_BLOCK_TMA='yes' is not one of '0', '1'"):
        may_describe(x)


@pytest.mark.parametrize(("capability", "expected"), [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_only_gpus_that_have_it_use_it(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_code, "INTERPRETED", triton.language.constexpr(False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert may_describe(torch.zeros(64, 64, dtype=torch.bfloat16, device=DEVICE)) is expected


def test_the_tuner_is_offered_it_where_operands_allow_it() -> None:
    configs = [triton.Config({"token_block": 64, "tma": tma}) for tma in (0, 1)]
    arguments = {"weight": torch.empty(0, dtype=torch.bfloat16), "part": 64, "token_bucket": 9}
    for can_describe in (0, 1):
        found = triton_tuning.fitting(configs, {**arguments, "can_describe": can_describe})
        assert found == configs[: 1 + can_describe]


class Clock:
    """A driver in whose benchmarks every configuration takes as long, so that the first one is chosen."""

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
            call()
            return [1.0 for _ in quantiles]

        return benchmark


@pytest.fixture
def two_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TMA first, so that it is taken if it can be launched."""
    configs = [triton.Config({"token_block": 64, "tma": tma}, num_warps=4, num_stages=3) for tma in (1, 0)]
    monkeypatch.setattr(triton_tuning.product, "configs", configs)
    monkeypatch.setattr(triton_tuning.product, "cache", {})
    monkeypatch.setattr(triton.runtime.driver, "_active", Clock())  # reset_active() would look for a GPU


@pytest.mark.usefixtures("two_configurations")
@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a driver")
def test_a_configuration_that_cannot_be_launched_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = problem(64, 2, 3, 5, 19, torch.bfloat16)
    CHECKS["forward"](given, run(given)["forward"])
    assert [config.kwargs["tma"] for config in triton_tuning.product.cache.values()] == [1, 1]

    def refused(*_: Any) -> Any:
        raise RuntimeError("Triton Error [CUDA]: invalid argument")

    monkeypatch.setattr(triton_descriptors, "rectangles", refused)
    triton_tuning.product.cache.clear()
    with caplog.at_level(logging.WARNING):
        CHECKS["forward"](given, run(given)["forward"])
    assert "could not be launched and is left out: Triton Error [CUDA]: invalid argument" in caplog.text
    assert [config.kwargs["tma"] for config in triton_tuning.product.cache.values()] == [0, 0]
    monkeypatch.setattr(triton_tuning.product, "configs", triton_tuning.product.configs[:1])
    with pytest.raises(RuntimeError, match="invalid argument"):  # nothing is left to choose from
        run(given)


@pytest.mark.usefixtures("two_configurations")
@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a driver")
def test_too_little_memory_for_tuning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton_descriptors, "rectangles", refused)
    with pytest.raises(torch.OutOfMemoryError):
        run(problem(64, 2, 3, 5, 19, torch.bfloat16))


@pytest.mark.usefixtures("two_configurations")
def test_a_lost_context_is_an_error_and_no_property_of_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert triton_tuning.seconds_of(refused, (0.5,)) == [float("inf")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", refused)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        triton_tuning.seconds_of(refused, (0.5,))
