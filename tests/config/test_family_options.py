"""Options of families: one class each, old keys beside the family's name, and equality with that name."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseift_llm.config import Doped, Factorized, FamilyRule, Parallel, SparseIFTConfig, Wide
from sparseift_llm.config.families import Dense, FamilyOptions

ALL = [
    Wide(),
    Wide("ffn"),
    Parallel(),
    Parallel("none"),
    Factorized(),
    Factorized("gelu"),
    Factorized("layernorm", sparse_u_only=True),
    Doped(),
]
every_family = pytest.mark.parametrize("family", ALL, ids=repr)


@every_family
def test_objects_and_mappings_mean_the_same(family: FamilyOptions) -> None:
    config = SparseIFTConfig(family=family)  # type: ignore[arg-type]
    assert config.family == family
    assert SparseIFTConfig.from_dict({"family": dataclasses.asdict(family)}) == config
    assert SparseIFTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["family"] == dataclasses.asdict(family)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@every_family
def test_keys_beside_the_name_mean_the_same_and_are_readable(family: FamilyOptions) -> None:
    """As in version 0.1, which also wrote those of other families, with the values they have if nothing is said."""
    own = dataclasses.asdict(family)
    name = own.pop("name")
    config = SparseIFTConfig(family=name, **own)
    assert config == SparseIFTConfig(family=family)  # type: ignore[arg-type]
    old = {"family": name, "scope": "model", "nonlinearity": None, "sparse_u_only": False, **own}
    assert SparseIFTConfig.from_dict(old) == config
    for key in ("scope", "nonlinearity", "sparse_u_only"):
        assert getattr(config, key) == old[key]


def test_defaults_of_each_family() -> None:
    assert SparseIFTConfig().family == Wide("model")
    assert SparseIFTConfig(scope="ffn").family == Wide("ffn")
    assert SparseIFTConfig(family="parallel").family == Parallel("layernorm")
    assert SparseIFTConfig(family="factorized").family == Factorized("none", sparse_u_only=False)


def test_options_equal_the_name_of_their_family_and_themselves() -> None:
    for family in ALL:
        assert family == family.name
        assert hash(family) == hash(family.name)
        assert str(family) == family.name
        assert [other for other in ALL if other == family] == [family]
    assert Wide() != "parallel"
    assert Parallel() != Factorized("layernorm")


def test_replacing_fields() -> None:
    config = SparseIFTConfig(family=Parallel("none"), seed=3)
    assert dataclasses.replace(config, sparsity=0.5) == SparseIFTConfig(Parallel("none"), 0.5, seed=3)
    assert dataclasses.replace(config, nonlinearity="layernorm").family == Parallel()
    assert dataclasses.replace(config, family="doped").family == Doped()
    assert dataclasses.replace(SparseIFTConfig(scope="ffn"), scope="model").family == Wide("model")


def test_rules_take_both_forms() -> None:
    rule = FamilyRule(Factorized("gelu"), targets=("o",))
    assert rule == FamilyRule("factorized", ("o",), nonlinearity="gelu")
    assert (rule.nonlinearity, rule.sparse_u_only) == ("gelu", False)
    assert FamilyRule("dense").family == Dense()
    old = {
        "family": "dense",
        "targets": None,
        "layers": "0",
        "sparsity": None,
        "nonlinearity": None,
        "sparse_u_only": 0,
    }
    config = SparseIFTConfig.from_dict({"family": "doped", "rules": [old, {"family": {"name": "parallel"}}]})
    assert config.rules == (FamilyRule("dense", layers="0"), FamilyRule("parallel"))
    assert SparseIFTConfig.from_dict(config.to_dict()) == config


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"family": {"name": "wid"}},
        "sparse_ift.family='wid' is not one of 'wide', 'parallel', 'factorized', 'doped'; did",
    ),
    ({"family": {"scope": "ffn"}}, "sparse_ift.family has no name; give it one of 'wide', 'parallel'"),
    ({"family": {"name": 3}}, "sparse_ift.family.name must be str, got 3"),
    (
        {"family": 3},
        "sparse_ift.family must be one of wide, parallel, factorized, doped, or a mapping of its options, got",
    ),
    ({"family": "dense"}, "sparse_ift.family='dense' is not one of 'wide'"),
    (
        {"family": {"name": "parallel", "scope": "ffn"}},
        "sparse_ift.family: unknown key 'scope' (valid keys: name, nonlin",
    ),
    ({"family": {"name": "wide", "scop": "ffn"}}, "sparse_ift.family: unknown key 'scop'; did you mean 'scope'?"),
    (
        {"family": {"name": "wide", "scope": "mdl"}},
        "sparse_ift.family.scope='mdl' is not one of 'model', 'ffn', 'residual'; did you",
    ),
    (
        {"family": {"name": "factorized", "sparse_u_only": 1}},
        "sparse_ift.family.sparse_u_only must be bool, got int: 1",
    ),
    (
        {"family": {"name": "wide", "scope": "ffn"}, "scope": "ffn"},
        "scope is given twice, in family and beside it; leave",
    ),
    ({"family": "factorized", "sparse_u_only": 1}, "sparse_ift.sparse_u_only must be bool, got int: 1"),
    ({"nonlinearty": "none"}, "sparse_ift: unknown key 'nonlinearty'; did you mean 'nonlinearity'?"),
    (
        {"family": "doped", "rules": [{"family": "parallel", "nonlinearity": "gelu"}]},
        "sparse_ift.rules[0].nonlinearity='",
    ),
    (
        {"family": "doped", "rules": [{"family": {"name": "parallel", "nonlinearity": 1}}]},
        "rules[0].family.nonlinearity m",
    ),
    (
        {"family": "doped", "rules": [{"family": "dense"}, {"targets": ["q"]}]},
        "sparse_ift.rules[1]: the key 'family' is",
    ),
    (
        {"family": "doped", "rules": [{"family": "dense", "sparsity": 0}]},
        "sparse_ift.rules[0].sparsity must be in (0, 1)",
    ),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_wrong_options_are_named_as_they_were_written(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseIFTConfig.from_dict(values)


def test_constructors_are_as_helpful_as_files() -> None:
    for build, message in [
        (lambda: SparseIFTConfig(sparsty=0.5), "SparseIFTConfig: unknown key 'sparsty'; did you mean 'sparsity'?"),  # type: ignore[call-arg]
        (lambda: SparseIFTConfig(Wide(), 1), "sparsity must be in [0, 1), got 1.0"),
        (lambda: SparseIFTConfig(Wide(), 0.5, sparsity=0.5), "sparsity is given twice, by its place and by its name"),  # type: ignore[misc]
        (lambda: Parallel("gelu"), "nonlinearity='gelu' is not one of 'layernorm', 'none'"),  # type: ignore[arg-type]
        (
            lambda: Wide("residual", "dense", True, 0.1, "wide"),
            "Wide takes 4 arguments by place at most; 'wide' is too many",
        ),  # type: ignore[misc]
        (lambda: FamilyRule("wide"), "family='wide' is not one of 'parallel'"),  # type: ignore[arg-type]
        (lambda: FamilyRule(), "FamilyRule: the key 'family' is missing"),  # type: ignore[call-arg]
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            build()


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"sparsty") as caught:
        SparseIFTConfig.from_dict({"sparsty": 1, "scope": "x", "dst": {"algorithm": "rig", "drop_fraction": 2}})
    assert str(caught.value).splitlines() == [
        "sparse_ift.scope='x' is not one of 'model', 'ffn', 'residual'",
        "sparse_ift.dst.algorithm='rig' is not one of 'static', 'set', 'rigl', 'gmp', 'granet'; did you mean 'rigl'?",
        "sparse_ift.dst.drop_fraction must be in (0, 1), got 2.0",
        "sparse_ift: unknown key 'sparsty'; did you mean 'sparsity'? (valid keys: family, sparsity, structure, "
        "block_size, transposable, distribution, accounting, seq_len, init, targets, exclude, width_multiple, "
        "balance_heads, kinds_apart, rules, seed, dst)",
    ]


@given(st.sampled_from(ALL), st.lists(st.sampled_from(["mlp_in", "mlp_out"]), unique=True))
def test_round_trip_with_a_rule(family: Any, exclude: list[Any]) -> None:
    rules = () if family == Wide("model") else (FamilyRule("doped", targets=("q", "k", "v"), sparsity=0.5),)
    config = SparseIFTConfig(family=family, exclude=tuple(exclude), rules=rules)
    assert SparseIFTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
