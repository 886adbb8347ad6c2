"""`BlockFeedForward`: parity with its children, alone and in models, and what makes it call them one by one."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, ReLUSquaredActivation

from sparseift_llm import SparseIFTConfig, sparsify, to_dense
from sparseift_llm.layers import block_ffn
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.block_ffn import BlockFeedForward, can_be_fused
from sparseift_llm.models.quirks import FEED_FORWARD_CHAINS, GATED_FEED_FORWARD_CHAINS
from sparseift_llm.ops.dense_gradient import DenseGradient
from tests.helpers.models import gradients_of, logits_of, tiny_config, tiny_model
from tests.layers.test_block_layer import KINDS, backward, inputs, make

CHAIN = ("up", "act", "down")
BLOCK = SparseIFTConfig(structure="block", block_size=8)


class StockMLP(nn.Module):
    """As in a model: three modules one after the other, and an attribute of its own."""

    def __init__(self, up: nn.Module, down: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.act = act or nn.GELU(approximate="tanh")
        self.note = "kept"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


def stock_mlp(kind: str = "linear", dtype: Any = None) -> StockMLP:
    return StockMLP(make(kind, 6, 3, 7, dtype=dtype), make(kind, 2, 6, 5, dtype=dtype))


def feed_forward(kind: str = "linear", dtype: Any = None) -> BlockFeedForward:
    return BlockFeedForward(stock_mlp(kind, dtype), CHAIN)


def calls_of(module: BlockFeedForward, x: Tensor) -> list[str]:
    """The children that a forward pass calls."""
    called: list[str] = []
    names = {child: name for name, child in module.named_children()}

    def noting(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def note(self: nn.Module, x: Tensor) -> Tensor:
            called.extend([names[self]] if self in names else [])
            return forward(self, x)

        return note

    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(child) for child in names}:
            patch.setattr(kind, "forward", noting(kind.forward))
        module(x)
    return called


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_its_children_one_by_one(kind: str) -> None:
    fused, plain = feed_forward(kind), stock_mlp(kind)
    assert fused.is_fused
    x = inputs(fused.up)
    for found, expected in zip(backward(fused, x), backward(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", [GELUTanh(), NewGELUActivation(), nn.GELU(approximate="tanh")])
def test_every_class_of_the_tanh_gelu_is_fused(activation: nn.Module) -> None:
    mlp = stock_mlp()
    mlp.act = activation
    fused = BlockFeedForward(copy.deepcopy(mlp), CHAIN)
    x = inputs(fused.up)
    for found, expected in zip(backward(fused, x), backward(mlp, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_it_captures_the_same_dense_gradients() -> None:
    fused, plain = feed_forward(), stock_mlp()
    for module in (fused, plain):
        for layer in (module.up, module.down):
            layer.dense_gradient = DenseGradient()  # type: ignore[assignment]
        backward(module, inputs(fused.up))
    for name in ("up", "down"):
        one, other = (getattr(module, name).dense_gradient.total for module in (fused, plain))
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        assert one.abs().max() > 0


@pytest.mark.parametrize("armed", [False, True])
def test_compiled_copied_pickled_and_checkpointed_it_gives_the_same_bits(armed: bool) -> None:
    module = feed_forward(dtype=torch.float32)
    x = inputs(module.up, torch.float32)
    expected = backward(module, x)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(module), again):
        for found, value in zip(backward(twin, x), expected, strict=True):
            assert torch.equal(found, value)
        with torch.no_grad():
            twin.up.weight.zero_()
        assert not torch.equal(twin(x), expected[0])  # the copy uses its own layers
    runs = [lambda x: checkpoint(module, x, use_reentrant=False)]
    if armed:
        module.up.dense_gradient, module.down.dense_gradient = DenseGradient(), DenseGradient()
        expected = backward(module, x)
    else:
        runs.append(torch.compile(module, fullgraph=True, backend="aot_eager"))
    for run in runs:
        for found, value in zip(backward(module, x, run), expected, strict=True):
            assert torch.equal(found, value)


def test_under_autocast_it_has_its_dtype() -> None:
    module = feed_forward(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(inputs(module.up, torch.float32)).dtype == torch.bfloat16


def test_it_gives_back_the_stock_module_with_its_attributes_and_present_children() -> None:
    mlp = stock_mlp()
    children, names = dict(mlp.named_children()), list(mlp.state_dict())
    module = BlockFeedForward(mlp, CHAIN).eval()
    assert list(module.state_dict()) == names
    module.act = nn.Tanh()
    stock = module.to_stock()
    assert type(stock) is StockMLP
    assert stock.note == "kept"
    assert not stock.training
    assert list(dict(stock.named_children())) == list(children)
    assert (stock.up, stock.act, stock.down) == (children["up"], module.act, children["down"])
    assert repr(module).startswith("BlockFeedForward(\n  up, act, down computed one by one\n  (up): BlockSparseLinear(")


# ---- with a gate, and other activations


class GatedMLP(nn.Module):
    """As in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            make("linear", 6, 3, 7),
            make("linear", 6, 3, 8),
            make("linear", 2, 6, 5),
        )
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


