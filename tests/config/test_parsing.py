"""Strict YAML and dictionary parsing, on small classes of its own; the library's configs are in test_config.py."""

from __future__ import annotations

import math
import re
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseift_llm.config.parsing import config_class, from_dict
from sparseift_llm.config.yaml_files import load_yaml, parse_yaml


@config_class
class Inner:
    rate: float = 0.1
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must not be negative, got {self.rate}")


@config_class
class Outer:
    name: str
    steps: int = 1
    limit: int | None = None
    words: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def test_every_kind_of_field_is_converted() -> None:
    values = {
        "name": "a",
        "steps": 3,
        "limit": 5,
        "words": ["x", "y"],
        "extra": {"k": [1]},
        "inner": {"rate": 2, "verbose": True},
    }
    assert from_dict(Outer, values) == Outer("a", 3, 5, ("x", "y"), {"k": [1]}, Inner(2.0, True))


def test_int_becomes_float_where_float_is_declared() -> None:
    assert type(from_dict(Inner, {"rate": 2}).rate) is float


def test_none_is_taken_by_an_optional_field_only() -> None:
    assert from_dict(Outer, {"name": "a", "limit": None}).limit is None
    with pytest.raises(ValueError, match=re.escape("Outer.steps must be int, got NoneType: None")):
        from_dict(Outer, {"name": "a", "steps": None})


def test_an_instance_is_taken_for_a_nested_field() -> None:
    assert from_dict(Outer, {"name": "a", "inner": Inner(0.5)}).inner == Inner(0.5)


def test_the_input_mapping_is_not_shared() -> None:
    extra = {"k": 1}
    built = from_dict(Outer, {"name": "a", "extra": extra})
    extra["k"] = 2
    assert built.extra == {"k": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "stpes": 1}, "Outer: unknown key 'stpes'; did you mean 'steps'? (valid keys: name, steps, "),
        ({"name": "a", "zzzz": 1}, "Outer: unknown key 'zzzz' (valid keys: "),
        ({"name": "a", 1: 1}, "Outer: unknown key 1 (valid keys: "),
        ({"name": "a", "inner": {"rat": 1}}, "Outer.inner: unknown key 'rat'; did you mean 'rate'?"),
        ({"name": 1}, "Outer.name must be str, got int: 1"),
        ({"name": "a", "steps": 1.0}, "Outer.steps must be int, got float: 1.0"),
        ({"name": "a", "steps": True}, "Outer.steps must be int, got bool: True"),
        ({"name": "a", "limit": "5"}, "Outer.limit must be int, got str: '5'"),
        ({"name": "a", "words": "x"}, "Outer.words must be a list of strings, got 'x'"),
        ({"name": "a", "words": ["x", 1]}, "Outer.words[1] must be str, got int: 1"),
        ({"name": "a", "extra": [1]}, "Outer.extra must be a mapping, got [1]"),
        ({"name": "a", "inner": {"rate": False}}, "Outer.inner.rate must be float, got bool: False"),
        ({"name": "a", "inner": {"rate": "6e-4"}}, "Outer.inner.rate must be float, got str: '6e-4'"),
        ({"name": "a", "inner": {"verbose": 1}}, "Outer.inner.verbose must be bool, got int: 1"),
        ({"name": "a", "inner": None}, "Outer.inner must be a mapping of options, got NoneType: None"),
        ({"name": "a", "inner": {"rate": -1}}, "rate must not be negative, got -1.0"),
        ("name", "Outer must be a mapping of options, got str: 'name'"),
        (None, "Outer must be a mapping of options, got NoneType: None"),
    ],
)
def test_wrong_values_are_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_dict(Outer, values)


def test_where_replaces_the_class_name() -> None:
    with pytest.raises(ValueError, match=re.escape("training.inner.rate must be float, got str: 'x'")):
        from_dict(Outer, {"name": "a", "inner": {"rate": "x"}}, "training")


def test_a_missing_required_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"Outer.*name"):
        from_dict(Outer, {"steps": 1})


def test_a_value_the_class_refuses_is_named_by_its_dotted_path() -> None:
    with pytest.raises(ValueError, match=r"^Outer\.inner.*rate must not be negative"):
        from_dict(Outer, {"name": "a", "inner": {"rate": -1}})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-4", 6e-4),
        ("6E-4", 6e-4),
        ("6.0e-4", 6e-4),
        ("6.e4", 6e4),
        ("-1e5", -1e5),
        ("+1e+5", 1e5),
        ("1e3", 1000.0),
        ("0.1", 0.1),
        (".5", 0.5),
        (".inf", math.inf),
    ],
)
def test_numbers_with_an_exponent_are_floats(text: str, value: float) -> None:
    parsed = parse_yaml(f"rate: {text}", "t")["rate"]
    assert parsed == value
    assert type(parsed) is float


