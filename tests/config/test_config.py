"""The two config objects: what they accept, what they refuse and how they say so, and their round trip."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseift_llm.config.transform import KINDS, DSTConfig, SparseIFTConfig


def read(text: str, folder: Path) -> SparseIFTConfig:
    path = folder / "config.yaml"
    path.write_text(text)
    return SparseIFTConfig.from_yaml(path)


WRONG = [
    # unknown keys
    ("sparsty: 0.5", "sparse_ift: unknown key 'sparsty'; did you mean 'sparsity'?"),
    ("zzz: 1", "sparse_ift: unknown key 'zzz' (valid keys: family, sparsity, "),
    ("dst: {algoritm: set}", "sparse_ift.dst: unknown key 'algoritm'; did you mean 'algorithm'?"),
    ("drop_fraction: 0.3", "sparse_ift: unknown key 'drop_fraction'"),
    # wrong types
    ("sparsity: '0.5'", "sparse_ift.sparsity must be float, got str: '0.5'"),
    ("sparsity: 50%", "sparse_ift.sparsity must be float, got str: '50%'"),
    ("sparsity: true", "sparse_ift.sparsity must be float, got bool: True"),
    ("sparsity: null", "sparse_ift.sparsity must be float, got NoneType: None"),
    ("sparsity: [0.5, 0.75]", "sparse_ift.sparsity must be float, got list: [0.5, 0.75]"),
    ("width_multiple: 8.0", "sparse_ift.width_multiple must be int, got float: 8.0"),
    ("width_multiple: true", "sparse_ift.width_multiple must be int, got bool: True"),
    ("seq_len: '1024'", "sparse_ift.seq_len must be int, got str: '1024'"),
    ("seed: 1e3", "sparse_ift.seed must be int, got float: 1000.0"),
    ("scope: 3", "sparse_ift.scope must be str, got int: 3"),
    ("targets: mlp_in", "sparse_ift.targets must be a list of strings, got 'mlp_in'"),
    ("targets: [1, 2]", "sparse_ift.targets[0] must be str, got int: 1"),
    ("exclude: {q: 1}", "sparse_ift.exclude must be a list of strings, got {'q': 1}"),
    ("exclude: null", "sparse_ift.exclude must be a list of strings, got None"),
    ("dst: rigl", "sparse_ift.dst must be a mapping of options, got str: 'rigl'"),
    ("dst: null", "sparse_ift.dst must be a mapping of options, got NoneType: None"),
    ("dst: {update_every_steps: 1e2}", "sparse_ift.dst.update_every_steps must be int, got float: 100.0"),
    ("- sparsity: 0.5", "sparse_ift must be a mapping of options, got list"),
    ("", "sparse_ift must be a mapping of options, got NoneType: None"),
    # values out of range
    ("sparsity: 1", "sparsity must be in [0, 1), got 1.0"),
    ("sparsity: -0.1", "sparsity must be in [0, 1), got -0.1"),
    ("sparsity: 75", "sparsity must be in [0, 1), got 75.0"),
    ("sparsity: .nan", "sparsity must be in [0, 1), got nan"),
    ("width_multiple: 0", "width_multiple must be at least 1, got 0"),
    ("seq_len: 0", "seq_len must be at least 1, got 0"),
    ("dst: {update_every_steps: 0}", "update_every_steps must be at least 1, got 0"),
    ("dst: {drop_fraction: 0}", "drop_fraction must be in (0, 1), got 0.0"),
    ("dst: {drop_fraction: 1.0}", "drop_fraction must be in (0, 1), got 1.0"),
    ("dst: {drop_fraction: .nan}", "drop_fraction must be in (0, 1), got nan"),
    ("dst: {stop_fraction: 0}", "stop_fraction must be in (0, 1], got 0.0"),
    ("dst: {stop_fraction: 75}", "stop_fraction must be in (0, 1], got 75.0"),
    # words that are not on the list
    ("family: wid", "family='wid' is not one of 'wide'"),
    ("scope: modle", "scope='modle' is not one of 'model', 'ffn', 'residual'; did you mean 'model'?"),
    ("structure: unstructred", "structure='unstructred' is not one of 'unstructured'"),
    ("structure: 2:4:8", "structure='2:4:8' is not one of 'unstructured', 'block', 'n:m (e.g. 2:4)'"),
    ("structure: 0:4", "structure='0:4' is not one of"),
    ("structure: 4:4", "structure='4:4': 4 of 4 neighbours would be active; n must be below m"),
    ("structure: 24", "structure must be str, got int: 24"),
    ("distribution: uniformly", "distribution='uniformly' is not one of 'uniform', 'erk'; did you mean 'uniform'?"),
    ("accounting: whole", "accounting='whole' is not one of 'linears', 'whole_model'; did you mean 'whole_model'?"),
    ("init: supra", "init='supra' is not one of 'paper', 'preserve', 'supar', 'pretrained'; did you mean 'supar'?"),
    (
        "dst: {algorithm: RigL}",
        "algorithm='RigL' is not one of 'static', 'set', 'rigl', 'gmp', 'granet'; did you mean 'rigl'?",
    ),
    ("targets: [mlp]", "sparse_ift.targets[0]='mlp' is not one of 'q', 'k', 'v', 'o', 'mlp_in', 'mlp_out'"),
    ("exclude: [query]", "sparse_ift.exclude[0]='query' is not one of "),
    # combinations
    ("{scope: ffn, targets: [mlp_in, q]}", "targets: scope='ffn' widens only mlp_in and mlp_out, so 'q' cannot be"),
    ("accounting: whole_model", "accounting='whole_model' needs seq_len"),
    ("{init: supar, dst: {algorithm: gmp}}", "init='supar' assumes a constant sparsity, unlike algorithm='gmp'"),
    ("targets: []", "targets"),
    (
        "{structure: 2:4, sparsity: 0.75}",
        "sparsity=0.75 contradicts structure='2:4', in which 2 of 4 weights are zero (0.5); leave sparsity out",
    ),
    (
        "{structure: 2:4, family: parallel, rules: [{family: doped, targets: [q], sparsity: 0.25}]}",
        "sparsity=0.25 contradicts structure='2:4'",
    ),
    ("{structure: block, transposable: true}", "transposable=True needs structure='n:m', e.g. '2:4', not 'block'; set"),
    (
        "{structure: 4:8, transposable: true}",
        "too many with structure='4:8'; use an m of at most 4, e.g. '2:4', or leave it out",
    ),
    ("{structure: 2:4, block_size: 16}", "block_size=16 needs structure='block'"),
    ("{structure: 2:4, distribution: erk}", "distribution='erk' gives layers different densities, but structure='2:4'"),
    (
        "{structure: 1:4, accounting: whole_model, seq_len: 8}",
        "accounting='whole_model' solves the sparsity, but structure='1:4' fixes the density of every row at 1 of 4",
    ),
    (
        "{structure: 2:4, dst: {algorithm: gmp}}",
        "algorithm='gmp' starts dense and prunes wherever weights are small, but",
    ),
    ("{structure: 2:4, dst: {algorithm: granet}}", "algorithm='granet' starts dense"),
    (
        "{structure: 2:4, balance_heads: true}",
        "balance_heads evens out how many active weights heads have, but structure",
    ),
    ("{structure: 2:4, init: pretrained, scope: residual}", "init='pretrained' of scope='residual' keeps the trained"),
    (
        "{structure: 2:4, init: pretrained, scope: ffn, reserve: 0.2}",
        "reserve=0.2 shares active weights out to new units",
    ),
    (
        "{scope: residual, embedding: unstructured}",
        "with structure='unstructured' embedding='sparse' does so, too; write embedding='sparse' or leave it",
    ),
    ("{scope: residual, embedding: unstructured, structure: 2:4}", "with structure='2:4' embedding='sparse' does so,"),
    # files
    ("sparsity: 0.5\nsparsity: 0.75", "key 'sparsity' stands twice"),
    ("dst:\n  algorithm: set\n  algorithm: rigl", "key 'algorithm' stands twice"),
    ("sparsity: [0.5", "config.yaml is not valid YAML: "),
    ("sparsity: 0.5\n  scope: ffn", "config.yaml is not valid YAML: "),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_wrong_configs_are_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(text, tmp_path)


@pytest.mark.parametrize(("structure", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("1:3", 2 / 3), ("7:8", 0.125)])
def test_a_pattern_says_the_sparsity(structure: str, sparsity: float, tmp_path: Path) -> None:
    config = SparseIFTConfig(structure=structure)
    assert config.sparsity == sparsity
    assert (
        config == SparseIFTConfig(structure=structure, sparsity=sparsity) == read(f"structure: {structure}", tmp_path)
    )
    assert SparseIFTConfig.from_dict(config.to_dict()) == config
    assert dataclasses.replace(config, seed=1).sparsity == sparsity
    assert f"{config.pattern[0]}:{config.pattern[1]}" == structure if config.pattern else False
    assert (SparseIFTConfig().pattern, SparseIFTConfig(structure="block").pattern) == (None, None)


def test_defaults() -> None:
    config = SparseIFTConfig()
    assert (config.family, config.scope, config.sparsity, config.structure) == ("wide", "model", 0.75, "unstructured")
    assert config.dst == DSTConfig("rigl", 100, 0.3, 0.75)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "sparsity: 0",
        "sparsity: 0.999",
        "dst: {drop_fraction: 0.999, stop_fraction: 1}",
        "dst: {update_every_steps: 1}",
        "{accounting: whole_model, seq_len: 1}",
        "{scope: ffn, targets: [mlp_out]}",
        "{scope: residual, structure: block, embedding: unstructured}",
    ],
)
def test_values_at_the_edge_are_accepted(text: str, tmp_path: Path) -> None:
    assert isinstance(read(text, tmp_path), SparseIFTConfig)


def test_yaml_values_arrive(tmp_path: Path) -> None:
    text = "sparsity: 5e-1\nscope: ffn\ntargets: [mlp_in]\ndst:\n  algorithm: set\n  drop_fraction: 6e-4\n"
    config = read(text, tmp_path)
    assert config == SparseIFTConfig(
        sparsity=0.5, scope="ffn", targets=("mlp_in",), dst=DSTConfig(algorithm="set", drop_fraction=0.0006)
    )
    assert type(config.dst.drop_fraction) is float


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparseIFTConfig().sparsity = 0.5  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        DSTConfig().algorithm = "set"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (SparseIFTConfig(), ("q", "k", "v", "o", "mlp_in", "mlp_out")),
        (SparseIFTConfig(scope="ffn"), ("mlp_in", "mlp_out")),
        (SparseIFTConfig(targets=("o", "mlp_in")), ("o", "mlp_in")),
        (SparseIFTConfig(exclude=("q", "k", "v")), ("o", "mlp_in", "mlp_out")),
        (SparseIFTConfig(targets=("o", "mlp_in"), exclude=("o",)), ("mlp_in",)),
        (SparseIFTConfig(scope="ffn", exclude=("mlp_in",)), ("mlp_out",)),
        (SparseIFTConfig(exclude=KINDS), ()),
    ],
)
def test_target_kinds(config: SparseIFTConfig, kinds: tuple[str, ...]) -> None:
    assert config.target_kinds == kinds


dst_configs = st.builds(
    DSTConfig,
    algorithm=st.sampled_from(["static", "set", "rigl", "gmp", "granet"]),
    update_every_steps=st.integers(1, 10**6),
    drop_fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
    stop_fraction=st.floats(0, 1, exclude_min=True),
)
options: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "scope": st.just("model"),
        "sparsity": st.floats(0, 1, exclude_max=True),
        "distribution": st.sampled_from(["uniform", "erk"]),
        "accounting": st.sampled_from(["linears", "whole_model"]),
        "seq_len": st.integers(1, 10**6),
        "init": st.sampled_from(["paper", "preserve", "supar"]),
        "targets": st.none() | st.lists(st.sampled_from(KINDS), min_size=1, unique=True).map(tuple),
        "exclude": st.lists(st.sampled_from(KINDS), unique=True).map(tuple),
        "width_multiple": st.integers(1, 512),
        "seed": st.integers(0, 2**63),
        "dst": dst_configs,
    }
)
configs = options.filter(lambda o: o["init"] != "supar" or not o["dst"].starts_dense).map(
    lambda o: SparseIFTConfig(**o)
)


@given(configs)
def test_round_trip(config: SparseIFTConfig) -> None:
    assert SparseIFTConfig.from_dict(config.to_dict()) == config


@given(configs)
def test_round_trip_through_json(config: SparseIFTConfig) -> None:
    assert SparseIFTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_to_dict_is_plain() -> None:
    values = SparseIFTConfig(targets=("q", "k", "v"), exclude=("o",), seq_len=8).to_dict()
    assert values["targets"] == ["q", "k", "v"]
    assert values["exclude"] == ["o"]
    assert values["seq_len"] == 8
    assert values["dst"] == {
        "algorithm": "rigl",
        "update_every_steps": 100,
        "drop_fraction": 0.3,
        "stop_fraction": 0.75,
        "drop_schedule": "cosine",
        "drop_by": "magnitude",
        "soft_growth": False,
        "start_fraction": 0.0,
        "keep_connected": None,
        "grown_state": "zero",
        "grown_warmup_steps": 0,
    }
    assert set(values) == {field.name for field in dataclasses.fields(SparseIFTConfig)}
