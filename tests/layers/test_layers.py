"""Masked projections against stock layers: outputs, gradients, precision, compilation, copies, and printing."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.masked import MaskedConv1D, MaskedLinear, MaskedProjection, masked_projection
from sparseift_llm.ops.dense_gradient import DenseGradient
from sparseift_llm.ops.masked_weight import _MaskedGradient, masked_weight
from sparseift_llm.topology.masks import random_mask

KINDS = ("linear", "linear_without_bias", "conv1d")
# torch's compiler makes an instance of every autograd function it traces, and torch warns of that
COMPILER_WARNINGS = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def stock_layer(kind: str, columns: int, rows: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    layer: nn.Module
    if kind == "conv1d":
        layer = Conv1D(rows, columns).to(dtype)
        nn.init.normal_(layer.bias)
    else:
        layer = nn.Linear(columns, rows, bias=kind == "linear", dtype=dtype)
    return layer


def sparse_layer(kind: str, columns: int = 5, rows: int = 4, density: float = 0.5, **kwargs: Any) -> MaskedProjection:
    dense = stock_layer(kind, columns, rows, **kwargs)
    layer = masked_projection(dense, round(density * columns * rows), (rows, columns))
    layer.set_mask(random_mask(layer.weight.shape, layer.num_active, seed=1))
    return layer


def reference(layer: MaskedProjection, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.T if isinstance(layer, MaskedConv1D) else weight, layer.bias)


def check_parity(layer: MaskedProjection, x: Tensor) -> None:
    """Output and gradients of weight, bias and input equal those of a dense product with weight * mask."""
    outer = torch.randn(*x.shape[:-1], layer.dense_shape[0], dtype=x.dtype)
    x, x_ref = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight_ref = layer.weight.detach().clone().requires_grad_()
    expected = reference(layer, x_ref, weight_ref * layer.mask)
    bias = [] if layer.bias is None else [layer.bias]
    expected_gradients = torch.autograd.grad((expected * outer).sum(), [weight_ref, x_ref, *bias])
    output = layer(x)
    gradients = torch.autograd.grad((output * outer).sum(), [layer.weight, x, *bias])
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    assert torch.count_nonzero(gradients[0][~layer.mask]) == 0


@given(
    kind=st.sampled_from(KINDS),
    columns=st.integers(1, 8),
    rows=st.integers(1, 8),
    density=st.floats(0, 1),
    batch=st.lists(st.integers(0, 3), max_size=3),
)
@settings(deadline=None, max_examples=60)
def test_parity_with_dense_over_shapes(kind: str, columns: int, rows: int, density: float, batch: list[int]) -> None:
    x = torch.randn(*batch, columns, dtype=torch.float64)
    check_parity(sparse_layer(kind, columns, rows, density), x)


@pytest.mark.parametrize("kind", KINDS)
def test_output_equals_the_stock_layers_to_the_bit(kind: str) -> None:
    layer = sparse_layer(kind, 33, 17, dtype=torch.float32)
    x = torch.randn(3, 7, 33)
    assert torch.equal(layer(x), layer.to_dense()(x))


# ---- planted faults: the check above must notice each


def mask_in_the_forward_only(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return gradient, None, None, None


@pytest.mark.parametrize("kind", KINDS)
def test_planted_fault_no_mask_in_the_backward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_MaskedGradient, "backward", staticmethod(mask_in_the_forward_only))
    with pytest.raises(AssertionError):
        check_parity(sparse_layer(kind), torch.randn(3, 5, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_planted_fault_weights_not_zeroed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskedProjection, "zero_inactive", lambda self: None)
    with pytest.raises(AssertionError):
        check_parity(sparse_layer(kind), torch.randn(3, 5, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_planted_fault_transposed_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def transposed(self: MaskedProjection) -> Tensor:
        return masked_weight(self.weight, self.mask.T)

    monkeypatch.setattr(MaskedProjection, "_masked_weight", transposed)
    with pytest.raises(AssertionError):
        check_parity(sparse_layer(kind, 5, 5), torch.randn(3, 5, dtype=torch.float64))


# ---- dense gradients


def check_sink(layer: MaskedProjection, batches: list[Tensor]) -> None:
    """The sink holds the dense weight gradient summed over micro-batches, in the weight's own layout."""
    layer.dense_gradient = DenseGradient()
    weight = layer.weight.detach().clone().requires_grad_()
    for x in batches:
        layer(x).square().sum().backward()
        reference(layer, x, weight).square().sum().backward()
    torch.testing.assert_close(layer.dense_gradient.total, weight.grad, rtol=1e-12, atol=1e-12)
    assert weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, weight.grad * layer.mask, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_sink_is_the_dense_gradient_of_all_micro_batches(kind: str) -> None:
    check_sink(sparse_layer(kind), [torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(3)])


