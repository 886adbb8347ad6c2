"""The families that take a projection's place: sizes, FLOPs, parity, variance, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparseift_llm import (
    DSTConfig,
    SparseIFTConfig,
    SparseTrainingController,
    load_pretrained,
    plan,
    sparsify,
    to_dense,
)
from sparseift_llm.config.transform import FamilyRule
from sparseift_llm.families.factorized import _MEAN_SQUARE
from sparseift_llm.families.registry import FAMILIES, drop_in_of, family_of
from sparseift_llm.layers.base import SparseProjection, sparse_layers
from sparseift_llm.layers.composite import CompositeProjection, Part
from sparseift_llm.planning.cost import cost_of
from tests.helpers.models import ARCHS, gradients_of, logits_of, shake, tiny_config, tiny_model, token_ids

VARIANTS: dict[str, dict[str, Any]] = {
    "parallel": {"family": "parallel"},
    "parallel without norms": {"family": "parallel", "nonlinearity": "none"},
    "factorized": {"family": "factorized"},
    "factorized, layernorm": {"family": "factorized", "nonlinearity": "layernorm"},
    "factorized, gelu": {"family": "factorized", "nonlinearity": "gelu"},
    "factorized, sparse u only": {"family": "factorized", "sparse_u_only": True},
    "doped": {"family": "doped"},
}
NOT_LINEAR = ("parallel", "factorized, layernorm", "factorized, gelu")
STORAGES: dict[str, dict[str, Any]] = {"unstructured": {}, "block": {"structure": "block", "block_size": 8}}
WIDTHS = {"gpt2": {"n_embd": 64}, "llama": {"hidden_size": 64, "intermediate_size": 128}}  # room for tiles of 8
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_structure = pytest.mark.parametrize("structure", STORAGES)


def sparse_model(variant: str, structure: str, arch: str = "gpt2", **changes: Any) -> PreTrainedModel:
    config = SparseIFTConfig(**{**VARIANTS[variant], **STORAGES[structure], **changes})
    model = sparsify(tiny_model(arch, **WIDTHS[arch] if structure == "block" else {}), config)
    shake(model)
    return model


def composites(model: nn.Module) -> dict[str, CompositeProjection]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompositeProjection)}


# ---- sizes


@settings(max_examples=150)
@given(
    variant=st.sampled_from(list(VARIANTS)),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    tile=st.sampled_from([1, 8]),
    sparsity=st.floats(0.3, 0.9),
)
def test_the_multiply_adds_are_the_dense_ones_exactly(
    variant: str, rows: int, columns: int, tile: int, sparsity: float
) -> None:
    scale = max(tile, 4)
    shape, structure = (rows * scale, columns * scale), STORAGES["block" if tile > 1 else "unstructured"]
    config = SparseIFTConfig(**VARIANTS[variant], **structure)
    options = {key: value for key, value in VARIANTS[variant].items() if key != "family"}
    try:
        family = drop_in_of(FamilyRule(config.family, **options))
        parts = family.checked_parts("layer", shape, sparsity, config)
    except ValueError as error:  # too small for whole tiles, or for a row of them in every output
        assert "layer" in str(error)  # noqa: PT017
        return
    assert sum(part.num_active for part in parts) == shape[0] * shape[1]
    for part in parts:
        assert part.num_active % tile**2 == 0
        assert 0 < part.num_active <= part.num_weights
        assert part.is_sparse or part.num_active == part.num_weights
        assert part.shape[0] % tile == part.shape[1] % tile == 0


@pytest.mark.parametrize(
    ("variant", "shapes", "active"),
    [
        ("parallel", [(64, 64)] * 4, [1024] * 4),
        ("factorized", [(128, 64), (64, 128)], [2048, 2048]),
        ("factorized, sparse u only", [(51, 64), (64, 51)], [832, 3264]),
        ("doped", [(64, 64), (24, 64), (64, 24)], [1024, 1536, 1536]),
    ],
)
def test_sizes_at_three_quarters(variant: str, shapes: list[tuple[int, int]], active: list[int]) -> None:
    """64 x 64, by hand: k = 4; d = 64 / (2 * 0.25); d = 64 / 1.25 = 51.2; r = 0.75 * 32."""
    options = {key: value for key, value in VARIANTS[variant].items() if key != "family"}
    family = drop_in_of(FamilyRule(VARIANTS[variant]["family"], **options))
    parts = family.checked_parts("layer", (64, 64), 0.75, SparseIFTConfig(**VARIANTS[variant]))
    assert [part.shape for part in parts] == shapes
    assert [part.num_active for part in parts] == active


@every_variant
@every_structure
def test_a_plan_is_what_is_built(variant: str, structure: str) -> None:
    config = SparseIFTConfig(**VARIANTS[variant], **STORAGES[structure])
    dense = tiny_config("gpt2", n_embd=64)
    result, model = plan(dense, config), sparsify(dense, config)
    assert result.ratio_linear == result.ratio_whole_model == 1
    assert cost_of(model, result.seq_len) == result.sparse
    planned = {
        layer.path_of(matrix): matrix.num_active
        for layer in result.layers
        for matrix in layer.matrices
        if matrix.is_sparse
    }
    assert {name: layer.count_active() for name, layer in sparse_layers(model).items()} == planned


# ---- values


def reference(module: CompositeProjection, variant: str, x: Tensor) -> Tensor:
    """The family's equation with dense matrices, in plain torch."""
    matrices = {}
    for name, part in module.named_modules():
        if isinstance(part, SparseProjection):
            matrices[name] = part.to_dense().weight
        elif isinstance(part, nn.Linear):
            matrices[name] = part.weight
    if variant.startswith("parallel"):
        branches = [x @ matrix.T for matrix in matrices.values()]
        if variant == "parallel":
            norms = [module.get_submodule(f"norms.{index}") for index in range(len(branches))]
            branches = [
                F.layer_norm(branch, branch.shape[-1:], norm.weight, norm.bias)  # type: ignore[arg-type]
                for branch, norm in zip(branches, norms, strict=True)
            ]
        y = sum(branches[1:], branches[0])
    elif variant == "doped":
        y = x @ (matrices["v"] @ matrices["u"] + matrices["w"]).T
    else:
        inner = x @ matrices["u"].T
        if variant == "factorized, layernorm":
            norm = module.get_submodule("norm")
            inner = F.layer_norm(inner, inner.shape[-1:], norm.weight, norm.bias)  # type: ignore[arg-type]
        elif variant == "factorized, gelu":
            inner = F.gelu(inner, approximate="tanh")
        y = inner @ matrices["v"].T
    return y + module.bias