@pytest.mark.parametrize(("text", "value"), [("12", 12), ("'6e-4'", "6e-4"), ("e5", "e5"), ("1e5x", "1e5x")])
def test_other_scalars_keep_their_type(text: str, value: int | str) -> None:
    parsed = parse_yaml(f"a: {text}", "t")["a"]
    assert (type(parsed), parsed) == (type(value), value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_prints_is_read_back(value: float) -> None:
    parsed = parse_yaml(f"a: {value!r}", "t")["a"]
    assert (type(parsed), parsed) == (float, value)


def test_nested_yaml() -> None:
    assert parse_yaml("a: {b: [1, {c: 2}]}\nd: null\n", "t") == {"a": {"b": [1, {"c": 2}]}, "d": None}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("a: 1\nb: 2\na: 3\n", "a"),
        ("x:\n  a: 1\n  a: 1\n", "a"),
        ("- {a: 1, a: 2}\n", "a"),
        ("x: {y: {z: 1, w: 2, z: 3}}\n", "z"),
    ],
)
def test_a_doubled_key_is_an_error(text: str, key: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"my.yaml: key {key!r} stands twice")):
        parse_yaml(text, "my.yaml")


def test_a_doubled_key_is_named_with_its_own_line() -> None:
    with pytest.raises(ValueError, match=r"line 3\b"):
        parse_yaml("a: 1\nb: 2\na: 3\n", "my.yaml")


def test_the_same_key_in_two_mappings_is_fine() -> None:
    assert parse_yaml("x: {a: 1}\ny: {a: 1}\n", "t") == {"x": {"a": 1}, "y": {"a": 1}}


@pytest.mark.parametrize(
    "text",
    ["a: [1", "a: 'x", "\ta: 1", "a: 1\n---\nb: 2", "a: !!python/name:os.system", "? [1, 2]\n: 3", "a: &x {b: *x}"],
)
def test_broken_or_unsafe_yaml_is_an_error_with_path_and_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"my\.yaml is not valid YAML: (.|\n)*line \d"):
        parse_yaml(text, "my.yaml")


@pytest.mark.parametrize("text", ["2024-13-45", "2024-01-02", "1:30", "no", "off", "y", "1_000", "0b11", "="])
def test_what_yaml_1_2_calls_a_word_is_one(text: str) -> None:
    """Dates, times, `no` and numbers with separators are from YAML 1.1."""
    assert parse_yaml(f"a: {text}", "t") == {"a": text}


@pytest.mark.parametrize(
    ("text", "value"), [("012", 12), ("0o14", 12), ("0x1F", 31), ("-7", -7), ("+7", 7), ("~", None), ("", None)]
)
def test_whole_numbers_and_null(text: str, value: int | None) -> None:
    parsed = parse_yaml(f"a: {text}", "t")["a"]
    assert (type(parsed), parsed) == (type(value), value)


def test_merge_keys() -> None:
    text = "base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}\n"
    text += "most: &most {<<: *base, b: 4, c: 5}\ntwo: {<<: [*most, *base]}\n"
    assert parse_yaml(text, "t") == {
        "base": {"a": 1, "b": 2},
        "more": {"a": 1, "b": 3},
        "most": {"a": 1, "b": 4, "c": 5},
        "two": {"a": 1, "b": 4, "c": 5},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: &x {a: 1}\ny:\n  <<: *x\n  <<: *x\n", "t: key '<<' stands twice (line 4)"),
        ("x: &x {a: 1}\ny: {<<: *x, b: 1, b: 2}\n", "t: key 'b' stands twice (line 2)"),
        ("y: {<<: 3}\n", "t is not valid YAML: while constructing a mapping"),
    ],
)
def test_wrong_merge_keys(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_yaml(text, "t")


def test_load_yaml(tmp_path: Path) -> None:
    path = tmp_path / "ok.yaml"
    path.write_text("rate: 6e-4\nname: é\n", encoding="utf-8")
    assert load_yaml(path) == {"rate": 6e-4, "name": "é"}
    assert load_yaml(str(path)) == load_yaml(path)


def test_load_yaml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("a: 1\na: 2\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: key 'a' stands twice")):
        load_yaml(path)


def test_a_file_that_is_not_utf8_is_an_error_with_path(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_yaml(path)


def test_a_missing_file_is_an_error_with_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_yaml(tmp_path / "none.yaml")
