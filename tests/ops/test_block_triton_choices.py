"""Precision, tuned configurations and availability of the Triton kernels."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseift_llm.ops.kernels import triton as block_triton
from tests.helpers.block_triton_cases import problem

triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize(("name", "value"), [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_float32_uses_tf32_only_where_torch_does(name: str, value: bool | str) -> None:
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, name)
    assert block_triton._precision(torch.float32) == "ieee"
    setattr(matmul, name, value)
    try:
        assert block_triton._precision(torch.float32) == "tf32"
        assert block_triton._precision(torch.bfloat16) == "ieee"
    finally:
        setattr(matmul, name, before)


def test_token_counts_share_few_tuned_configurations() -> None:
    buckets = [block_triton._bucket(tokens) for tokens in (0, 1, 63, 64, 127, 128, 8191, 8192, 16383, 16384, 10**7)]
    assert buckets == [6, 6, 6, 7, 7, 8, 13, 14, 14, 15, 15]


@pytest.mark.parametrize(("size", "kept"), [(2, ["64/4", "128/4", "256/8"]), (4, ["64/4"])])
def test_configurations_that_would_spill_are_not_tuned(size: int, kept: list[str]) -> None:
    """Per thread: at most 128 accumulators beside 2-byte operands, 64 beside 4-byte operands."""
    sizes = ((64, 4), (128, 4), (256, 4), (256, 8))
    configs = [triton.Config({"token_block": block}, num_warps=warps) for block, warps in sizes]
    weight = torch.empty(0, dtype={2: torch.bfloat16, 4: torch.float32}[size])
    fitting = block_triton._fitting(configs, {"weight": weight, "part": 128}, grid=None)
    assert [f"{config.kwargs['token_block']}/{config.num_warps}" for config in fitting] == kept


def test_without_triton_the_module_imports_and_the_functions_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    specification = importlib.util.spec_from_file_location("without_triton", block_triton.__file__)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert not module.TRITON.is_available()
    given = problem(16, 1, 1, 1, 1)
    calls: list[Callable[[], Tensor]] = [
        lambda: module.TRITON.forward(given.x, given.weight, None, given.columns, 16),
        lambda: module.TRITON.input_gradient(
            given.grad, given.weight, given.slots_by_column, given.column_starts, 16, 16
        ),
        lambda: module.TRITON.weight_gradient(given.grad, given.x, given.columns, 16),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="pip install"):
            call()