@every_variant
@every_structure
def test_modules_compute_their_equation(variant: str, structure: str) -> None:
    for module in composites(sparse_model(variant, structure)).values():
        x = torch.randn(2, 5, module.in_features, dtype=torch.float64)
        torch.testing.assert_close(module(x), reference(module, variant, x), rtol=1e-10, atol=1e-10)
        with torch.no_grad():  # a fault: one active weight off
            layer = [part for part in module.modules() if isinstance(part, SparseProjection)][-1]
            before, index = reference(module, variant, x), layer.weight.nonzero()[0]
            layer.weight[tuple(index)] += 1
            assert not torch.allclose(module(x), before, rtol=1e-6)


class _Filled(nn.Module):
    """A part with its zeros filled in: the gradient of every weight comes from plain autograd."""

    def __init__(self, layer: SparseProjection) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.to_dense().weight.detach().clone())  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@every_variant
@every_structure
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_models_equal_those_with_zeros_filled_in(variant: str, structure: str, arch: str) -> None:
    model = sparse_model(variant, structure, arch)
    filled = copy.deepcopy(model)
    for name, layer in sparse_layers(filled).items():
        parent, _, child = name.rpartition(".")
        setattr(filled.get_submodule(parent), child, _Filled(layer))
    torch.testing.assert_close(logits_of(model), logits_of(filled), rtol=1e-10, atol=1e-12)
    mine, other = gradients_of(model), gradients_of(filled)
    for name, layer in sparse_layers(model).items():
        mask = layer.current_mask().repeat_interleave(round(math.sqrt(layer.unit_size)), 0)
        mask = mask.repeat_interleave(round(math.sqrt(layer.unit_size)), 1)
        found = mine.pop(f"{name}.weight")
        expected = other.pop(f"{name}.weight") * mask
        assert found.abs().sum() > 0
        torch.testing.assert_close(found.abs().sum(), expected.abs().sum(), rtol=1e-9, atol=1e-12)
        if structure == "unstructured":
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@every_variant
@every_structure
def test_to_dense(variant: str, structure: str) -> None:
    model = sparse_model(variant, structure)
    if variant in NOT_LINEAR:
        with pytest.raises(ValueError, match="not a linear map"):
            to_dense(model)
        return
    dense = to_dense(model)
    assert not composites(dense)
    assert all(isinstance(block.mlp.c_fc, Conv1D) for block in dense.transformer.h)
    torch.testing.assert_close(logits_of(dense), logits_of(model), rtol=1e-9, atol=1e-10)
    assert all(parameter.requires_grad for parameter in dense.parameters())
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in to_dense(model).parameters())