GATED_CHAIN = ("gate_proj", "act_fn", "up_proj", "down_proj")


@pytest.mark.parametrize("armed", [False, True])
def test_a_gated_one_equals_its_children_one_by_one(armed: bool) -> None:
    torch.manual_seed(0)
    plain = GatedMLP()
    fused = BlockFeedForward(copy.deepcopy(plain), GATED_CHAIN, is_gated=True)
    assert fused.is_fused
    assert "gate_proj, act_fn, up_proj, down_proj computed as one" in repr(fused)
    x = inputs(plain.up_proj)
    if armed:
        for module in (fused, plain):
            module.gate_proj.dense_gradient = DenseGradient()
    runs = [fused] if armed else [fused, torch.compile(fused, fullgraph=True, backend="aot_eager")]
    for run in runs:
        for found, expected in zip(backward(fused, x, run), backward(plain, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if armed:
        one, other = fused.gate_proj.dense_gradient.total, plain.gate_proj.dense_gradient.total
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert calls_of(fused, x) == ([*GATED_CHAIN] if armed else [])


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.ReLU(), GELUActivation(), ReLUSquaredActivation()])
def test_every_activation_of_the_operator_is_fused(activation: nn.Module) -> None:
    mlp = stock_mlp()
    mlp.act = activation
    fused = BlockFeedForward(copy.deepcopy(mlp), CHAIN)
    assert fused.is_fused
    x = inputs(fused.up)
    for found, expected in zip(backward(fused, x), backward(mlp, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("arch", GATED_FEED_FORWARD_CHAINS)
def test_gated_chains_are_what_stock_mlps_compute(arch: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(arch))
    mlp = model.get_submodule("model.layers.0.mlp").double()
    gate, activation, up, down = (mlp.get_submodule(name) for name in GATED_FEED_FORWARD_CHAINS[arch])
    assert set(GATED_FEED_FORWARD_CHAINS[arch]) == set(dict(mlp.named_children()))
    x = torch.randn(3, model.config.hidden_size, dtype=torch.float64)
    assert torch.equal(down(activation(gate(x)) * up(x)), mlp(x))


def test_a_llama_is_fused_and_computes_what_its_dense_twin_does() -> None:
    model = sparsify(tiny_model("llama"), BLOCK)
    assert all(layer.mlp.is_fused for layer in model.model.layers)
    torch.testing.assert_close(logits_of(model), logits_of(to_dense(model)), rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, BlockFeedForward) for module in to_dense(model).modules())


def test_nothing_is_kept_where_no_backward_pass_can_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    operator = block_ffn.block_feed_forward
    monkeypatch.setattr(block_ffn, "call_operator", lambda _, *given: kept.append(given[-1]) or operator(*given))
    fused = BlockFeedForward(GatedMLP(), GATED_CHAIN, is_gated=True)
    x = inputs(fused.up_proj)
    fused(x)
    with torch.no_grad():
        fused(x)
    assert kept == ["hidden", "nothing"]


# ---- when children are called one by one


def hook_after(module: BlockFeedForward) -> None:
    module.up.register_forward_hook(lambda *_: None)


def hook_before(module: BlockFeedForward) -> None:
    module.down.register_forward_pre_hook(lambda *_: None)


def hook_of_gradients(module: BlockFeedForward) -> None:
    module.down.register_full_backward_hook(lambda *_: None)


def another_activation(module: BlockFeedForward) -> None:
    module.act = nn.Tanh()


def layer_in_between(module: BlockFeedForward) -> None:
    module.act = nn.Sequential(module.act, nn.Linear(48, 48, dtype=torch.float64))


def another_projection(module: BlockFeedForward) -> None:
    module.up = module.up.to_dense()  # type: ignore[misc]


def offloaded(module: BlockFeedForward) -> None:
    cpu_offload(module, execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    "change",
    [hook_after, hook_before, hook_of_gradients, another_activation, layer_in_between, another_projection, offloaded],
)
def test_children_that_somebody_looks_at_or_replaced_are_called(change: Callable[[BlockFeedForward], None]) -> None:
    module = feed_forward()
    x = inputs(module.up)
    assert calls_of(module, x) == []
    change(module)
    assert not module.is_fused
    assert "computed one by one" in repr(module)
    expected = module.to_stock()(x)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    if change is not offloaded:
        assert calls_of(module, x) == list(CHAIN)


def test_a_hook_that_is_taken_off_lets_it_compute_as_one_again() -> None:
    module = feed_forward()
    seen: list[torch.Size] = []
    handle = module.up.register_forward_hook(lambda *args: seen.append(args[2].shape))
    x = inputs(module.up)
    module(x)
    assert seen == [(2, 7, 48)]  # the activation that only the stock MLP has
    handle.remove()
    assert calls_of(module, x) == []


# ---- what it refuses


@pytest.mark.parametrize(
    ("mlp", "chain", "named"),
    [
        (StockMLP(make(rows=4), make(columns=5)), CHAIN, "cannot feed"),
        (StockMLP(make(rows=4), make(columns=4), nn.Tanh()), CHAIN, "leave it as it is"),
        (StockMLP(nn.Linear(8, 32), make(columns=4)), CHAIN, "leave it as it is"),
        (
            StockMLP(make(rows=4), make(columns=4)),
            ("up", "act", "down", "dropout"),
            "in the order up, act, down, dropout",
        ),
    ],
    ids=["sides", "activation", "dense projection", "names"],
)
def test_what_does_not_fit_together_is_refused(mlp: nn.Module, chain: tuple[str, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        BlockFeedForward(mlp, chain)


# ---- models


@pytest.mark.parametrize("arch", FEED_FORWARD_CHAINS)
def test_chains_are_what_stock_mlps_compute(arch: str) -> None:
    """In training, so that a dropout in another place, or left out, shows."""
    config = tiny_config(arch)
    if arch == "gpt2":
        config.resid_pdrop = 0.5
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    name = {"gpt2": "transformer.h.0.mlp", "gpt_neox": "gpt_neox.layers.0.mlp"}[arch]
    mlp = model.get_submodule(name).double().train()
    chain = FEED_FORWARD_CHAINS[arch]
    assert set(chain) == set(dict(mlp.named_children()))
    x = torch.randn(3, model.config.hidden_size, dtype=torch.float64)
    torch.manual_seed(1)
    expected = y = mlp(x)
    torch.manual_seed(1)
    y = x
    for child in chain:
        y = mlp.get_submodule(child)(y)
    assert torch.equal(y, expected)
    assert bool((y == 0).any()) == (arch == "gpt2")  # dropped


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "mish"])
def test_a_model_is_fused_where_its_activation_is_known(activation: str) -> None:
    model = sparsify(tiny_model("gpt2", activation_function=activation), BLOCK)
    for block in model.transformer.h:
        assert isinstance(block.mlp, BlockFeedForward) == (activation != "mish")
        assert can_be_fused(block.mlp, FEED_FORWARD_CHAINS["gpt2"]) == (activation != "mish")
        if activation != "mish":
            assert block.mlp.is_fused
    dense = to_dense(model)
    stock = tiny_model("gpt2", activation_function=activation)
    assert [type(module) for module in dense.modules()] == [type(module) for module in stock.modules()]
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-9, atol=1e-9)
    mine, stock_gradients = gradients_of(model), gradients_of(dense)
    tiles = {f"{name}.weight" for name in sparse_layers(model)}
    for name in mine.keys() - tiles:
        torch.testing.assert_close(mine[name], stock_gradients[name], rtol=1e-7, atol=1e-9)


