"""What a block-sparse plan records, chooses by itself, refuses and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from sparseift_llm import DSTConfig, SparseIFTConfig, sparsify
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.cli import main
from sparseift_llm.models.architectures import sizes_of
from sparseift_llm.models.presets import load_config
from sparseift_llm.planning.planner import plan, plan_of_dense
from tests.helpers.planned_models import LLAMA, SEQ_LEN, TINY, every_architecture
from tests.planning.test_block_planning import config, planned

# ---- the record


@every_architecture
def test_the_resolved_block_size_is_recorded(name: str, tmp_path: Path) -> None:
    dense = TINY[name]
    options = config(None, sparsity=0.5)
    assert options.block_size is None
    model = sparsify(dense, options)  # 45 wide: tiles of 16 are the smallest that are chosen
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())["sparse_ift"]["transformation"]
    assert (values["structure"], values["block_size"]) == ("block", 16)
    assert plan(dense, options).to_dict() == plan(dense, config(16, sparsity=0.5)).to_dict()
    assert read_record(AutoConfig.from_pretrained(tmp_path)) == plan(dense, options).record


@pytest.mark.parametrize(
    ("preset", "options", "size"),
    [
        ("gpt3-small", {"sparsity": 0.75}, 128),  # 1536 wide: 12 tiles of 128
        ("gpt3-small", {"sparsity": 0.75, "scope": "ffn"}, 64),  # 768 wide
        ("gpt3-small", {"sparsity": 0.0}, 64),
        ("gpt3-xl", {"sparsity": 0.75}, 256),
        ("gpt3-small", {"sparsity": 0.9}, 256),
        ("gpt3-xl", {"sparsity": 0.9}, 256),
        ("llama-160m", {"sparsity": 0.5}, 128),
    ],
)
def test_the_default_block_size_follows_the_narrowest_width(preset: str, options: dict[str, Any], size: int) -> None:
    result = plan(load_config(preset), config(None, **options), 1024)
    assert result.config.block_size == size
    assert result.ratio_linear == 1.0
    assert all(layer.num_active % size**2 == 0 for layer in result.layers)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"hidden_size": 40},
            {"scope": "ffn", "sparsity": 0.75, "size": 16},
            r"mlp\.gate_proj is 352 x 40, and 40 is not a multiple of block_size=16; choose a block_size that divides "
            r"it, another scope, or leave mlp_in dense with exclude and accounting='whole_model'",
        ),
        ({"intermediate_size": 84}, {"sparsity": 0.0}, r"gate_proj is 84 x 32, and 84 is not a multiple"),
        ({}, {"sparsity": 0.95}, r"q_proj: \d+ active tiles for 18 block-rows .*; use a block_size below 8 or a lower"),
        ({"hidden_size": 32}, {"sparsity": 0.75, "size": 64}, r"active tiles for . block-rows would leave outputs"),
    ],
)
def test_models_that_tiles_do_not_fit(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    dense = LlamaConfig(**{**LLAMA, **changes})
    with pytest.raises(ValueError, match=message):
        sparsify(dense, config(**options))


def test_a_side_of_an_excluded_projection_need_not_fit() -> None:
    """Scope `ffn` leaves the hidden size alone; nothing that stays dense is asked to hold tiles."""
    dense = LlamaConfig(**{**LLAMA, "hidden_size": 32, "num_key_value_heads": 1, "num_attention_heads": 8})
    assert plan(dense, config(8, scope="ffn", sparsity=0.75), SEQ_LEN).ratio_linear == 1.0
    kept = plan_of_dense(dense, config(8, sparsity=0.5, targets=("mlp_in", "mlp_out")), SEQ_LEN)
    assert sizes_of(kept.hf_config).hidden == 48
    assert kept.layers[1].sparse_shape == (6, 48)  # one head of 6 for the keys, dense: no multiple of 8
    assert not kept.layers[1].is_sparse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "block", "block_size": 12}, r"block_size must be one of 4, 8, 16, 32, 64, 128, 256, got 12"),
        ({"structure": "block", "block_size": 0}, r"block_size must be one of 4"),
        ({"structure": "block", "block_size": -8}, r"block_size must be one of 4"),
        ({"structure": "block", "block_size": 512}, r"block_size must be one of 4"),
        ({"block_size": 16}, r"block_size=16 needs structure='block'; set it or leave block_size out"),
        (
            {"structure": "block", "dst": DSTConfig("gmp")},
            r"algorithm='gmp' starts dense, but structure='block' stores a fixed number of tiles; use "
            r"structure='unstructured', or static, set or rigl",
        ),
        ({"structure": "blocks"}, r"structure='blocks' is not one of 'unstructured', .*; did you mean 'block'"),
        ({"structure": "block", "block_size": "16"}, r"block_size"),
        ({"structure": "block", "block_size": 16.0}, r"block_size"),
        ({"structure": "block", "block_size": True}, r"block_size"),
    ],
)
def test_contradictory_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseIFTConfig(**options)


def test_a_config_survives_its_dictionary() -> None:
    for size in (None, 4, 256):
        options = config(size, sparsity=0.6)
        assert SparseIFTConfig.from_dict(json.loads(json.dumps(options.to_dict()))) == options


# ---- the command


def command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", "--sparsity", "0.75", "--seq-len", "48", *words]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    TINY["llama"].save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str], model_folder: str) -> None:
    words = ["--model", model_folder, "--structure", "block", "--block-size", "8"]
    values = json.loads(command(capsys, *words, "--json"))
    expected = planned("llama", 8, sparsity=0.75)
    assert (values["config"]["structure"], values["config"]["block_size"]) == ("block", 8)
    assert values["sparse"] == expected.sparse.to_dict()
    assert values["layers"] == expected.to_dict()["layers"]
    table = {line.split()[0]: line.split()[1:] for line in command(capsys, *words).splitlines() if line}
    assert table["q"] == ["2", "32", "x", "32", "64", "x", "64", "0.75000", "1.0000"]
    stored, dense = expected.sparse.to_dict()["train_state_bytes"], expected.dense.to_dict()["train_state_bytes"]
    assert table["train_state_bytes"] == [
        f"{dense / 1e3:.0f}",
        "kB",
        f"{stored / 1e3:.0f}",
        "kB",
        f"{stored / dense:.4f}",
    ]


def test_the_command_chooses_a_block_size(capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(command(capsys, "--model", "gpt3-small", "--structure", "block", "--json"))
    assert values["config"]["block_size"] == 128
    unstructured = json.loads(command(capsys, "--model", "gpt3-small", "--json"))
    assert unstructured["config"]["block_size"] is None
    assert values["sparse"]["forward_flops_per_token"] == unstructured["sparse"]["forward_flops_per_token"]
    assert values["sparse"]["train_state_bytes"] < 0.5 * unstructured["sparse"]["train_state_bytes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--block-size", "8"], "block_size=8 needs structure='block'"),
        (["--structure", "block", "--block-size", "9"], "block_size must be one of 4, 8"),
        (["--structure", "block", "--block-size", "64"], "active tiles for 2 block-rows would leave outputs"),
    ],
)
def test_mistakes_are_one_message(
    words: list[str], message: str, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", model_folder, "--sparsity", "0.75", "--seq-len", "48", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("sparseift: ")
