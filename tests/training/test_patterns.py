"""Models with n:m masks: what they compute, which masks training gives them, and what comes back from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparseift_llm import DSTConfig, SparseIFTConfig, SparseTrainingController, load_pretrained, save_export, sparsify
from sparseift_llm.checkpoints.mask_file import apply_masks
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.training.schedules import cosine_drop_fraction
from tests.helpers import patterns
from tests.helpers.models import tiny_model, token_ids
from tests.helpers.tiny_runs import VOCAB, differences, final_state, masks, sparse_trainer

ARCHS = ("gpt2", "llama", "gpt_neox")
every_pattern = pytest.mark.parametrize(
    ("arch", "transposable"), [*((arch, False) for arch in ARCHS), ("gpt2", True), ("llama", True)]
)
both_ways = pytest.mark.parametrize("transposable", [False, True], ids=["", "transposable"])
STEPS = 8


def sparse(arch: str, algorithm: str = "rigl", **options: Any) -> PreTrainedModel:
    """A tiny float64 model with 2:4 masks."""
    dst = DSTConfig(algorithm, update_every_steps=1, drop_fraction=0.3, stop_fraction=1.0)
    return sparsify(tiny_model(arch), SparseIFTConfig(**{"structure": "2:4", "dst": dst, **options}))


# ---- what is computed


def reference_gradients(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients masked by hand, of a stock model of the same widths with the same weights."""
    config: Any = type(model.config).from_dict(model.config.to_dict())
    del config.sparse_ift
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    stock.load_state_dict(model.state_dict())
    tokens = token_ids()
    output = stock(input_ids=tokens, labels=tokens)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, layer in sparse_layers(model).items():
        gradients[f"{name}.weight"] = gradients[f"{name}.weight"] * layer.current_mask()
    return output.logits, gradients


