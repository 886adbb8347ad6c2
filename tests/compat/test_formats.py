"""A checkpoint carries its plan: what a new folder loads to does not depend on how sizes are computed today."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparseift_llm import SparseIFTConfig, isoflop, load_pretrained, optimizer_param_groups, plan, save_export, sparsify
from sparseift_llm.analysis.matrices import matrix_source
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.families.registry import FAMILIES
from sparseift_llm.models import architectures
from sparseift_llm.planning import allocation, planner
from tests.checkpoints.test_loading import check_equal
from tests.compat.test_old_checkpoints import FIXTURES, KINDS, STOCK, check
from tests.helpers.models import tiny_config

OLD = FIXTURES / "v0.1.0"


class FormulaError(Exception):
    """A size was computed while a checkpoint was read."""


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise FormulaError


def functions_of(module: types.ModuleType) -> list[Callable[..., Any]]:
    return [
        value
        for value in vars(module).values()
        if isinstance(value, types.FunctionType) and value.__module__ == module.__name__
    ]


@pytest.fixture
def without_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every formula, the planner and the building of models raise, under whatever name a module has imported them."""
    formulas = [*functions_of(isoflop), *functions_of(planner), *functions_of(allocation), architectures.build_model]
    assert len(formulas) > 20
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "sparseift_llm":
            for key, value in list(vars(module).items()):
                if any(value is formula for formula in formulas):
                    monkeypatch.setattr(module, key, refuse)
    for family in FAMILIES.values():
        for method in ("sparse_config", "parts"):
            if hasattr(family, method):
                monkeypatch.setattr(family, method, refuse)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every checkpoint of 0.1.0, loaded and saved again."""
    folders = {}
    for kind in KINDS:
        folder = folders[kind] = tmp_path_factory.mktemp("new") / kind
        model = load_pretrained(OLD / kind)
        if kind.endswith("packed"):
            save_export(model, folder, "sparse")
        else:
            model.save_pretrained(folder)
    return folders


def check_as_old(model: PreTrainedModel, kind: str) -> None:
    """`model` has the parameters, masks and logits of version 0.1.0's checkpoint."""
    check(model, OLD / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_folder_loads_without_any_formula(
    kind: str, saved: dict[str, Path], without_formulas: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = json.loads((saved[kind] / "config.json").read_text())
    assert values["sparse_ift"]["format"] == 2
    assert ("quantization_config" in values) == (kind not in STOCK)
    check_as_old(model := load_pretrained(saved[kind]), kind)
    if kind not in STOCK:
        check_as_old(AutoModelForCausalLM.from_pretrained(saved[kind]), kind)
    assert sum(1 for _ in matrix_source(saved[kind]).read()) == matrix_source(model).num_matrices > 0
    assert optimizer_param_groups(model, 1e-3)


def check_same_record(kind: str, saved: dict[str, Path]) -> None:
    assert read_record(AutoConfig.from_pretrained(OLD / kind)) == read_record(AutoConfig.from_pretrained(saved[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_record_of_the_old_folder(kind: str, saved: dict[str, Path]) -> None:
    assert "format" not in json.loads((OLD / kind / "config.json").read_text())["sparse_ift"]
    check_same_record(kind, saved)


def test_planted_fault_an_old_folder_needs_formulas(without_formulas: None) -> None:
    with pytest.raises((FormulaError, ValueError)):
        load_pretrained(OLD / "wide")
    with pytest.raises(FormulaError):
        plan(tiny_config("gpt2"), SparseIFTConfig())
    for kind in ("doped", "ffn_rules", "wide"):
        with pytest.raises((FormulaError, ValueError)):
            read_record(AutoConfig.from_pretrained(OLD / kind))


@pytest.mark.parametrize("kind", ["factorized_tiles", "heads", "doped", "block_wide"])
def test_planted_fault_another_rounding(kind: str, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes rounded to twice the multiple: the old folder is not what it was, the new one is."""
    rounded = isoflop.round_size
    monkeypatch.setattr(isoflop, "round_size", lambda size, multiple, valid=lambda _: True: rounded(size + 4, multiple))
    check_as_old(load_pretrained(saved[kind]), kind)
    with pytest.raises((AssertionError, ValueError)):
        check_as_old(load_pretrained(OLD / kind), kind)


@pytest.mark.parametrize("kind", ["rules", "heads_fused", "factorized_tiles"])
def test_planted_fault_other_counts(kind: str, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight more or less per layer: masks on disk would still fit, but what a layer should have would not."""
    expected = [layer.num_active for layer in read_record(AutoConfig.from_pretrained(saved[kind])).layers]
    monkeypatch.setattr(isoflop, "parallel_branches", lambda sparsity: 3)
    monkeypatch.setattr(isoflop, "doped_rank", lambda inputs, outputs, sparsity: 1)
    monkeypatch.setattr(isoflop, "wide_model_factor", lambda sparsity: 2.0)
    monkeypatch.setattr(isoflop, "factorized_inner", lambda *sizes: 1)
    found = [layer.num_active for layer in read_record(AutoConfig.from_pretrained(saved[kind])).layers]
    assert found == expected
    check_as_old(load_pretrained(saved[kind]), kind)
    with pytest.raises((AssertionError, ValueError)):
        check_same_record(kind, saved)


@pytest.mark.parametrize("num_words", [110, 200])
def test_embeddings_resized_under_whole_model_accounting(num_words: int, tmp_path: Path) -> None:
    """The logits' FLOPs set the number of tiles when the model was made; another vocabulary must not change it."""
    options = SparseIFTConfig(
        structure="block", block_size=4, accounting="whole_model", seq_len=16, sparsity=0.5, init="paper"
    )
    dense = tiny_config("gpt2")
    model = sparsify(dense, options)
    model.resize_token_embeddings(num_words, mean_resizing=False)
    dense.vocab_size = num_words
    assert plan(dense, options).layers != read_record(model.config).layers  # so that planning again would go wrong
    model.save_pretrained(tmp_path)
    for load in (load_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path)
        check_equal(loaded, model)
        assert loaded.config.vocab_size == num_words
        assert read_record(loaded.config) == read_record(model.config)
