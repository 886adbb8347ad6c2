"""A feed-forward block on the Triton kernels, in their interpreter: what a product does before it is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseift_llm.ops.activations import ACTIVATIONS
from sparseift_llm.ops.block_feed_forward import KEEP, block_feed_forward_op
from sparseift_llm.ops.kernels import triton_launch, triton_tuning
from sparseift_llm.ops.kernels.choice import use_block_kernel
from sparseift_llm.ops.kernels.composed import ComposedFeedForward
from tests.helpers.block_feed_forward_cases import Case, check, errors, make_case

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter")


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And not by the composition of single products, which is there for kernels without such code."""

    def refuse(*_: Any) -> None:
        raise AssertionError("composed")

    monkeypatch.setattr(ComposedFeedForward, "forward", refuse)
    monkeypatch.setattr(ComposedFeedForward, "gradient", refuse)
    use_block_kernel("triton")
    yield
    use_block_kernel(None)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_equals_the_dense_one(activation: str, gated: bool) -> None:
    check(make_case(activation=activation, gated=gated), "hidden")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("gated", "activation"), [(False, "gelu_tanh"), (True, "silu")])
def test_narrow_dtypes(dtype: torch.dtype, gated: bool, activation: str) -> None:
    case = make_case(dtype=dtype, gated=gated, activation=activation, bias=False, layout="strided")
    found = errors(case, case.computed("all"))
    assert max(found.values()) <= 2, found  # the interpreter cuts bfloat16 off


@pytest.mark.usefixtures("sums_in_order")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("keep", KEEP)
def test_what_is_kept_changes_no_bit(keep: str, gated: bool) -> None:
    case = make_case(gated=gated, tokens=70, block_counts=(1, 2, 1), tiles=(2, 2))
    computed = case.computed(keep)
    assert max(errors(case, computed).values()) <= 1
    assert all(torch.equal(value, computed[name]) for name, value in case.computed("nothing").items())


@pytest.mark.parametrize(("tokens", "tiles"), [(1, (4, 6)), (16, (4, 6)), (129, (2, 2))])
def test_few_tokens_and_empty_rows_and_columns(tokens: int, tiles: tuple[int, int]) -> None:
    check(make_case(tokens=tokens, tiles=tiles, gated=True, activation="silu"), "hidden")


def test_no_tokens() -> None:
    computed = make_case(tokens=0, gated=True).computed("hidden")
    assert not any(value.any() for name, value in computed.items() if name != "down_bias")


def test_no_tiles() -> None:
    """Every product is its bias then, and the activation that of a bias."""
    case = make_case(gated=True)
    nothing, nowhere = case.up[:0], case.up_columns[:0]
    empty = Case(
        case.x, nothing, case.up_bias, nowhere, nothing, case.down_bias, nowhere, case.grad, case.block_counts,
        nothing, case.gate_bias, nowhere,
    )  # fmt: skip
    y, hidden, gate, _ = block_feed_forward_op(*empty.arguments("hidden"))
    for value, bias in ((y, case.down_bias), (hidden, case.up_bias), (gate, case.gate_bias)):
        assert bias is not None
        assert torch.equal(value, bias.expand_as(value))


@pytest.mark.usefixtures("sums_in_order")
@pytest.mark.parametrize("token_block", [64, 128, 256])
def test_every_configuration_gives_the_same_bits(token_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tokens=259, block_counts=(1, 2, 1), tiles=(2, 1), gated=True, activation="silu")
    first = case.computed("hidden")
    configs = [triton.Config({"token_block": token_block}, num_warps=8, num_stages=3)]
    monkeypatch.setattr(triton_tuning.product, "configs", configs)
    for _ in range(2):
        assert all(torch.equal(first[name], value) for name, value in case.computed("hidden").items())


@pytest.mark.parametrize("tile", [64, 128])
def test_large_tiles_are_finished_a_piece_at_a_time(tile: int) -> None:
    check(make_case(tokens=33, block_counts=(1, 2, 1), tiles=(2, 1), size=tile, gated=True), "hidden")
    check(make_case(tokens=33, block_counts=(1, 2, 1), tiles=(1, 2), size=tile, activation="gelu_erf"), "all")


def test_every_number_is_written_and_none_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: list[Tensor] = []

    def poisoned(shape: tuple[int, ...], **options: Any) -> Tensor:
        size = torch.Size(shape).numel()
        buffers.append(torch.full((size + 20000,), torch.nan, **options))
        return buffers[-1][10000 : 10000 + size].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    case = make_case(tokens=65, tiles=(2, 2), gated=True)
    computed = case.computed("hidden")
    monkeypatch.undo()
    use_block_kernel("triton")
    assert not any(value.isnan().any() for value in computed.values())
    assert len(buffers) >= 9
    for buffer in buffers:
        assert buffer.isnan().sum() == 20000


@pytest.mark.parametrize("fault", ["gradient of the gate", "token sums", "slope"])
def test_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tokens=70, gated=True, activation="silu")
    launched = triton_launch.product

    def broken(*args: Any, **options: Any) -> Tensor:
        result = launched(*args, **options)
        epilogue = args[4] if len(args) > 4 else None
        if epilogue is not None and epilogue.grad_gate is not None:
            if fault == "gradient of the gate":
                epilogue.grad_gate[-1] = 0
            elif fault == "token sums":
                epilogue.sums[-1] = 0
            else:
                result *= 1.001
        return result

    monkeypatch.setattr("sparseift_llm.ops.kernels.triton_feed_forward.product", broken)
    assert max(errors(case, case.computed("hidden")).values()) > 50


def test_opcheck() -> None:
    case = make_case(tokens=5, gated=True)
    arguments = tuple(
        value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in case.arguments("hidden")
    )
    torch.library.opcheck(block_feed_forward_op, arguments)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])
def test_special_values_stay_with_their_token(value: float) -> None:
    case = make_case(bias=False)
    case.x[3, :] = value
    found = case.computed("hidden")
    assert found["y"][:3].isfinite().all()
    assert found["y"][4:].isfinite().all()
    assert found["x"][:3].isfinite().all()
