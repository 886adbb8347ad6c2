"""Suites: which metrics and shots, and the v2 normalisation against rows that the leaderboard published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from sparseift_llm.evaluation.suites import (
    BBH_CHOICES,
    BUILTIN,
    MUSR_CHOICES,
    V1,
    V2,
    Headline,
    Score,
    averages,
    expand,
    headline_chance,
    headline_normalized,
    headline_value,
    normalized_score,
    select,
)
from sparseift_llm.evaluation.task_loading import load_suite, named_suite, requirements_of

STOCK = Path(lm_eval.tasks.__file__).parent
# Raw values of the leaderboard's own runs (data sets open-llm-leaderboard/EleutherAI__pythia-160m-details, run
# 2024-06-16T22-09-58, and ...pythia-6.9b-details), BBH in the order of BBH_CHOICES, then the published row.
RAW = {
    "EleutherAI/pythia-160m": {
        "bbh": [
            0.44, 0.5187165775401069, 0.2, 0.336, 0.532, 0.084, 0.484, 0.184, 0.192, 0.328, 0.18, 0.452, 0.076,
            0.2054794520547945, 0.108, 0.216, 0.144, 0.5168539325842697, 0.46, 0.28, 0.22, 0.112, 0.328, 0.532,
        ],
        "musr": [0.508, 0.2578125, 0.488],
        "gpqa": [(0.25757575757575757, 198), (0.26556776556776557, 546), (0.25, 448)],
        "ifeval": [0.1256931608133087, 0.23741007194244604],
        "mmlu_pro": 0.11195146276595745,
        "published": {"ifeval": 18.16, "bbh": 2.20, "gpqa": 1.12, "musr": 10.68, "mmlu_pro": 1.33},
    },
    "EleutherAI/pythia-6.9b": {
        "bbh": [
            0.68, 0.5133689839572193, 0.14, 0.384, 0.532, 0.128, 0.484, 0.216, 0.176, 0.304, 0.292, 0.568, 0.204,
            0.2191780821917808, 0.148, 0.244, 0.16, 0.5449438202247191, 0.456, 0.264, 0.148, 0.124, 0.32, 0.508,
        ],
        "musr": [0.504, 0.28515625, 0.288],
        "gpqa": [(0.2676767676767677, 198), (0.2600732600732601, 546), (0.234375, 448)],
        "ifeval": [0.15526802218114602, 0.3009592326139089],
        "mmlu_pro": 0.1146941489361702,
        "published": {"ifeval": 22.81, "bbh": 5.88, "gpqa": 0.22, "musr": 3.81, "mmlu_pro": 1.63},
    },
}  # fmt: skip
# Rows of the data set open-llm-leaderboard/contents: (raw, normalised) of headlines that need no subtasks.
ROWS = {
    "01-ai/Yi-1.5-34B": {
        "ifeval": (0.2841172533322695, 28.411725333226947),
        "math_hard": (0.15332326283987915, 15.332326283987916),
        "gpqa": (0.36577181208053694, 15.436241610738257),
        "mmlu_pro": (0.4665890957446808, 40.732121749408975),
    },
    "0-hero/Matter-0.2-7B-DPO": {
        "ifeval": (0.3302792147058693, 33.02792147058693),
        "math_hard": (0.014350453172205438, 1.4350453172205437),
        "gpqa": (0.25922818791946306, 1.230425055928408),
        "mmlu_pro": (0.1163563829787234, 1.8173758865248217),
    },
}


def line(name: str) -> Headline:
    return next(line for line in V2.headlines if line.name == f"leaderboard_{name}")


@pytest.mark.parametrize("model", list(RAW))
def test_v2_gives_the_published_row_from_the_raw_subtasks(model: str) -> None:
    raw = RAW[model]
    gpqa = [value for value, _ in raw["gpqa"]]  # type: ignore[attr-defined]
    lists = {
        "bbh": raw["bbh"], "musr": raw["musr"], "gpqa": gpqa, "ifeval": raw["ifeval"], "mmlu_pro": [raw["mmlu_pro"]],
    }  # fmt: skip
    for name, published in raw["published"].items():  # type: ignore[attr-defined]
        scores = line(name).scores
        values = dict(zip(scores, lists[name], strict=True))  # type: ignore[arg-type]
        weights = {score: raw["gpqa"][index][1] if name == "gpqa" else 1 for index, score in enumerate(scores)}  # type: ignore[index]
        assert headline_normalized(line(name), values, weights) == pytest.approx(published, abs=0.005), name


@pytest.mark.parametrize("model", list(ROWS))
def test_v2_gives_the_published_values_from_the_published_raw_ones(model: str) -> None:
    for name, (raw, published) in ROWS[model].items():
        values = dict.fromkeys(line(name).scores, raw)
        weights = dict.fromkeys(values, 1)
        assert headline_normalized(line(name), values, weights) == pytest.approx(published, rel=1e-12), name


def test_the_published_rows_tell_rules_apart() -> None:
    """Pooled BBH items, or one baseline for all of its tasks, would miss the published value."""
    raw = RAW["EleutherAI/pythia-160m"]
    values = dict(zip(line("bbh").scores, raw["bbh"], strict=True))  # type: ignore[arg-type]
    mean = headline_value(line("bbh"), values, dict.fromkeys(values, 1))
    assert abs(normalized_score(mean, headline_chance(line("bbh"))) - 2.20) > 0.05


def test_normalisation_by_hand() -> None:
    assert normalized_score(0.6, 0.25) == pytest.approx(46.6666667)
    assert normalized_score(0.1, 0.25) == 0
    assert normalized_score(1.0, 0.25) == 100
    assert normalized_score(0.3, None) == pytest.approx(30)
    np.testing.assert_allclose(normalized_score(np.array([0.1, 0.6]), 0.25), [0, 46.66666667])  # type: ignore[arg-type]


def test_chance_levels_are_those_of_the_tasks_choices() -> None:
    for name, count in BBH_CHOICES.items():
        config = load_yaml(STOCK / "leaderboard" / "bbh_mc" / f"{name}.yaml", resolve_func=False)
        assert len(config["doc_to_choice"]) == count, name
    assert MUSR_CHOICES == {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}


def test_v2_covers_the_stock_group() -> None:
    def tasks(name: str) -> set[str]:
        paths = list((STOCK / "leaderboard").rglob("*.yaml"))
        configs = [load_yaml(path, resolve_func=False) for path in paths]
        group = next((c for c in configs if c.get("group") == name), None)
        return {name} if group is None else {leaf for member in group["task"] for leaf in tasks(member)}

    assert set(V2.tasks()) == tasks("leaderboard")


def test_v1_metrics_and_shots() -> None:
    found = {line.name: (line.scores[0].metric, line.num_fewshot) for line in V1.headlines}
    assert found == {
        "arc_challenge": ("acc_norm", 25),
        "hellaswag": ("acc_norm", 10),
        "truthfulqa_mc2": ("acc", 0),
        "mmlu": ("acc", 5),
        "winogrande": ("acc", 5),
        "gsm8k": ("exact_match", 5),
    }
    assert set(V1.averages["average"]) - set(V1.averages["average_5"]) == {"gsm8k"}


def test_pooled_and_unweighted_headlines() -> None:
    scores = (Score("a", chance=0.5), Score("b", chance=0.0))
    values, weights = {scores[0]: 1.0, scores[1]: 0.0}, {scores[0]: 1, scores[1]: 3}
    assert headline_value(Headline("x", scores), values, weights) == 0.5
    assert headline_value(Headline("x", scores, pooled=True), values, weights) == 0.25
    assert headline_normalized(Headline("x", scores), values, weights) == 50
    assert headline_normalized(Headline("x", scores, pooled=True), values, weights) == 0  # below its 0.5
    assert headline_chance(Headline("x", scores)) == 0.25


def test_groups_are_expanded_and_suites_cut() -> None:
    assert [s.task for s in expand(V1, {"mmlu": ["m1", "m2"]}).headlines[3].scores] == ["m1", "m2"]
    cut = select(V1, ["arc_challenge", "gsm8k"])
    assert [line.name for line in cut.headlines] == ["arc_challenge", "gsm8k"]
    assert cut.averages == {}
    assert "average_5" in select(V1, V1.averages["average_5"]).averages
    with pytest.raises(ValueError, match="suite v1 has no task 'arc'; it has arc_challenge, hellaswag"):
        select(V1, ["arc"])
    assert averages(BUILTIN, {"builtin_continuation": 0.5, "builtin_identifier": 0.1}) == {"average": 0.3}


def test_names_of_suites() -> None:
    assert named_suite("v2") is V2
    suite = named_suite("arc_easy, winogrande", 3)
    assert [(line.name, line.num_fewshot) for line in suite.headlines] == [("arc_easy", 3), ("winogrande", 3)]
    with pytest.raises(ValueError, match="suite v1 fixes it"):
        named_suite("v1", 3)
    with pytest.raises(ValueError, match="--suite is empty"):
        named_suite(" ,")


def test_requirements_name_every_data_set_of_v1() -> None:
    found = {item.dataset: item for item in requirements_of(V1)}
    assert set(found) == {
        "allenai/ai2_arc", "Rowan/hellaswag", "truthfulqa/truthful_qa", "cais/mmlu", "allenai/winogrande",
        "openai/gsm8k",
    }  # fmt: skip
    assert sum(item.dataset == "cais/mmlu" for item in requirements_of(V1)) == 57
    assert found["openai/gsm8k"].splits == ("test", "train")
    assert requirements_of(BUILTIN) == []


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="has no task, group or tag 'no_such_task'"):
        load_suite(replace(named_suite("no_such_task"), folders=("arc",)))