def test_dropout_of_a_fused_model_is_that_of_the_stock_one() -> None:
    model = sparsify(tiny_model("gpt2", activation_function="gelu_new", resid_pdrop=0.5), BLOCK)
    mlp = model.transformer.h[0].mlp
    assert isinstance(mlp, BlockFeedForward)
    x = torch.randn(1, 5, model.config.n_embd, dtype=model.dtype)
    results = []
    for module in (mlp, mlp.to_stock()):
        torch.manual_seed(0)
        results.append(module.train()(x))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert (results[0] == 0).any()


def test_module_paths_and_state_dict_are_those_of_the_stock_model() -> None:
    config = tiny_config("gpt2", activation_function="gelu_new")
    model, stock = sparsify(config, BLOCK), AutoModelForCausalLM.from_config(config)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in stock.named_modules()]
    columns = {f"{name}.columns" for name in sparse_layers(model)}
    assert model.state_dict().keys() - columns == stock.state_dict().keys()
    text = repr(model)
    assert "(mlp): BlockFeedForward(\n          c_fc, act, c_proj computed as one\n" in text
    assert text.count("tiles 8x8, sparsity=0.") == len(columns) / model.config.n_layer  # equal blocks are printed once


def test_only_pairs_of_tiles_are_fused() -> None:
    costs = {"accounting": "whole_model", "seq_len": 8, "sparsity": 0.25}
    config = SparseIFTConfig(structure="block", block_size=8, scope="ffn", exclude=("mlp_in",), **costs)
    model = sparsify(tiny_config("gpt2", activation_function="gelu_new"), config)
    assert isinstance(model.transformer.h[0].mlp.c_proj, BlockSparseLinear)
    assert not any(isinstance(module, BlockFeedForward) for module in model.modules())