@pytest.mark.parametrize("kind", KINDS)
def test_planted_fault_sink_gets_the_masked_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sparse_layer(kind)
    add = DenseGradient.add
    monkeypatch.setattr(DenseGradient, "add", lambda self, gradient: add(self, gradient * layer.mask))
    with pytest.raises(AssertionError):
        check_sink(layer, [torch.randn(2, 5, dtype=torch.float64)])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_nothing_and_counts_once(kind: str, use_reentrant: bool) -> None:
    template = sparse_layer(kind)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for recompute in (False, True):
        layer = copy.deepcopy(template)
        layer.dense_gradient = DenseGradient()
        output = checkpoint(layer, x, use_reentrant=use_reentrant) if recompute else layer(x)
        output.square().sum().backward()
        assert layer.weight.grad is not None
        assert layer.dense_gradient.total is not None
        results.append((layer.weight.grad, layer.dense_gradient.total))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.count_nonzero(results[1][1][~template.mask]) > 0


# ---- precision and compilation


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_that_of_the_stock_layer(kind: str) -> None:
    layer = sparse_layer(kind, 16, 8, dtype=torch.float32)
    layer.dense_gradient = DenseGradient()
    dense = copy.deepcopy(layer).to_dense()
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = layer(x), dense(x)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, expected)
        output.float().square().sum().backward()
        expected.float().square().sum().backward()
    dense_gradient = dense.weight.grad
    assert isinstance(dense_gradient, Tensor)
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, dense_gradient * layer.mask)
    assert layer.dense_gradient.total is not None
    assert layer.dense_gradient.total.dtype == torch.float32
    assert torch.equal(layer.dense_gradient.total, dense_gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_parameters_accumulate_the_sink_in_float32(kind: str) -> None:
    layer = sparse_layer(kind, 1, 1, density=1.0, dtype=torch.bfloat16)
    layer.dense_gradient = DenseGradient()
    for value in (256.0, 1.0):
        layer(torch.tensor([[value]], dtype=torch.bfloat16)).sum().backward()
    assert layer.dense_gradient.total is not None
    assert layer.dense_gradient.total.dtype == torch.float32
    assert layer.dense_gradient.total.item() == 257.0  # 256 in bfloat16


@COMPILER_WARNINGS
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_compiled_layer_agrees_in_one_graph(kind: str) -> None:
    layer = sparse_layer(kind)
    fast = compiled(copy.deepcopy(layer))
    x = torch.randn(3, 5, dtype=torch.float64)
    for module in (layer, fast):
        module(x).square().sum().backward()
    torch.testing.assert_close(fast(x), layer(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fast.weight.grad, layer.weight.grad, rtol=1e-12, atol=1e-12)
    assert torch.count_nonzero(fast.weight.grad[~layer.mask]) == 0


@COMPILER_WARNINGS
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_compiled_layer_follows_a_new_mask(kind: str) -> None:
    layer = sparse_layer(kind)
    fast = compiled(layer)
    x = torch.randn(3, 5, dtype=torch.float64)
    fast(x).sum().backward()
    layer.zero_grad()
    layer.set_mask(random_mask(layer.weight.shape, 7, seed=2))
    fast(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert torch.count_nonzero(layer.weight.grad[~layer.mask]) == 0
    torch.testing.assert_close(fast(x), reference(layer, x, layer.weight), rtol=1e-12, atol=1e-12)


# ---- the mask, copies, printing


def test_set_mask_zeroes_with_a_positive_sign_and_in_place() -> None:
    layer = sparse_layer("linear", density=1.0)
    with torch.no_grad():
        layer.weight.fill_(-1.0)
        layer.weight[0, 0] = float("nan")
    weight, mask = layer.weight, layer.mask
    chosen = random_mask(mask.shape, 5, seed=3)
    chosen[0, 0] = False
    layer.set_mask(chosen)
    assert layer.weight is weight
    assert layer.current_mask() is layer.mask is mask  # stored, so asking costs nothing
    assert (layer.mask_shape, layer.num_weights, layer.count_active()) == (mask.shape, mask.numel(), 5)
    assert torch.equal(layer.mask, chosen)
    assert torch.equal(layer.weight, torch.where(chosen, -1.0, 0.0).double())
    assert not layer.weight.signbit()[~chosen].any()


@pytest.mark.parametrize("kind", KINDS)
def test_layer_takes_over_parameters_and_state_dict_of_the_stock_layer(kind: str) -> None:
    dense = stock_layer(kind, 5, 4).eval()
    layer = masked_projection(dense, 10, (4, 5))
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert layer.state_dict().keys() == dense.state_dict().keys()  # the mask has a file of its own
    assert not layer.training
    assert bool(layer.mask.all())
    back = layer.to_dense()
    assert type(back) is type(dense)
    assert back.weight is dense.weight
    assert back.bias is dense.bias


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_pickle_are_equal_and_independent(kind: str) -> None:
    layer = sparse_layer(kind)
    x = torch.randn(2, 5, dtype=torch.float64)
    before, mask = layer(x), layer.mask.clone()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), before)
        assert torch.equal(twin.mask, mask)
        assert (twin.num_active, twin.dense_shape) == (10, (4, 5))
        twin.set_mask(torch.zeros_like(mask))
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "linear",
            "MaskedLinear(in_features=5, out_features=4, bias=True, sparsity=0.7500, active 5 of 20, replaces 3->2)",
        ),
        ("conv1d", "MaskedConv1D(nf=4, nx=5, sparsity=0.7500, active 5 of 20, replaces 3->2)"),
    ],
)
def test_printing_tells_the_live_sparsity(kind: str, expected: str) -> None:
    layer = masked_projection(stock_layer(kind, 5, 4), 10, (2, 3))
    layer.set_mask(random_mask(layer.weight.shape, 5, seed=0))
    assert repr(layer) == expected


