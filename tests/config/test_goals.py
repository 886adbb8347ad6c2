"""Recommended settings: valid, changeable, and what the pages say of them."""

from __future__ import annotations

import re

import pytest
import yaml

from sparseift_llm import DSTConfig, SparseIFTConfig
from sparseift_llm.config.goals import GOALS
from tests.helpers.pages import PAGES

every_goal = pytest.mark.parametrize("goal", GOALS)


@every_goal
def test_a_goal_is_a_config_and_can_be_changed(goal: str) -> None:
    config = SparseIFTConfig.recommended(goal)
    assert config == SparseIFTConfig(**GOALS[goal])
    assert SparseIFTConfig.from_dict(config.to_dict()) == config
    changed = SparseIFTConfig.recommended(goal, sparsity=0.5, dst=DSTConfig("set"))
    assert (changed.sparsity, changed.dst.algorithm, changed.family) == (0.5, "set", config.family)


def test_an_unknown_goal_and_a_contradiction_are_refused() -> None:
    with pytest.raises(ValueError, match=r"goal.*balanced"):
        SparseIFTConfig.recommended("balance")
    with pytest.raises(ValueError, match="algorithm='gmp' starts dense"):
        SparseIFTConfig.recommended("balanced", dst=DSTConfig("gmp"))


def rows(page: str) -> dict[str, list[str]]:
    """Goal -> the words in code style in the second cell of its row."""
    found = re.findall(r"^\| `(\w+)`[^|]*\|([^|]*)\|", PAGES[page], re.MULTILINE)
    return {goal: re.findall(r"`([^`]*)`", cell) for goal, cell in found if goal in GOALS}


def test_the_guide_says_every_goal_s_settings() -> None:
    found = rows("docs/guides/choose.md")
    assert list(found) == list(GOALS)
    for goal, settings in found.items():
        values = {key: value for setting in settings for key, value in yaml.safe_load(setting).items()}
        values["dst"] = {"algorithm": values["dst"]}
        assert SparseIFTConfig.from_dict(values) == SparseIFTConfig.recommended(goal), goal


def test_the_readme_says_the_same() -> None:
    found = rows("README.md")
    assert list(found) == [goal for goal in GOALS if goal != "paper"]
    for goal, words in found.items():
        config = SparseIFTConfig.recommended(goal)
        scope = [config.scope] if config.family == "wide" else []
        assert words == [config.family.name, *scope, config.structure, config.dst.algorithm], goal
