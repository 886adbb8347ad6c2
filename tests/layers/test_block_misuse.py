"""Block-sparse layers whose operands are not what they should be: an error, where something else would be computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers import AutoModelForCausalLM

from sparseift_llm import load_pretrained
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.block_ffn import BlockFeedForward
from sparseift_llm.ops.block_linear import block_input_gradient_op, block_weight_gradient_op
from sparseift_llm.ops.dense_gradient import DenseGradient, capture_dense_gradient
from tests.checkpoints.test_block_checkpoint import WEIGHTS, block_model, check_equal
from tests.helpers.models import logits_of
from tests.layers.test_block_ffn import feed_forward
from tests.layers.test_block_layer import inputs, make


def test_operands_of_unequal_dtypes_are_refused() -> None:
    """The kernels read memory as what they are told it is."""
    layer = make(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"one dtype.*float64.*float32"):
        layer(inputs(layer, torch.float64))
    layer.bias.data = layer.bias.data.double()
    with pytest.raises(ValueError, match="one dtype"):
        layer(inputs(layer, torch.float32))


@pytest.mark.parametrize("load", [load_pretrained, AutoModelForCausalLM.from_pretrained])
def test_columns_stored_in_another_dtype_are_read_as_the_numbers_they_are(
    load: Callable[[Path], nn.Module], tmp_path: Path
) -> None:
    """A loader puts the file's tensor in the buffer's place, and the kernels read 32-bit numbers."""
    model = block_model()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    wide = {name: value.long() if name.endswith("columns") else value for name, value in state.items()}
    save_file(wide, tmp_path / WEIGHTS, metadata={"format": "pt"})
    check_equal(load(tmp_path), model)  # type: ignore[arg-type]


def test_assigned_columns_of_another_dtype() -> None:
    layer = make()
    expected = layer(inputs(layer))
    state = {name: value.long() if name == "columns" else value for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.columns.dtype == torch.int32
    assert torch.equal(layer(inputs(layer)), expected)


def first_layer(module: nn.Module) -> BlockSparseLinear:
    return next(layer for layer in module.modules() if isinstance(layer, BlockSparseLinear))


@pytest.mark.parametrize("fused", [False, True])
def test_indices_that_were_cast_with_the_weights_are_refused(fused: bool) -> None:
    module = feed_forward() if fused else make()
    x = inputs(first_layer(module), torch.bfloat16)
    module.type(torch.bfloat16)
    with pytest.raises(ValueError, match=r"indices are no longer int32.*`to`"):
        module(x)


@pytest.mark.parametrize("name", ["weight", "bias", "columns"])
def test_an_operand_on_another_device_is_refused(name: str) -> None:
    """Memory that nobody wrote would come back: the operator of the meta device only makes an output."""
    layer = make()
    x = inputs(layer)
    moved = getattr(layer, name).data.to("meta")
    setattr(layer, name, moved if name == "columns" else nn.Parameter(moved))
    with pytest.raises(ValueError, match=r"on one device, got cpu, meta"):
        layer(x)


def test_gradients_of_operands_on_different_devices_are_refused() -> None:
    layer = make()
    x = inputs(layer).flatten(0, 1)
    grad, on_meta = x.new_ones(len(x), layer.out_features), layer.weight.to("meta")
    with pytest.raises(ValueError, match=r"on one device"):
        block_input_gradient_op(grad, on_meta, layer.index[1], layer.in_features)
    with pytest.raises(ValueError, match=r"on one device"):
        block_weight_gradient_op(grad.to("meta"), x, layer.weight, layer.columns)


@pytest.mark.parametrize("classes", [None, ["GPT2MLP"], ["BlockFeedForward"]])
def test_offloading(classes: list[str] | None) -> None:
    """By projection, weights come and go while the FFN is computed; a whole FFN is computed as one."""
    model = block_model("gpt2", activation_function="gelu_new")
    ffns = [module for module in model.modules() if isinstance(module, BlockFeedForward)]
    assert ffns
    expected = logits_of(model)
    cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=classes)
    assert all(ffn.parts.down.weight.is_meta for ffn in ffns)
    assert all(ffn.is_fused == (classes == ["BlockFeedForward"]) for ffn in ffns)
    if classes == ["BlockFeedForward"]:
        assert torch.equal(logits_of(model), expected)
    else:
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func's own
@pytest.mark.parametrize("fused", [False, True])
def test_forward_mode_is_refused(fused: bool) -> None:
    """The operators would drop tangents without a word."""
    module = feed_forward() if fused else make()
    x = inputs(first_layer(module)).detach()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(module, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        module(forward_ad.make_dual(x, x))
    weights = {name: value.detach() for name, value in module.named_parameters()}
    of_weights = functools.partial(torch.func.functional_call, module, args=(x,))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(of_weights, (weights,), (weights,))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("of", ["input", "weight"])
def test_second_derivatives_are_refused_and_the_way_out_is_named(fused: bool, of: str) -> None:
    """Taking the first ones with `create_graph` is allowed: a penalty may go around the sparse layers."""
    module = feed_forward() if fused else make()
    x = inputs(first_layer(module))
    wanted = x if of == "input" else first_layer(module).weight
    (gradient,) = torch.autograd.grad(module(x).square().sum(), wanted, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivatives.*structure='unstructured'.*to_dense"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("fused", [False, True])
def test_functional_gradients_are_refused_and_the_way_out_is_named(fused: bool) -> None:
    module = feed_forward() if fused else make()
    x = inputs(first_layer(module)).detach()
    with pytest.raises(NotImplementedError, match=r"torch\.func.*backward\(\).*structure='unstructured'"):
        torch.func.grad(lambda x: module(x).sum())(x)


def test_a_float16_dense_gradient_does_not_overflow() -> None:
    """Of an inactive tile no gradient scaler would see it, and the update would stop the run."""
    x = torch.full((64, 4), 100.0, dtype=torch.float16)
    sink = DenseGradient()
    y = torch.zeros(64, 2, dtype=torch.float16, requires_grad=True) * 1
    captured = capture_dense_gradient(y, x, sink)
    with torch.autocast("cpu", torch.float16):  # as some call backward
        captured.backward(torch.full_like(y, 50.0))
    total: Tensor | None = sink.total
    assert total is not None
    assert torch.equal(total, torch.full((2, 4), 64 * 100.0 * 50.0))