def check_parity(arch: str, transposable: bool) -> None:
    model = sparse(arch, transposable=transposable)
    tokens = token_ids()
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    logits, gradients = reference_gradients(model)
    torch.testing.assert_close(output.logits, logits, rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.support("n:m masks: outputs and gradients", proves=("unstructured",))
@every_pattern
def test_it_computes_what_the_stock_model_with_the_zeros_does(arch: str, transposable: bool) -> None:
    check_parity(arch, transposable)


def test_a_gradient_that_is_not_masked_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseift_llm.layers.masked.masked_weight", lambda weight, *_: weight)
    with pytest.raises(AssertionError, match=r"c_attn\.weight"):
        check_parity("gpt2", False)


# ---- which masks


def take_steps(model: Any, optimizer: Any, steps: int = STEPS) -> None:
    """Train, and look after every step whether each group of four has two active weights.

    With transposable masks along both sides.
    """
    transposable = model.config.sparse_ift["transformation"]["transposable"]
    for step in range(steps):
        tokens = token_ids(seed=step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert patterns.wrong_groups(model, 2, 4, transposable) == []


@pytest.mark.support("n:m masks: transposable, n of every m along both sides", proves=("unstructured",))
@pytest.mark.parametrize("drop_by", ["magnitude", "saliency"])
@every_pattern
def test_rigl_gives_the_masks_of_the_rule(arch: str, transposable: bool, drop_by: str) -> None:
    """Every update of every layer is what sorted lists of weights and of dense gradients give."""
    dst = DSTConfig("rigl", update_every_steps=1, drop_fraction=0.3, stop_fraction=1.0, drop_by=drop_by)
    model = sparse(arch, dst=dst, transposable=transposable)
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, total_steps=20)
    checked = []

    def check(name: str, mask: Tensor, next_mask: Tensor, growth: Tensor | None) -> None:
        layer: Any = sparse_layers(model)[name]
        importance = layer.weight.detach().abs()
        if drop_by == "saliency":
            importance = importance * optimizer.state[layer.weight]["exp_avg_sq"].sqrt()
        number = int(cosine_drop_fraction(controller.step, 20, 0.3) * int(mask.sum()))
        if transposable:
            assert torch.equal(next_mask, patterns.by_hand_in_blocks(mask, importance, growth, number, 2, 4)), name
        else:
            views = [patterns.outputs_first(layer, tensor) for tensor in (mask, importance, growth)]
            expected = patterns.by_hand(*views, number, 4)
            assert torch.equal(patterns.outputs_first(layer, next_mask), expected), name
        checked.append(bool((mask != next_mask).any()))

    controller.listeners.append(check)
    steps = 2 if transposable else STEPS  # there are ninety patterns to look through for each block
    take_steps(model, optimizer, steps)
    assert len(checked) == steps * len(sparse_layers(model))
    assert all(checked)


@both_ways
def test_set_drops_the_smallest_and_grows_in_their_groups(transposable: bool) -> None:
    model = sparse("gpt2", "set", transposable=transposable)
    optimizer = SGD(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, total_steps=20)

    def check(name: str, mask: Tensor, next_mask: Tensor, growth: Tensor | None) -> None:
        layer: Any = sparse_layers(model)[name]
        size, gone = layer.weight.detach().abs(), mask & ~next_mask
        number = int(cosine_drop_fraction(controller.step, 20, 0.3) * int(mask.sum()))
        assert 0 < int(gone.sum()) <= number  # some come back by chance
        assert size[gone].max() <= size[mask].sort().values[number - 1]

    controller.listeners.append(check)
    take_steps(model, optimizer)


@pytest.mark.parametrize("family", ["parallel", "factorized", "doped"])
@both_ways
def test_other_families_keep_their_groups(family: str, transposable: bool) -> None:
    model = sparse("llama", family=family, transposable=transposable)
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=20)
    before = masks(model)
    for step in range(3):
        tokens = token_ids(seed=step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert differences(before, masks(model))
    assert patterns.wrong_groups(model, 2, 4, transposable) == []


# ---- compiled


@pytest.mark.support(
    "n:m masks: torch.compile, on stand-ins of the semi-structured kernels, too", proves=("unstructured",)
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, of any Function
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_run_is_the_eager_one() -> None:
    """Losses and masks of four steps, with a mask update after the second."""
    torch._dynamo.reset()
    runs = []
    for is_compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        dst = DSTConfig("rigl", update_every_steps=2, stop_fraction=1.0)
        model: Any = sparse("gpt2", dst=dst)
        before = masks(model)
        wrapped = torch.compile(model, backend="aot_eager") if is_compiled else model
        optimizer = AdamW(model.parameters(), lr=0.01)
        controller = SparseTrainingController(wrapped, optimizer, total_steps=20)
        losses = []
        for step in range(4):
            tokens = token_ids(seed=step)
            loss = wrapped(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        controller.close()
        assert differences(before, masks(model))
        assert patterns.wrong_groups(model, 2, 4) == []
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == is_compiled
        runs.append((torch.stack(losses), masks(model)))
    torch.testing.assert_close(*(losses for losses, _ in runs), rtol=1e-12, atol=0)
    assert not differences(runs[0][1], runs[1][1])


# ---- what comes back


def small_run(algorithm: str, transposable: bool = False) -> PreTrainedModel:
    """Of the vocabulary and length of the tiny Trainer's data."""
    dst = DSTConfig(algorithm, update_every_steps=2)
    return sparsify(
        tiny_model("gpt2", vocab_size=VOCAB), SparseIFTConfig(structure="2:4", transposable=transposable, dst=dst)
    )


@pytest.mark.support("n:m masks: static, SET and RigL, resuming bit for bit in a Trainer", proves=("unstructured",))
@pytest.mark.parametrize("algorithm", ["static", "set", "rigl"])
@both_ways
def test_a_resumed_run_equals_an_uninterrupted_one(algorithm: str, transposable: bool, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = sparse_trainer(small_run(algorithm, transposable), tmp_path, **saving)
    whole.train()
    resumed = sparse_trainer(small_run(algorithm, transposable), tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert not differences(final_state(whole), final_state(resumed))
    assert patterns.wrong_groups(resumed.model, 2, 4, transposable) == []  # type: ignore[arg-type]
    moved = differences(masks(small_run(algorithm, transposable)), final_state(resumed)["masks"])
    assert bool(moved) == (algorithm != "static")


@pytest.mark.support("n:m masks: saving, loading, exporting", proves=("unstructured",))
@every_pattern
def test_saved_exported_and_loaded_it_is_the_same_model(arch: str, transposable: bool, tmp_path: Path) -> None:
    model = sparse(arch, transposable=transposable)
    tokens = token_ids()
    logits = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path / "saved")
    save_export(model, tmp_path / "dense")
    save_export(model, tmp_path / "packed", format="sparse")
    for folder in ("saved", "packed"):
        loaded = load_pretrained(tmp_path / folder, dtype=torch.float64)
        assert not differences(masks(model), masks(loaded))
        assert not differences(dict(model.state_dict()), dict(loaded.state_dict()))
        assert torch.equal(loaded(input_ids=tokens).logits, logits)
        groups = {type(layer.groups).__name__ for layer in sparse_layers(loaded).values()}
        assert groups == {"TransposableBlocks" if transposable else "InputGroups"}
    for folder in ("saved", "dense"):  # a stock model with zeros, for anyone
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float64)
        assert not sparse_layers(stock)
        assert torch.equal(stock(input_ids=tokens).logits, logits)


def test_masks_with_another_number_in_a_group_are_refused() -> None:
    model = sparse("gpt2")
    wrong = masks(model)
    name, layer = next(iter(sparse_layers(model).items()))
    assert isinstance(layer, MaskedProjection)
    flat = wrong[name].T.reshape(-1, 4)  # as many in all, but three of four in one group
    first, second = flat[0].clone(), flat[1].clone()
    first[(~first).nonzero()[0]], second[second.nonzero()[0]] = True, False
    flat[0], flat[1] = first, second
    wrong[name] = flat.view(layer.mask.T.shape).T.contiguous()
    assert wrong[name].sum() == layer.mask.sum()
    with pytest.raises(ValueError, match=rf"{name} has other numbers .* per group of n:m neighbours"):
        apply_masks(model, wrong, "a test")
    assert patterns.wrong_groups(model, 2, 4) == []  # nothing was changed


def test_masks_that_are_patterned_along_one_side_are_no_transposable_ones() -> None:
    one_side, both_sides = sparse("gpt2"), sparse("gpt2", transposable=True)
    apply_masks(one_side, masks(both_sides), "a test")  # the other way round it is fine
    before = masks(both_sides)
    with pytest.raises(ValueError, match=r"c_attn has other numbers .* per group of n:m neighbours"):
        apply_masks(both_sides, masks(sparse("gpt2")), "a test")
    assert not differences(masks(both_sides), before)


@pytest.mark.support(
    "n:m masks: gmp, granet, erk, whole_model, balance_heads, init: pretrained of a wider stream", refused=True
)
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dst": DSTConfig("gmp")}, "algorithm='gmp'"),
        ({"dst": DSTConfig("granet")}, "algorithm='granet'"),
        ({"distribution": "erk"}, "distribution='erk'"),
        ({"accounting": "whole_model", "seq_len": 8}, "accounting='whole_model'"),
        ({"balance_heads": True}, "balance_heads"),
        ({"init": "pretrained", "scope": "residual"}, "init='pretrained' of scope='residual'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_change_the_density_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} .*but structure='2:4' fixes the density of every row at 2 of 4"):
        SparseIFTConfig(structure="2:4", **options)


@pytest.mark.support("n:m masks: transposable with an m above 4", refused=True)
@pytest.mark.parametrize("pattern", ["2:5", "4:8"])
def test_blocks_with_too_many_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"too many with structure='{pattern}'; use an m of at most 4, e\.g\. '2:4'"):
        SparseIFTConfig(structure=pattern, transposable=True)


def test_keep_connected_holds() -> None:
    """Of 32 outputs with one of sixteen inputs each, an input can be left out; with the option none is, ever."""
    unread = {}
    for keep_connected in (False, True):
        dst = DSTConfig("set", 1, drop_fraction=0.9, stop_fraction=1.0, keep_connected=keep_connected)
        model = sparse("llama", structure="1:16", scope="ffn", dst=dst)
        optimizer = SGD(model.parameters(), lr=0.01)
        SparseTrainingController(model, optimizer, total_steps=20)
        counts = []
        for step in range(STEPS):
            counts += [int((~layer.current_mask().any(0)).sum()) for layer in sparse_layers(model).values()]
            tokens = token_ids(seed=step)
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert patterns.wrong_groups(model, 1, 16) == []
        unread[keep_connected] = sum(counts)
    assert unread[False] > 0
    assert unread[True] == 0
