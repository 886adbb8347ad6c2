"""A wider residual stream around training and with other options: SµPar, FLOPs, metrics, spectra, heads, densities."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sparseift_llm import SparseTrainingController, optimizer_param_groups, sparsify
from sparseift_llm.analysis.spectral import spectral_report
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.metrics.mask_history import MaskMetrics
from sparseift_llm.metrics.throughput import TrainingFlops
from sparseift_llm.planning.cost import count_flops
from tests.helpers.models import tiny_config, token_ids, trained
from tests.helpers.residual import STORAGES, residual, residual_model

EMBEDDING = "model.embed_tokens"
every_storage = pytest.mark.parametrize("storage", ["masks", "tiles", "mixed"])


@pytest.mark.parametrize("embedding", ["sparse", "dense"])
def test_supar_divides_logits_only_where_their_fan_in_grew(embedding: str) -> None:
    config = tiny_config("llama", tie_word_embeddings=False)
    model = sparsify(config, residual(0.75, init="supar", embedding=embedding))
    factor = 1 if embedding == "sparse" else 1 / 4
    torch.testing.assert_close(model.model.norm.weight, torch.full((128,), float(factor)))
    rates = {}
    for group in optimizer_param_groups(model, lr=1.0):
        rates |= dict.fromkeys(map(id, group["params"]), group["lr"])
    layer = model.model.layers[0]
    assert rates[id(model.model.norm.weight)] == factor
    assert rates[id(layer.self_attn.q_proj.weight)] == 1  # as many active inputs as in the dense model
    assert rates[id(layer.self_attn.o_proj.weight)] == 4  # a quarter
    assert rates[id(model.lm_head.weight)] == rates[id(model.model.embed_tokens.weight)] == 1


@every_storage
@pytest.mark.parametrize("tied", [True, False])
def test_a_static_run_costs_what_the_dense_run_costs(storage: str, tied: bool) -> None:
    model = residual_model(tied=tied, **STORAGES[storage])
    controller, _ = trained(model)
    dense = count_flops(tiny_config("llama", tie_word_embeddings=tied), 12).training
    assert TrainingFlops(model, 24, 12, controller).total(3) == pytest.approx(3 * 24 * dense, rel=2e-3)


@every_storage
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("updates", [True, False])
def test_dense_gradients_of_logits_count_where_rigl_takes_them(storage: str, tied: bool, updates: bool) -> None:
    options = {**STORAGES[storage], "embedding_updates": updates}
    model = residual_model(tied=tied, algorithm="rigl", **options)
    total = TrainingFlops(model, 24, 12, trained(model)[0]).total(3)
    active = 3 * 24 * count_flops(model, 12).training
    layers = sparse_layers(model).values()
    counted = sum(math.prod(layer.gradient_shape) for layer in layers if layer.role == "projection")
    counted += (104 if storage == "tiles" else 100) * 128 * updates  # words, in tiles of 8, times channels
    assert total == active + 24 * 2 * 3 * counted


@every_storage
def test_metrics_know_the_ends(storage: str) -> None:
    model = residual_model(algorithm="rigl", embedding_updates=True, **STORAGES[storage])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = SparseTrainingController(model, optimizer, total_steps=8)
    metrics = MaskMetrics(controller)
    model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    optimizer.step()
    values = metrics.values()
    assert values["sparsity/embedding"] == pytest.approx(0.75, abs=0.02)
    assert values["mask_churn/embedding"] > 0
    assert metrics.layers()[EMBEDDING].kind == "embedding"


@every_storage
@pytest.mark.parametrize("tied", [True, False])
def test_spectra_of_model_and_folder_agree(storage: str, tied: bool, tmp_path: Path) -> None:
    model = residual_model(tied=tied, **STORAGES[storage])
    model.save_pretrained(tmp_path)
    live, saved = spectral_report(model), spectral_report(tmp_path)
    assert [layer.name for layer in live.layers] == list(sparse_layers(model))
    assert [layer.to_dict() for layer in live.layers] == [layer.to_dict() for layer in saved.layers]
    spectrum = live.layers[0]
    assert (spectrum.name, spectrum.kind) == (EMBEDDING, "embedding")
    assert spectrum.mean_degree_left == 25 or storage == "tiles"  # a channel is read by a quarter of 100 words


@pytest.mark.parametrize("algorithm", ["set", "rigl"])
def test_heads_stay_balanced_through_updates(algorithm: str) -> None:
    model = residual_model(algorithm=algorithm, balance_heads=True)
    controller, _ = trained(model)
    assert controller.cost.num_updates > 0
    heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4}
    counted = {}
    for name, layer in sparse_layers(model).items():
        kind = name.rpartition(".")[2]
        if kind in heads:
            mask = layer.current_mask()  # (out, in); the heads of o are its inputs
            counts = (mask.T if kind == "o_proj" else mask).reshape(heads[kind], -1).sum(1)
            assert int(counts.max() - counts.min()) <= 1, name
            counted[kind] = True
    assert counted.keys() == heads.keys()


def test_heads_in_tiles_keep_whole_tiles() -> None:
    model = residual_model(algorithm="rigl", balance_heads=True, structure="block", block_size=8)
    trained(model)
    for name, layer in sparse_layers(model).items():
        if name.endswith("q_proj"):
            counts = layer.current_mask().reshape(4, -1).sum(1)  # a head of 8 is one block-row
            assert int(counts.max() - counts.min()) <= 1, name


@every_storage
def test_erk_moves_density_between_projections_alone(storage: str) -> None:
    uniform, erk = (residual_model(distribution=name, **STORAGES[storage]) for name in ("uniform", "erk"))
    layers, even = sparse_layers(erk), sparse_layers(uniform)
    projections = [name for name, layer in layers.items() if layer.role == "projection"]
    assert sum(layers[name].num_active for name in projections) == sum(even[name].num_active for name in projections)
    assert {name for name in projections if layers[name].num_active != even[name].num_active}
    ends = layers.keys() - set(projections)
    assert ends
    assert all(layers[name].num_active == even[name].num_active for name in ends)
    ids = token_ids()
    assert torch.isfinite(erk(input_ids=ids, labels=ids).loss)
