"""2:4 layers on torch's semi-structured kernels: what is switched, compressed and refused.

There are no such kernels on a CPU. Dense products stand in for them here, so that everything around them is held to
the dense model; benchmarks/semi_structured.py runs the kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from sparseift_llm import (
    DSTConfig,
    SparseIFTConfig,
    SparseTrainingController,
    load_pretrained,
    sparsify,
    to_semi_structured,
    use_semi_structured_kernels,
)
from sparseift_llm.layers import semi_structured as layers_of_kernels
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.semi_structured import SemiStructuredLinear
from sparseift_llm.layers.stock import stock_matrix
from sparseift_llm.ops import semi_structured
from tests.helpers.models import tiny_model, token_ids
from tests.helpers.patterns import wrong_groups
from tests.helpers.tiny_runs import differences, snapshot

ROW = "n:m masks: semi-structured kernels on a CPU, in float32, for another pattern or sides"


@pytest.fixture
def dense_kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The dense product in place of the kernels, in any dtype; gives the shapes of what was compressed."""
    seen: list[tuple[int, ...]] = []

    def compress(weight: Tensor) -> Tensor:
        assert (weight.reshape(-1, 4) != 0).sum(1).max() <= 2
        seen.append(tuple(weight.shape))
        return weight.detach().clone()

    for module in (semi_structured, layers_of_kernels):
        monkeypatch.setattr(module, "compress", compress)
    for name in ("sparseift_llm.ops.semi_structured.check_device", "sparseift_llm.api.check_device"):
        monkeypatch.setattr(name, lambda device, dtype: None)
    return seen


def sparse(arch: str = "gpt2", **options: Any) -> PreTrainedModel:
    """A tiny float64 model with 2:4 masks and sides that are multiples of 16."""
    dst = DSTConfig("rigl", update_every_steps=2, stop_fraction=1.0)
    dense = tiny_model(arch, **({} if arch == "gpt2" else {"intermediate_size": 64}))
    return sparsify(dense, SparseIFTConfig(**{"structure": "2:4", "width_multiple": 16, "dst": dst, **options}))