def test_printing_on_the_meta_device_tells_the_plan() -> None:
    layer = masked_projection(nn.Linear(5, 4, device="meta"), 10, (2, 3))
    assert "sparsity=0.5000, active 10 of 20" in repr(layer)


def test_sparse_layers_takes_off_the_prefixes_of_wrappers() -> None:
    class Wrapper(nn.Module):
        """As DistributedDataParallel holds its model."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = nn.ModuleDict({"a": sparse_layer("linear"), "b": nn.Linear(2, 2), "c": sparse_layer("conv1d")})
    assert list(sparse_layers(model)) == ["a", "c"]
    assert isinstance(sparse_layers(model)["a"], MaskedLinear)
    for wrapped in (Wrapper(model), compiled(model), Wrapper(compiled(model)), compiled(Wrapper(model))):
        assert list(sparse_layers(wrapped)) == ["a", "c"], type(wrapped)


# ---- other ways to differentiate, and to quantize


@pytest.mark.parametrize("kind", KINDS)
def test_functional_gradients_are_those_of_backward(kind: str) -> None:
    layer = sparse_layer(kind)
    x = torch.randn(4, 5, dtype=torch.float64)
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    found = torch.func.grad(lambda w: torch.func.functional_call(layer, w, (x,)).square().sum())(weights)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(found[name], parameter.grad)  # type: ignore[arg-type]
    assert found["weight"][layer.mask].all()
    assert not found["weight"][~layer.mask].any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_single_inputs_are_masked_each(kind: str) -> None:
    """`vmap(grad(loss))`, as for per-sample clipping, against one backward pass per input."""
    layer = sparse_layer(kind)
    x = torch.randn(4, 5, dtype=torch.float64)
    weights = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (one[None],)).square().sum()  # type: ignore[no-any-return]

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)["weight"]
    for one, gradient in zip(x, found, strict=True):
        (expected,) = torch.autograd.grad(layer(one[None]).square().sum(), layer.weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert not found[:, ~layer.mask].any()
    assert found[:, layer.mask].any()


def test_second_derivatives_are_masked_too() -> None:
    layer = sparse_layer("linear")
    x = torch.randn(4, 5, dtype=torch.float64)

    def penalty(weight: Tensor, mask: Tensor | None) -> Tensor:
        (gradient,) = torch.autograd.grad(F.linear(x, weight).pow(3).sum(), weight, create_graph=True)
        return (gradient if mask is None else gradient * mask).square().sum()

    weight = layer.weight.detach().clone().requires_grad_()
    penalty(weight, layer.mask).backward()
    (gradient,) = torch.autograd.grad((layer(x) - layer.bias).pow(3).sum(), layer.weight, create_graph=True)
    gradient.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad * layer.mask, rtol=1e-10, atol=1e-12)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*")
@pytest.mark.parametrize("quantize", ["dynamic", "prepare"])
def test_quantization_that_passes_sparse_layers_over_says_so(quantize: str) -> None:
    from torch.ao import quantization

    model = nn.Sequential(masked_projection(nn.Linear(8, 8), 16, (4, 4)), nn.Linear(8, 3))
    run = functools.partial(quantization.quantize_dynamic, qconfig_spec={nn.Linear})
    if quantize == "prepare":
        model.qconfig = quantization.default_dynamic_qconfig  # type: ignore[assignment]
        run = quantization.prepare
    with pytest.warns(UserWarning, match=r"does not know sparse layers.*to_dense\(model\)"):
        found = run(model)
    assert type(found[0]) is MaskedLinear
    assert not hasattr(found[0], "activation_post_process")
    assert found[0].qconfig is None
