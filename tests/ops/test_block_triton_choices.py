"""Precision, tuned configurations and availability of the Triton kernels."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseift_llm.ops.kernels import triton as block_triton
from sparseift_llm.ops.kernels import triton_launch, triton_tuning
from sparseift_llm.ops.kernels.triton_launch import token_pieces
from sparseift_llm.ops.kernels.triton_tuning import bucket_of, own_bucket
from tests.helpers.block_triton_cases import problem

triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize(("name", "value"), [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_float32_uses_tf32_only_where_torch_does(name: str, value: bool | str) -> None:
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, name)
    assert triton_launch.precision_of(torch.float32) == "ieee"
    setattr(matmul, name, value)
    try:
        assert triton_launch.precision_of(torch.float32) == "tf32"
        assert triton_launch.precision_of(torch.bfloat16) == "ieee"
    finally:
        setattr(matmul, name, before)


def test_token_counts_share_few_tuned_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = [own_bucket(tokens) for tokens in (0, 1, 16, 17, 64, 127, 128, 8191, 8192, 16383, 16384, 10**7)]
    assert buckets == [0, 0, 0, 6, 7, 7, 8, 13, 14, 14, 15, 15]
    monkeypatch.setattr(triton_tuning, "_tuned_buckets", {})
    # a shorter batch takes what the training batch was tuned to, thin products and other shapes tune for themselves
    calls = [(4000, "up"), (100, "up"), (5, "up"), (100, "down"), (9000, "up"), (100, "up"), (5000, "up")]
    assert [bucket_of(*call) for call in calls] == [12, 12, 0, 7, 14, 12, 14]


def test_tuning_while_a_cuda_graph_is_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tuning, "_tuned_buckets", {})
    assert bucket_of(100, "up") == 7
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert bucket_of(100, "up") == 7
    with pytest.raises(RuntimeError, match="run the same step once, with as many tokens, before capturing"):
        bucket_of(1000, "up")


def test_pieces_of_tokens_fill_the_multiprocessors_of_the_last_round() -> None:
    assert [token_pieces(144, tokens) for tokens in (16384, 2048, 1023, 1)] == [5, 1, 1, 1]
    assert token_pieces(132, 16384) == 1
    assert token_pieces(12, 16384) == 11


@pytest.mark.parametrize(
    ("size", "bucket", "kept"), [(2, 9, ["64/4", "128/4", "256/8"]), (4, 9, ["64/4"]), (2, 0, ["16/4"])]
)
def test_configurations_that_would_spill_or_idle_are_not_tuned(size: int, bucket: int, kept: list[str]) -> None:
    """Per thread: at most 128 accumulators beside 2-byte operands, 64 beside 4-byte operands."""
    sizes = ((16, 4), (64, 4), (128, 4), (256, 4), (256, 8))
    configs = [triton.Config({"token_block": block}, num_warps=warps) for block, warps in sizes]
    weight = torch.empty(0, dtype={2: torch.bfloat16, 4: torch.float32}[size])
    found = triton_tuning.fitting(
        configs, {"weight": weight, "part": 128, "token_bucket": bucket, "can_describe": 0}, grid=None
    )
    assert [f"{config.kwargs['token_block']}/{config.num_warps}" for config in found] == kept


def test_without_triton_the_module_imports_and_the_functions_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    package = importlib.import_module("sparseift_llm.ops.kernels")
    for name in [name for name in vars(package) if name.startswith("triton")]:
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}")
        monkeypatch.delattr(package, name)  # the end of the test puts both back
    module: Any = importlib.import_module(f"{package.__name__}.triton")
    assert module is not block_triton
    assert not module.TRITON.is_available()
    given = problem(16, 1, 1, 1, 1)
    calls: list[Callable[[], Tensor]] = [
        lambda: module.TRITON.forward(given.x, given.weight, None, given.columns, 16),
        lambda: module.TRITON.input_gradient(given.grad, given.weight, given.by_column, 16, 16),
        lambda: module.TRITON.weight_gradient(given.grad, given.x, given.columns, 16),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="pip install"):
            call()
