"""A feed-forward block in tiles, as one operator: against a float64 dense reference, with faults it must catch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from sparseift_llm.ops import block_feed_forward
from sparseift_llm.ops.activations import ACTIVATIONS
from sparseift_llm.ops.block_feed_forward import KEEP, block_feed_forward_op, keep_activations, kept_on
from sparseift_llm.ops.kernels.base import FeedForwardShape
from sparseift_llm.ops.kernels.choice import use_block_kernel
from sparseift_llm.ops.kernels.native import NATIVE
from tests.helpers.block_cases import LAYOUTS, NEEDS_COMPILER, num_threads
from tests.helpers.block_feed_forward_cases import GRADIENTS, Case, check, errors, make_case

KERNELS = ["reference", "blas", pytest.param("native", marks=NEEDS_COMPILER)]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    use_block_kernel(request.param)
    yield request.param
    use_block_kernel(None)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    inputs, hidden, outputs = counts = (draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 4)))
    return make_case(
        tokens=draw(st.sampled_from([0, 1, 5, 12, 13, 23, 25, 239, 241, 481, 613])),
        block_counts=counts,
        tiles=(draw(st.integers(1, inputs * hidden)), draw(st.integers(1, hidden * outputs))),
        size=draw(st.sampled_from([4, 8, 16, 32])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**20)),
        activation=draw(st.sampled_from(["gelu_tanh", *ACTIVATIONS])),
        gated=draw(st.booleans()),
    )


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=40)
@given(case=cases(), keep=st.sampled_from(KEEP))
def test_equals_the_dense_one(name: str, case: Case, keep: str) -> None:
    use_block_kernel(name)
    try:
        check(case, keep)
    finally:
        use_block_kernel(None)


def test_what_is_kept_is_said_once_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [kept_on(device, "gelu_tanh", False) for device in ("cpu", "cuda")] == ["nothing", "hidden"]
    assert [kept_on("cpu", *block) for block in (("gelu_tanh", True), ("silu", False))] == ["hidden", "hidden"]
    keep_activations("all")
    try:
        assert kept_on("cpu", "gelu_tanh", False) == "all"
        with pytest.raises(ValueError, match=r"keep.*'hiden'.*hidden"):
            keep_activations("hiden")
    finally:
        keep_activations(None)
    monkeypatch.setattr(block_feed_forward, "_keep", "everything")  # as it comes from the environment
    with pytest.raises(ValueError, match="SPARSEIFT_BLOCK_KEEP"):
        kept_on("cpu", "gelu_tanh", False)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("keep", KEEP)
def test_memory_between_the_passes_is_what_the_setting_says(kernel: str, keep: str, gated: bool) -> None:
    case = make_case(gated=gated)
    _, *kept = block_feed_forward_op(*case.arguments(keep))
    size = 37 * 80 * 4  # tokens, hidden features, bytes
    assert sum(tensor.nbytes for tensor in kept) == size * {"nothing": 0, "hidden": 1 + gated, "all": 2 + gated}[keep]


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_tiles(kernel: str, size: int, dtype: torch.dtype) -> None:
    check(make_case(tokens=530, block_counts=(2, 4, 1), tiles=(4, 2), size=size, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_memory_may_hold_anything_before(
    kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    for gated in (False, True):
        check(make_case(dtype=dtype, tiles=(2, 2), gated=gated))  # fewer tiles than block-rows: some outputs have none


FAULTS = ["up column", "gate column", "gate and up", "down slot", "bias", "gelu", "last token", "bfloat16 weights"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(kernel: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(gated=fault.startswith("gate"))
    computed = case.computed()
    if fault == "up column":
        computed = replace(case, up_columns=1 - case.up_columns).computed()
    elif fault == "gate column":
        assert case.gate_columns is not None
        computed = replace(case, gate_columns=1 - case.gate_columns).computed()
    elif fault == "gate and up":
        computed["up"], computed["gate"] = computed["gate"], computed["up"]
    elif fault == "down slot":
        computed = replace(case, down=case.down.roll(1, 0)).computed()
    elif fault == "bias":
        assert case.up_bias is not None
        computed = replace(case, up_bias=torch.zeros_like(case.up_bias)).computed()
    elif fault == "bfloat16 weights":
        computed = replace(case, up=case.up.bfloat16().float()).computed()
    elif fault == "gelu":
        wrong = replace(case, activation="gelu_erf").expected()
        computed = {name: value.float() for name, value in wrong.items()}
    else:
        computed["x"][-1] = 0
    assert max(errors(case, computed).values()) > 100


@NEEDS_COMPILER
@pytest.mark.parametrize("keep", ["nothing", "hidden"])
@pytest.mark.parametrize("gated", [False, True])
def test_native_results_do_not_depend_on_the_number_of_threads(gated: bool, keep: str) -> None:
    case = make_case(tokens=700, block_counts=(5, 7, 4), tiles=(12, 11), size=32, gated=gated)
    use_block_kernel("native")
    results = []
    try:
        for threads in (1, 2, 1):
            with num_threads(threads):
                results.append(case.computed(keep))
    finally:
        use_block_kernel(None)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@NEEDS_COMPILER
def test_the_native_kernel_has_code_for_every_activation() -> None:
    for activation in ACTIVATIONS:
        for keep in ("nothing", "hidden"):
            assert NATIVE.fused.supports(FeedForwardShape(80, 48, activation, True, keep))


@NEEDS_COMPILER
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf", "silu", "relu"])
@pytest.mark.parametrize("dtype", NATIVE.dtypes)
def test_native_activations_do_not_overflow(dtype: torch.dtype, activation: str) -> None:
    """The cube of an activation may be too large for a float although its GELU is not."""
    x = torch.tensor([[-1e30, -1e13, -100.0, -13.1, 13.1, 100.0, 1e13, 1e30]], dtype=dtype)
    eye, zero = torch.eye(8, dtype=dtype)[None], torch.zeros(1, dtype=torch.int32)
    case = Case(x, eye, None, zero, eye, None, zero, torch.ones_like(x), (1, 1, 1), activation=activation)
    found = case.computed()
    assert all(value.isfinite().all() for name, value in found.items() if name in ("y", "x"))
    torch.testing.assert_close(found["y"].double(), x.double().clamp(min=0), rtol=1e-2, atol=5e-3)
    torch.testing.assert_close(found["x"][0].double(), (x[0] > 0).double(), rtol=0, atol=5e-3)


@NEEDS_COMPILER
def test_native_tails_are_right_to_their_size() -> None:
    """Where an activation is small it has as many correct digits as elsewhere: no cancellation of 1 - erf."""
    x = torch.linspace(-12.5, 6, 800)[:, None].expand(-1, 8)
    eye, zero = torch.eye(8)[None], torch.zeros(1, dtype=torch.int32)
    for activation in ("gelu_erf", "silu"):
        case = Case(x, eye, None, zero, eye, None, zero, torch.ones_like(x), (1, 1, 1), activation=activation)
        exact = x.double()
        tail = exact * torch.erfc(-exact / 2**0.5) / 2 if activation == "gelu_erf" else F.silu(exact)
        torch.testing.assert_close(case.computed()["y"].double(), tail, rtol=1e-5, atol=0)


@NEEDS_COMPILER
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_special_values_stay_with_their_token(kernel: str, value: float) -> None:
    case = make_case(bias=False)
    case.x[3, :] = value
    y = case.computed()["y"]
    assert not y[3].isfinite().all()
    assert y[:3].isfinite().all()
    assert y[4:].isfinite().all()


# ---- the operator


def leaves(case: Case) -> tuple[Any, ...]:
    return tuple(
        argument.clone().requires_grad_() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
        for argument in case.arguments("nothing")
    )


@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(kernel: str, gated: bool) -> None:
    arguments = leaves(make_case(tokens=5, size=4, dtype=torch.float64, gated=gated))
    assert torch.autograd.gradcheck(lambda *given: block_feed_forward_op(*given)[0], arguments)


def test_gradcheck_notices_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = leaves(make_case(tokens=5, size=4, dtype=torch.float64))
    monkeypatch.setattr(
        block_feed_forward, "block_feed_forward_gradient_op",
        lambda grad, x, *rest: [torch.ones_like(v) for v in (x, rest[3], rest[4], x, x, rest[11])],
    )  # fmt: skip
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda *given: block_feed_forward_op(*given)[0], arguments)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("keep", KEEP)
def test_opcheck(kernel: str, keep: str, gated: bool) -> None:
    torch.library.opcheck(block_feed_forward_op, (*leaves(make_case(tokens=5, size=4, gated=gated))[:-1], keep))


@pytest.mark.parametrize("gated", [False, True])
def test_only_the_gradients_asked_for_are_computed(kernel: str, gated: bool) -> None:
    expected = make_case(gated=gated).expected()
    for wanted in expected.keys() - {"y"}:
        case = make_case(gated=gated)
        getattr(case, wanted).requires_grad_()
        block_feed_forward_op(*case.arguments("nothing"))[0].backward(case.grad)
        for name in GRADIENTS:
            found = None if getattr(case, name) is None else getattr(case, name).grad
            assert (found is not None) == (name == wanted)
            if found is not None:
                assert float((found - expected[name]).abs().max() / expected[name].abs().max()) < 5e-6


def test_mixed_dtypes_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="must have one dtype"):
        block_feed_forward_op(*replace(case, down=case.down.double()).arguments("nothing"))
