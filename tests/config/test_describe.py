"""The list of options: every option of a config has its type, its default and a meaning."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from sparseift_llm.config import DSTConfig, FamilyRule, SparseIFTConfig
from sparseift_llm.config.describe import Option, describe_options
from sparseift_llm.config.parsing import config_class


@config_class
class Inner:
    rate: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """How fast,
    per step."""


@config_class
class Outer:
    word: Literal["a", "b"]
    """Which."""
    number: Annotated[int, Field(ge=1)] | None = None
    """How many."""
    below: Annotated[int, Field(lt=5)] = 4
    """Not more."""
    words: tuple[Literal["x", "y"], ...] = ()
    """Some."""
    texts: tuple[str, ...] = ("a",)
    """Texts."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever."""
    inner: Inner = Inner()
    """Nested."""


def test_types_defaults_and_meanings() -> None:
    assert describe_options(Outer, "o") == [
        Option("o.word", "one of a, b", None, "Which."),
        Option("o.number", "int, at least 1, or null", "null", "How many."),
        Option("o.below", "int, below 5", "4", "Not more."),
        Option("o.words", "a list of x, y", "[]", "Some."),
        Option("o.texts", "a list of strings", '["a"]', "Texts."),
        Option("o.extra", "a mapping", "{}", "Whatever."),
        Option("o.inner.rate", "float in (0, 0.5]", "0.25", "How fast, per step."),
    ]


@pytest.mark.parametrize("cls", [SparseIFTConfig, DSTConfig, FamilyRule])
def test_every_option_has_a_meaning(cls: type) -> None:
    options = describe_options(cls)
    assert len({option.name for option in options}) == len(options) > 3
    assert all(option.type and option.meaning.endswith(".") for option in options)


def test_options_of_families_stand_below_the_family() -> None:
    options = {option.name: option for option in describe_options(SparseIFTConfig)}
    assert options["family"].default == "wide"
    assert options["family.scope"].type == "of wide: one of model, ffn, residual"
    assert options["family.nonlinearity"].default == '"layernorm" (parallel), "none" (factorized)'
    assert options["dst.algorithm"].type == "one of static, set, rigl, gmp, granet"
    assert "dst" not in options
    assert "family.name" not in options
