"""The record of a model as JSON: what goes in comes out, absent fields have defaults, damage names its field."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from transformers import GPT2Config

from sparseift_llm import DSTConfig, SparseIFTConfig, plan
from sparseift_llm.config.transform import FamilyRule
from sparseift_llm.planning.planner import plan_of_dense
from sparseift_llm.record.model_record import (
    DenseSizes,
    ModelRecord,
    has_record,
    missing_layers,
    transformation_values,
)
from sparseift_llm.record.quantization_mark import is_marked, mark, unmark
from sparseift_llm.record.specs import LayerSpec, MatrixSpec, RowGroup
from tests.helpers.planned_models import TINY

TRANSFORMATIONS: dict[str, dict[str, Any]] = {
    "wide": {"balance_heads": True, "distribution": "erk", "dst": DSTConfig(algorithm="set")},
    "wide in tiles": {"structure": "block", "block_size": 8},
    "ffn with rules": {"scope": "ffn", "rules": (FamilyRule("doped", ("q", "k", "v", "o"), layers="0"),)},
    "parallel": {"family": "parallel", "exclude": ("mlp_in",)},
    "factorized": {"family": "factorized", "sparse_u_only": True, "nonlinearity": "gelu", "sparsity": 0.5},
    "doped in tiles": {"family": "doped", "structure": "block", "block_size": 4},
    "wide 2:4": {"structure": "2:4"},
    "wide 2:4 along both sides": {"structure": "2:4", "transposable": True},
    "factorized 1:4": {"family": "factorized", "structure": "1:4"},
}

# A fused matrix with a budget for each of q, k and v, n:m, and embeddings that share their matrix with the logits.
QKV = {
    "name": "h.0.attn", "kind": "qkv", "family": "wide", "dense_shape": [12, 4], "layer_index": 0,
    "matrices": [
        {
            "shape": [24, 8], "num_active": 60, "structure": "unstructured", "heads": [0, 12],
            "row_groups": [
                {"kind": "q", "start": 0, "stop": 8, "num_active": 30},
                {"kind": "k", "start": 8, "stop": 16, "num_active": 20},
                {"kind": "v", "start": 16, "stop": 24, "num_active": 10},
            ],
        }
    ],
}  # fmt: skip
MLP = {
    "name": "h.0.mlp", "kind": "mlp_in", "family": "doped", "dense_shape": [16, 8], "layer_index": 0,
    "matrices": [
        {"path": "w", "shape": [16, 8], "num_active": 64, "structure": "block", "block_size": 4},
        {"path": "u", "shape": [2, 8], "num_active": 16, "structure": "dense"},
        {"path": "v", "shape": [16, 2], "num_active": 32, "structure": "dense"},
    ],
}  # fmt: skip
EMBEDDING = {
    "name": "wte", "kind": "embedding", "family": "wide", "dense_shape": [16, 4],
    "matrices": [{"shape": [16, 8], "num_active": 64, "structure": "n:m", "pattern": [2, 4]}],
}  # fmt: skip
LOGITS = {"name": "head", "kind": "logits", "family": "wide", "dense_shape": [16, 4], "tied_to": "wte"}
ROOM: dict[str, Any] = {
    "format": 2,
    "transformation": SparseIFTConfig().to_dict(),
    "dense_model": {"hidden": 4, "ffn": 16, "head_dim": 2, "vocab": 16},
    "layers": [QKV, MLP, EMBEDDING, LOGITS],
}


def through_json(record: ModelRecord) -> ModelRecord:
    return ModelRecord.from_dict(json.loads(json.dumps(record.to_dict())))


@pytest.mark.parametrize("options", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_what_goes_in_comes_out(arch: str, options: dict[str, Any]) -> None:
    record = plan(TINY[arch], SparseIFTConfig(**options)).record
    assert through_json(record) == record
    assert through_json(record).to_dict() == record.to_dict()


def test_a_record_by_hand() -> None:
    """One projection of GPT-2, as the text of model_record.py shows it."""
    record = plan_of_dense(TINY["gpt2"], SparseIFTConfig(targets=("mlp_in",))).record
    values = record.to_dict()
    assert {key: values[key] for key in ("format", "dense_model")} == {
        "format": 2,
        "dense_model": {"hidden": 32, "ffn": 128, "head_dim": 8, "vocab": 97},
    }
    assert SparseIFTConfig.from_dict(values["transformation"]) == record.transformation
    assert [layer["kind"] for layer in values["layers"]] == ["qkv", "o", "mlp_in", "mlp_out"] * 2
    assert values["layers"][6] == {
        "name": "transformer.h.1.mlp.c_fc",
        "kind": "mlp_in",
        "family": "wide",
        "dense_shape": [128, 32],
        "matrices": [{"shape": [256, 64], "num_active": 4096, "structure": "unstructured", "transposed": True}],
        "layer_index": 1,
    }
    assert values["layers"][7]["family"] == values["layers"][7]["matrices"][0]["structure"] == "dense"


def test_there_is_room_for_what_is_still_to_come() -> None:
    record = ModelRecord.from_dict(copy.deepcopy(ROOM))
    qkv, mlp, embedding, logits = record.layers
    assert qkv.matrices[0].row_groups[1] == RowGroup("k", 8, 16, 20)
    assert (embedding.matrices[0].structure, embedding.matrices[0].pattern) == ("n:m", (2, 4))
    assert (embedding.kind, logits.kind, logits.tied_to, logits.matrices) == ("embedding", "logits", "wte", ())
    assert [mlp.path_of(matrix) for matrix in mlp.matrices] == ["h.0.mlp.w", "h.0.mlp.u", "h.0.mlp.v"]
    assert record.to_dict() == ROOM
    assert through_json(record) == record


def test_groups_may_be_interleaved() -> None:
    """Two heads of two rows each, as GPT-NeoX orders them: query, key, value, and again."""
    groups = [RowGroup(kind, 2 * place, 2 * place + 2, 8, 2, 6) for place, kind in enumerate("qkv")]
    assert [group.rows for group in groups] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    matrix = MatrixSpec("", (12, 4), 24, "unstructured", row_groups=tuple(groups))
    assert MatrixSpec.from_dict(json.loads(json.dumps(matrix.to_dict())), "here") == matrix
    values = matrix.to_dict()
    values["row_groups"][0]["period"] = 2
    with pytest.raises(ValueError, match=r"here\.row_groups must be disjoint and inside the matrix"):
        MatrixSpec.from_dict(values, "here")


def test_absent_fields_have_the_defaults_that_specs_name() -> None:
    matrix = MatrixSpec.from_dict({"shape": [4, 4], "num_active": 16, "structure": "dense"}, "here")
    assert matrix == MatrixSpec("", (4, 4), 16, "dense", None, None, False, False, None, ())
    values = {"name": "x", "kind": "o", "family": "dense", "dense_shape": [4, 4], "matrices": [matrix.to_dict()]}
    assert LayerSpec.from_dict(values, "here") == LayerSpec("x", "o", "dense", (4, 4), (matrix,), {}, None, None)


@pytest.mark.parametrize(
    ("options", "own", "masked"),
    [
        ({}, False, True),
        ({"structure": "block", "block_size": 8}, True, False),
        ({"structure": "2:4"}, False, True),
        ({"family": "doped"}, True, True),
        ({"family": "doped", "structure": "block", "block_size": 4}, True, False),
        ({"scope": "ffn", "rules": (FamilyRule("dense", ("q", "k", "v", "o")),)}, False, True),
    ],
)
def test_how_weights_are_stored(options: dict[str, Any], own: bool, masked: bool) -> None:
    record = plan(TINY["gpt2"], SparseIFTConfig(**options)).record
    assert (record.has_own_layout, record.has_masked_weights) == (own, masked)
    config = GPT2Config()
    mark(config, record)
    assert is_marked(config) == own
    mark(config, record, always=True)
    assert is_marked(config)
    unmark(config)
    assert not is_marked(config)
    assert not hasattr(config, "quantization_config")


# ---- damage


def changed(path: str, value: Any) -> dict[str, Any]:
    """`ROOM` with another value at a path such as `layers.0.matrices.0.shape`; `...` deletes it."""
    values = copy.deepcopy(ROOM)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    target: Any = values
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return values


DAMAGE: list[tuple[str, Any, str]] = [
    ("format", ..., r"sparse_ift\.format is missing"),
    ("format", 1, r"sparse_ift\.format must be 2, got 1"),
    ("format", "2", r"sparse_ift\.format must be 2, got '2'"),
    ("format", True, r"sparse_ift\.format must be 2, got True"),
    ("transformation", ..., r"sparse_ift\.transformation is missing"),
    ("transformation.sparsity", 2, r"sparse_ift\.transformation .*sparsity must be in"),
    ("transformation.sparsty", 0.5, r"sparse_ift\.transformation .*'sparsty'.*version of sparseift_llm that saved it"),
    ("dense_model", ..., r"sparse_ift\.dense_model is missing"),
    ("dense_model", [4, 16], r"sparse_ift\.dense_model must be an object"),
    ("dense_model.hidden", "4", r"sparse_ift\.dense_model\.hidden must be a whole number of at least 1, got '4'"),
    ("dense_model.ffn", ..., r"sparse_ift\.dense_model\.ffn is missing"),
    ("dense_model.vocab", 0, r"sparse_ift\.dense_model\.vocab must be a whole number of at least 1, got 0"),
    ("dense_model.head_dim", True, r"sparse_ift\.dense_model\.head_dim must be"),
    ("layers", ..., r"sparse_ift\.layers is missing"),
    ("layers", {}, r"sparse_ift\.layers must be a list"),
    ("layers.0", "h.0", r"sparse_ift\.layers\[0\] must be an object"),
    ("layers.0.name", "", r"sparse_ift\.layers\[0\]\.name must be a non-empty string"),
    ("layers.0.name", "h.0.mlp", r"sparse_ift\.layers names a layer twice"),
    ("layers.0.kind", "kqx", r"layers\[0\] \(h\.0\.attn\)\.kind must be made of q, k, v and o"),
    ("layers.0.family", 3, r"layers\[0\] \(h\.0\.attn\)\.family must be a non-empty string"),
    ("layers.0.family", "dense", r"layers\[0\] \(h\.0\.attn\)\.matrices must be of structure 'dense'"),
    ("layers.0.family", "doped", r"layers\[0\] \(h\.0\.attn\)\.matrices must be matrices inside the module"),
    ("layers.1.family", "wide", r"layers\[1\] \(h\.0\.mlp\)\.matrices must be one matrix without a path"),
    ("layers.0.dense_shape", [12], r"layers\[0\] \(h\.0\.attn\)\.dense_shape must be two whole numbers"),
    ("layers.0.dense_shape", [12, 0], r"layers\[0\] \(h\.0\.attn\)\.dense_shape must be two whole numbers"),
    ("layers.0.layer_index", -1, r"layers\[0\] \(h\.0\.attn\)\.layer_index must be a whole number of at least 0"),
    ("layers.0.options", [], r"layers\[0\] \(h\.0\.attn\)\.options must be an object"),
    ("layers.0.matrices", [], r"layers\[0\] \(h\.0\.attn\)\.matrices must be one matrix"),
    ("layers.1.matrices.2.path", "u", r"layers\[1\] \(h\.0\.mlp\)\.matrices must be matrices inside the module"),
    ("layers.1.matrices.0.path", 3, r"matrices\[0\]\.path must be a non-empty string"),
    ("layers.0.matrices.0.shape", [24, 8.0], r"matrices\[0\]\.shape must be two whole numbers"),
    ("layers.0.matrices.0.num_active", ..., r"matrices\[0\]\.num_active is missing"),
    ("layers.0.matrices.0.num_active", 193, r"matrices\[0\]\.num_active is 193 in a matrix of \(24, 8\)"),
    ("layers.0.matrices.0.num_active", 59, r"matrices\[0\]\.row_groups must have num_active=59 weights together"),
    ("layers.1.matrices.1.num_active", 15, r"matrices\[1\]\.num_active is 15 in a matrix of \(2, 8\)"),
    ("layers.0.matrices.0.structure", "sparse", r"matrices\[0\]\.structure must be one of dense, unstructured"),
    ("layers.0.matrices.0.block_size", 4, r"matrices\[0\]\.block_size is 4 with structure 'unstructured'"),
    ("layers.1.matrices.0.block_size", ..., r"matrices\[0\]\.block_size is None with structure 'block'"),
    ("layers.1.matrices.0.block_size", 3, r"matrices\[0\]\.block_size is 3, which does not divide"),
    ("layers.1.matrices.0.num_active", 60, r"matrices\[0\]\.block_size is 4, which does not divide .* with 60"),
    ("layers.1.matrices.0.num_active", 48, r"matrices\[0\]\.num_active is 48, which leaves block-rows without a tile"),
    ("layers.2.matrices.0.pattern", ..., r"matrices\[0\]\.pattern is None with structure 'n:m'"),
    ("layers.2.matrices.0.pattern", [4, 4], r"matrices\[0\]\.pattern is \(4, 4\), which does not give"),
    (
        "layers.2.matrices.0.pattern",
        [3, 6],
        r"pattern is \(3, 6\), which does not give a matrix of \(16, 8\) 64 active",
    ),
    ("layers.0.matrices.0.transposable", True, r"matrices\[0\]\.transposable is true with structure 'unstructured'"),
    ("layers.1.matrices.0.transposable", 1, r"matrices\[0\]\.transposable must be true or false"),
    ("layers.2.matrices.0.num_active", 63, r"pattern is \(2, 4\), which does not give a matrix of \(16, 8\) 63 active"),
    ("layers.0.matrices.0.transposed", 1, r"matrices\[0\]\.transposed must be true or false"),
    ("layers.0.matrices.0.heads", [0, 5], r"matrices\[0\]\.heads is \(0, 5\), which does not divide"),
    ("layers.0.matrices.0.heads", [2, 4], r"matrices\[0\]\.heads is \(2, 4\), which does not divide"),
    ("layers.0.matrices.0.row_groups.1.start", 7, r"matrices\[0\]\.row_groups must be disjoint and inside"),
    ("layers.0.matrices.0.row_groups.2.stop", 25, r"matrices\[0\]\.row_groups must be disjoint and inside"),
    ("layers.0.matrices.0.row_groups.2.stop", 16, r"row_groups\[2\]\.stop must be above start=16, got 16"),
    ("layers.0.matrices.0.row_groups.2.repeats", 2, r"row_groups\[2\]\.period is None with repeats=2"),
    ("layers.0.matrices.0.row_groups.2.period", 4, r"row_groups\[2\]\.period is 4 with repeats=1"),
    ("layers.0.matrices.0.row_groups.0.kind", "x", r"row_groups\[0\]\.kind must be one of q, k, v"),
    (
        "layers.3.tied_to",
        "nowhere",
        r"layers \(head\)\.tied_to must name a layer with matrices of its own, got 'nowhere'",
    ),
    ("layers.3.tied_to", "head", r"layers \(head\)\.tied_to must name a layer with matrices of its own"),
    ("layers.2.tied_to", "h.0.mlp", r"layers\[2\] \(wte\)\.matrices must be empty"),
]


@pytest.mark.parametrize(("path", "value", "message"), DAMAGE, ids=[f"{path}={value}" for path, value, _ in DAMAGE])
def test_damage_names_its_field(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"the sparse_ift record in config\.json is damaged: .*{message}"):
        ModelRecord.from_dict(changed(path, value))


@pytest.mark.parametrize("values", [None, [], "wide", 3])
def test_what_is_no_object_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="damaged: sparse_ift must be an object"):
        ModelRecord.from_dict(values)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("codebook", r"sparse_ift\.codebook"),
        ("dense_model.experts", r"sparse_ift\.dense_model\.experts"),
        ("layers.0.lora", r"sparse_ift\.layers\[0\] \(h\.0\.attn\)\.lora"),
        ("layers.0.matrices.0.scale", r"layers\[0\] \(h\.0\.attn\)\.matrices\[0\]\.scale"),
        ("layers.0.matrices.0.row_groups.0.scale", r"row_groups\[0\]\.scale"),
    ],
)
def test_a_field_of_a_later_version_is_refused(path: str, field: str) -> None:
    with pytest.raises(
        ValueError, match=rf"has the field .*{field}, which this version does not know; load the model with"
    ):
        ModelRecord.from_dict(changed(path, 1))


def test_a_later_format_is_refused() -> None:
    message = (
        "has format 3, and this version reads formats up to 2; load the model with the version of sparseift_llm that"
    )
    with pytest.raises(ValueError, match=message):
        ModelRecord.from_dict({"format": 3, "anything": "else"})


# ---- without the whole record


def test_has_record_and_what_is_missing() -> None:
    config = GPT2Config()
    assert not has_record(config)
    assert not has_record(None)
    assert "call sparsify" in missing_layers(None) == missing_layers(config)
    config.sparse_ift = ModelRecord(SparseIFTConfig(), DenseSizes(1, 1, 1, 1), ()).to_dict()
    assert has_record(config)
    assert "load it with sparseift_llm.load_pretrained" in missing_layers(config)


def test_the_transformation_of_any_format() -> None:
    options = SparseIFTConfig(sparsity=0.5).to_dict()
    assert transformation_values({**options, "dense_sizes": {}})["sparsity"] == 0.5
    assert transformation_values({"format": 2, "transformation": options}) == options
    for damage in (None, [], {"format": 2}, {"format": 2, "transformation": 3}):
        assert transformation_values(damage) == {}