def trained(
    on_kernels: bool, arch: str, transposable: bool = False, steps: int = 4, compiled: bool = False
) -> dict[str, Any]:
    """What RigL leaves after some steps, with products on kernels or not."""
    model = sparse(arch, transposable=transposable)
    use_semi_structured_kernels(model, on_kernels)
    wrapped: Any = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(wrapped, optimizer, total_steps=8)
    for step in range(steps):
        tokens = token_ids(seed=step)
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    controller.close()
    assert wrong_groups(model, 2, 4, transposable) == []
    return snapshot(model, optimizer)


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_training_on_kernels_is_the_dense_training(
    arch: str, transposable: bool, dense_kernels: list[tuple[int, ...]]
) -> None:
    """Weights to rounding, and the very same masks, which RigL chose by dense gradients.

    Every matrix is compressed once per pass: forward, and backward if its transpose is 2:4, too.
    """
    on_kernels = trained(True, arch, transposable)
    num_compressed = len(dense_kernels)
    shapes = [
        tuple(stock_matrix(layer).shape) for layer in sparse_layers(sparse(arch, transposable=transposable)).values()
    ]
    if transposable:
        shapes += [(columns, rows) for rows, columns in shapes]
    assert sorted(dense_kernels) == sorted(4 * shapes)
    dense = trained(False, arch, transposable)
    assert len(dense_kernels) == num_compressed
    assert not differences(on_kernels["masks"], dense["masks"])
    for name, weight in dense["weights"].items():
        torch.testing.assert_close(on_kernels["weights"][name], weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("transposable", [False, True])
def test_a_gradient_that_is_wrong_is_seen(
    transposable: bool, dense_kernels: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = semi_structured._SemiStructuredLinear.backward

    def wrong(ctx: Any, gradient: Tensor) -> Any:
        x, *others = backward(ctx, gradient)
        return 1.01 * x, *others

    monkeypatch.setattr(semi_structured._SemiStructuredLinear, "backward", staticmethod(wrong))
    with pytest.raises(AssertionError):
        test_training_on_kernels_is_the_dense_training("gpt2", transposable, dense_kernels)


def test_a_transpose_that_is_not_2_4_is_seen(dense_kernels: list[tuple[int, ...]]) -> None:
    """What the check of the stand-in must catch: the other side of masks that are 2:4 along the inputs only."""
    model = sparse()
    use_semi_structured_kernels(model)
    for layer in sparse_layers(model).values():
        layer.transposable = True  # type: ignore[assignment]
    tokens = token_ids()
    loss = model(input_ids=tokens, labels=tokens).loss
    with pytest.raises(AssertionError):
        loss.backward()


@pytest.mark.support(
    "n:m masks: torch.compile, on stand-ins of the semi-structured kernels, too", proves=("unstructured",)
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, of any Function
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_training_on_kernels_is_the_dense_training(dense_kernels: list[tuple[int, ...]]) -> None:
    """With both passes on them. What one product makes of it is in tests/ops/test_semi_structured.py."""
    torch._dynamo.reset()
    compiled = trained(True, "gpt2", True, compiled=True)
    assert len(dense_kernels) == 4 * 2 * len(sparse_layers(sparse()))
    dense = trained(False, "gpt2", True)
    assert not differences(compiled["masks"], dense["masks"])
    for name, weight in dense["weights"].items():
        torch.testing.assert_close(compiled["weights"][name], weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("arch", "options"),
    [("gpt2", {}), ("llama", {}), ("llama", {"family": "parallel"}), ("llama", {"scope": "residual"})],
)
def test_a_compressed_copy_computes_the_same(
    arch: str, options: dict[str, Any], dense_kernels: list[tuple[int, ...]], tmp_path: Path
) -> None:
    model = sparse(arch, **options)
    tokens = token_ids()
    expected = model.eval()(input_ids=tokens).logits
    names = [name for name, layer in sparse_layers(model).items() if layer.role == "projection"]
    fast = to_semi_structured(model)
    assert [name for name, module in fast.named_modules() if isinstance(module, SemiStructuredLinear)] == names
    torch.testing.assert_close(fast(input_ids=tokens).logits, expected, rtol=1e-10, atol=1e-10)
    assert not fast.training
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert [name for name, layer in sparse_layers(model).items() if layer.role == "projection"] == names  # as it was
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(load_pretrained(tmp_path / "model", dtype=torch.float64)(input_ids=tokens).logits, expected)
    with pytest.raises(ValueError, match="save the model that it was made of"):
        fast.save_pretrained(tmp_path / "fast")
    with pytest.raises(ValueError, match="save the model that it was made of"):
        fast.push_to_hub("somewhere")


# ---- what is refused


@pytest.mark.support(ROW, refused=True)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_is_refused_by_name() -> None:
    model = sparse().to(torch.bfloat16)
    name = next(iter(sparse_layers(model)))
    with pytest.raises(ValueError, match=rf"{name}: .*need an NVIDIA GPU, and the model is on cpu"):
        to_semi_structured(model)
    use_semi_structured_kernels(model)  # which a Trainer may move to a GPU before it runs
    with pytest.raises(ValueError, match="need an NVIDIA GPU, and the model is on cpu"):
        model(input_ids=token_ids())
    use_semi_structured_kernels(model, False)
    model(input_ids=token_ids())


@pytest.mark.support(ROW, refused=True)
def test_float32_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=r"in float16 or bfloat16, not in float32; use model\.to"):
        semi_structured.check_device(torch.device("cuda"), torch.float32)


@pytest.mark.support(ROW, refused=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "1:4"}, r"c_attn: .* the pattern 2:4 alone, not 1:4; make the model with structure='2:4'"),
        ({"width_multiple": 4}, r"c_attn: .* multiples of 16, not \d+ x \d+; make the model with width_multiple=16"),
        ({"structure": "unstructured"}, r"no n:m masks, .* SparseIFTConfig\(structure='2:4'\)"),
        ({"structure": "block", "block_size": 4}, "no n:m masks"),
    ],
)
def test_other_patterns_and_sides_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    model = sparse(**options)
    for verb in (to_semi_structured, use_semi_structured_kernels):
        with pytest.raises(ValueError, match=message):
            verb(model)
