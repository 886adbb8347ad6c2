"""`sparseift plan` of recipes, of every option, of several settings, and its estimates for GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseift_llm import SparseIFTConfig, plan
from sparseift_llm.cli import main
from sparseift_llm.config.describe import describe_options
from sparseift_llm.models.presets import load_config
from sparseift_llm.planning.devices import DEVICES, Device, devices_for_state, training_seconds
from sparseift_llm.utils.units import readable_count
from tests.helpers.pretrain_runs import RECIPES, RIGL, tiny_recipe


def printed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(printed(capsys, *words, "--json"))
    return values


def test_defaults_are_those_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    values = as_json(capsys, "--model", "gpt3-small")
    assert values["config"] == plan(load_config("gpt3-small"), SparseIFTConfig()).config.to_dict()
    assert values["seq_len"] == 2048  # the model's longest


def test_every_option_of_the_config_is_one_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    words = capsys.readouterr().out.split()
    for option in describe_options(SparseIFTConfig):
        assert f"--{option.name.rpartition('.')[2].replace('_', '-')}" in words
    values = as_json(
        capsys, "--model", "llama-160m", "--family", "factorized", "--nonlinearity", "gelu", "--sparsity", "0.5",
        "--rules", "[{family: dense, layers: '0'}]", "--seed", "3", "--algorithm", "set", "--seq-len", "64",
    )  # fmt: skip
    assert values["config"]["family"] == {"name": "factorized", "nonlinearity": "gelu", "sparse_u_only": False}
    assert (values["config"]["seed"], values["config"]["dst"]["algorithm"]) == (3, "set")
    assert {layer["family"] for layer in values["layers"]} == {"dense", "factorized"}


def test_a_recipe_is_planned_with_its_own_model_vocabulary_and_tokens(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, RIGL)
    values = as_json(capsys, recipe)
    assert values["seq_len"] == 16
    assert values["config"]["sparsity"] == 0.75
    assert values["sparse"]["logit_flops_per_token"] == 2 * 32 * 260  # the tokenizer that the recipe trains
    assert values["tokens"] == 12 * 4 * 2 * 16  # steps, batch, accumulation, length
    assert as_json(capsys, recipe, "--sparsity", "0.5", "--seq-len", "8")["config"]["sparsity"] == 0.5
    assert not (tmp_path / "run").exists()


def test_a_dense_recipe_needs_a_transformation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    assert main(["plan", str(recipe)]) == 2
    assert "trains the dense model; give a transformation to plan" in capsys.readouterr().err
    assert as_json(capsys, recipe, "--sparsity", "0.5")["config"]["sparsity"] == 0.5
    assert main(["plan"]) == 2
    assert "give a RECIPE.yaml, or a model with --model" in capsys.readouterr().err
    assert main(["plan", str(recipe), "--sparsity", "0.5", "--seq-len", "17"]) == 2
    assert "data.seq_len=17 is above the model's 16 positions" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_loaded_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load((RECIPES / "gpt3_small_wide75_rigl.yaml").read_text())
    values["data"]["tokenizer"] = str(tmp_path / "nothing")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = printed(capsys, tmp_path / "recipe.yaml")
    assert (
        "vocabulary: 50,257 entries, which gpt3-small has by itself, because the tokenizer could not be loaded" in text
    )
    assert "11.3G tokens on one: dense" in text  # 21511 steps of 512 sequences of 1024


def test_settings_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "gpt3-small", "--seq-len", "1024", "--compare", "scope=ffn", "structure=block sparsity=0.5"]
    lines = [line.split("  ") for line in printed(capsys, *words).splitlines() if line]
    rows = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}
    assert rows["dense"][:5] == ["768", "3072", "0.000", "125M", "2.00 GB"]
    assert rows["scope=ffn"][:3] == ["768", "12288", "0.667"]  # of all projections, attention left dense
    assert rows["scope=ffn"][5:7] == ["1.00x", "1.00x"]
    assert rows["structure=block sparsity=0.5"][5] == "1.00x"
    whole = as_json(capsys, *words)
    assert whole.keys() == {"scope=ffn", "structure=block sparsity=0.5"}


@pytest.mark.parametrize("structure", ["unstructured", "block"])
def test_estimates_follow_from_the_stated_formulas(capsys: pytest.CaptureFixture[str], structure: str) -> None:
    words = ["--model", "gpt3-small", "--seq-len", "1024", "--structure", structure, "--tokens", "2e9"]
    values = as_json(capsys, *words, "--utilization", "0.5")
    sparse = values["sparse"]
    # 75% zeros: masks multiply four times the active weights
    factor = 1 if structure == "block" else 4
    around = sparse["forward_flops_per_token"] - sparse["linear_flops_per_token"]
    executed = factor * sparse["linear_flops_per_token"] + around
    assert values["executed_flops_per_token"]["sparse"] == executed
    assert values["executed_flops_per_token"]["dense"] == values["dense"]["forward_flops_per_token"]
    row = next(row for row in values["devices"] if row["device"] == "A100 80GB")
    assert row["seconds"]["sparse"] == pytest.approx(2e9 * 3 * executed / (0.5 * 312e12))
    assert row["devices_for_state"] == {"dense": 1, "sparse": 1}


EXECUTED = {  # millions of weights: projections of the dense model 84.9, its head 38.6
    "sparsity=0.5": 2 * (2 * 84.934656 + 2 * 38.597376),
    "sparsity=0.75": 2 * (4 * 84.934656 + 4 * 38.597376),
    "sparsity=0.75 embedding=dense": 2 * (4 * 84.934656 + 4 * 38.597376),
    "sparsity=0.5 structure=block embedding=unstructured": 2 * (84.934656 + 2 * 38.597376),
    "sparsity=0.5 structure=block embedding=dense": 2 * (84.934656 + 2 * 38.597376),
    "sparsity=0.5 structure=block": 2 * (84.934656 + 9423 * 64**2 / 1e6),  # a head of 9,423 tiles
    "sparsity=0.5 structure=2:4": 2 * (2 * 84.934656 + 2 * 38.597376),
}


@pytest.mark.parametrize("settings", EXECUTED)
def test_zeros_of_a_masked_head_are_executed_and_those_outside_of_its_tiles_are_not(
    capsys: pytest.CaptureFixture[str], settings: str
) -> None:
    words = ["--model", "llama-gpt3-small", "--scope", "residual", "--seq-len", "1024"]
    options = [f"--{key}={value}" for key, _, value in (word.partition("=") for word in settings.split())]
    values = as_json(capsys, *words, *options)
    attention = 4 * 1024 * 768 * 12 / 1e6
    executed = values["executed_flops_per_token"]
    assert executed["sparse"] == pytest.approx(1e6 * (EXECUTED[settings] + attention), rel=1e-9)
    assert executed["dense"] == values["dense"]["forward_flops_per_token"]
    note = f"dense, {readable_count(executed['sparse'])} sparse; masks skip no zeros"
    assert note in printed(capsys, *words, *options)
    compared = as_json(capsys, *words, "--compare", settings)[settings]
    assert compared["devices"] == values["devices"]


def test_state_that_does_not_fit_needs_several_devices() -> None:
    result = plan(load_config("gpt3-xl"), SparseIFTConfig(sparsity=0.9), 1024)
    state = result.sparse.to_dict()["train_state_bytes"]
    smallest = DEVICES[0]
    count = devices_for_state(state, smallest)
    assert count > 1
    assert (count - 1) * 0.9 * smallest.memory_bytes < state <= count * 0.9 * smallest.memory_bytes


def test_a_utilization_out_of_range_is_refused() -> None:
    for utilization in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="utilization must be in"):
            training_seconds(1e9, 1e9, Device("one", 1e9, 1e12), utilization)