@every_variant
@every_structure
def test_preserve_keeps_the_output_variance(variant: str, structure: str) -> None:
    torch.manual_seed(0)
    dense = tiny_config("gpt2", n_embd=128, n_layer=1)
    config = SparseIFTConfig(**VARIANTS[variant], **STORAGES[structure], init="preserve")
    model = sparsify(dense, config)
    x = torch.randn(512, 128)
    deviation = dense.initializer_range * math.sqrt(128)
    assert model.transformer.h[0].attn.c_attn(x).std().item() == pytest.approx(deviation, rel=0.15)
    assert model.transformer.h[0].mlp.c_fc(x).std().item() == pytest.approx(deviation, rel=0.15)


def test_the_mean_square_of_gelu() -> None:
    z = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    mean = torch.trapezoid(F.gelu(z, approximate="tanh").square() * density, z)
    assert mean.item() == pytest.approx(_MEAN_SQUARE["gelu"], abs=1e-4)


# ---- training and checkpoints


@pytest.mark.support("saving and loading a trained model")
@every_variant
@every_structure
def test_training_moves_masks_and_checkpoints_come_back(variant: str, structure: str, tmp_path: Path) -> None:
    dst = DSTConfig("rigl", update_every_steps=2, drop_fraction=0.5)
    model = sparse_model(variant, structure, dst=dst)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: layer.current_mask().clone() for name, layer in sparse_layers(model).items()}
    losses = []
    with_masks = SparseTrainingController(model, optimizer, 20)
    for _ in range(10):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with_masks.close()
    assert losses[-1] < losses[0]
    for name, layer in sparse_layers(model).items():
        assert not torch.equal(layer.current_mask(), before[name]) or layer.current_mask().all(), name
        assert layer.count_active() == layer.num_active
    model.eval().save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for name, layer in sparse_layers(model).items():
        assert torch.equal(sparse_layers(loaded)[name].current_mask(), layer.current_mask()), name
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_loads(arch: str, tmp_path: Path) -> None:
    model = sparse_model("factorized", "unstructured", arch).eval()
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(loaded), logits_of(model))


# ---- what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "paralel"}, "did you mean 'parallel'"),
        ({"family": "parallel", "scope": "ffn"}, "scope='ffn' goes with family='wide' only"),
        ({"family": "doped", "distribution": "erk"}, "distribution='erk' goes with family='wide' only"),
        ({"family": "doped", "sparsity": 0.0}, "needs a sparsity above 0"),
        (
            {"family": "doped", "nonlinearity": "gelu"},
            "nonlinearity='gelu' goes with family='parallel' or 'factorized' only, not with family='doped'",
        ),
        ({"nonlinearity": "none"}, "not with family='wide'; leave it out"),
        ({"family": "parallel", "sparse_u_only": True}, "sparse_u_only=True goes with family='factorized' only"),
        ({"family": "doped", "init": "supar"}, "init='supar' is derived for family='wide' alone"),
        ({"rules": [{"family": "doped"}]}, "rules need sides of the dense model's size"),
        ({"scope": "ffn", "rules": [{"family": "doped"}]}, "one width"),
        ({"family": "doped", "rules": [{"family": "wide"}]}, r"rules\[0\].*'wide' is not one of"),
        ({"family": "doped", "rules": [{"family": "dense", "layers": "3-"}]}, "layers must be numbers and ranges"),
        ({"family": "doped", "rules": [{"family": "dense", "layers": "0,3-1"}]}, "the range 3-1 is empty; write 1-3"),
        ({"family": "doped", "rules": [{"family": "dense", "targets": ["mlp"]}]}, "'mlp' is not one of"),
        ({"family": "doped", "rules": {"family": "dense"}}, "must be a list of mappings"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseIFTConfig.from_dict(values)


def test_sides_that_are_no_multiples_of_the_tile_are_refused() -> None:
    config = SparseIFTConfig(family="factorized", structure="block", block_size=64)
    with pytest.raises(ValueError, match="not a multiple of block_size=64"):
        plan(tiny_config("gpt2"), config)


def test_too_few_weights_for_every_output_are_refused() -> None:
    with pytest.raises(ValueError, match="without any input"):
        drop_in_of(FamilyRule("parallel")).checked_parts("layer", (64, 8), 0.9, SparseIFTConfig(family="parallel"))


def test_a_part_knows_its_size() -> None:
    assert Part("u", (3, 4), 5).num_weights == 12


# ---- the registry


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_found_by_the_name_of_its_options(name: str) -> None:
    config = SparseIFTConfig(family=name)
    family = FAMILIES[name](config.family)
    assert type(family) is type(family_of(config.family))
    assert family.name == config.family.name == name
    assert family.options == config.family
