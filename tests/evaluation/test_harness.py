"""Scores equal lm-eval's own to the digit; a model that knows scores 100%, one that guesses scores chance."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM

from sparseift_llm.evaluation import builtin
from sparseift_llm.evaluation.harness import evaluate_task, ratio_stderr
from sparseift_llm.evaluation.language_model import SplitLM
from sparseift_llm.evaluation.options import EvaluationOptions
from sparseift_llm.evaluation.quiet import seeded
from sparseift_llm.evaluation.results import summarize
from sparseift_llm.evaluation.suites import BUILTIN, V1
from sparseift_llm.evaluation.task_loading import LoadedSuite, _task_manager, load_suite, named_suite, requirements_of
from tests.helpers.evaluation import GuessingLM, RiggedLM, save_model, tiny_gpt2, tokenizer, write_leaderboard_data
from tests.helpers.paths import ROOT

OWN_TASKS = Path(builtin.__file__).parent / "tasks"
# MMLU's 57 subjects take long to load; the rule is the same for the 13 of one of its parts.
SMALLER = replace(V1, headlines=tuple(replace(x, group="mmlu_other") if x.group else x for x in V1.headlines))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up rows for every stock v1 task."""
    subjects = [item.config for item in requirements_of(SMALLER) if item.dataset == "cais/mmlu"]
    return write_leaderboard_data(tmp_path_factory.mktemp("data"), [*subjects, "anatomy"], num_items=80)


@pytest.fixture(scope="module")
def v1(data: Path) -> LoadedSuite:
    return load_suite(SMALLER, data)


def evaluate(loaded: LoadedSuite, lm: LM, limit: int | None = None) -> dict[str, Any]:
    leaves = {
        name: evaluate_task(lm, name, task, EvaluationOptions(limit)).result for name, task in loaded.tasks.items()
    }
    return summarize(loaded.suite, leaves)


def test_a_model_that_knows_the_answers_scores_100_percent(v1: LoadedSuite) -> None:
    summary = evaluate(v1, RiggedLM(v1.tasks))
    assert {name: line["value"] for name, line in summary["results"].items()} == dict.fromkeys(summary["results"], 1.0)
    assert summary["average"] == summary["average_5"] == 1.0
    shots = {name: line["num_fewshot"] for name, line in summary["results"].items()}
    assert shots == {
        "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5,
    }  # fmt: skip
    assert summary["results"]["mmlu"]["num_items"] == sum(3 + number % 5 for number in range(13))


def test_a_model_that_guesses_scores_chance(v1: LoadedSuite) -> None:
    summary = evaluate(v1, GuessingLM())
    for name, line in summary["results"].items():
        if line["chance"] is not None and name != "gsm8k":
            assert abs(line["value"] - line["chance"]) < 4 * line["stderr"], name
            assert line["stderr"] < 0.08
    assert summary["results"]["gsm8k"]["value"] == 0
    mmlu = [summary["subtasks"][score["task"]]["metrics"]["acc,none"] for score in summary["results"]["mmlu"]["scores"]]
    assert summary["results"]["mmlu"]["value"] == pytest.approx(sum(mmlu) / 13)


@pytest.fixture(scope="module")
def builtin_suite() -> LoadedSuite:
    return load_suite(BUILTIN)


def test_builtin_suite_of_models_that_know_and_guess(builtin_suite: LoadedSuite) -> None:
    known = evaluate(builtin_suite, RiggedLM(builtin_suite.tasks), 300)
    values = {name: line["value"] for name, line in known["results"].items()}
    assert values == {"builtin_continuation": 1.0, "builtin_identifier": 1.0, "builtin_bits_per_byte": 0.0}
    assert known["average"] == 1.0
    guessed = evaluate(builtin_suite, GuessingLM())["results"]
    line = guessed["builtin_continuation"]
    assert abs(line["value"] - 0.25) < 4 * line["stderr"]
    assert line["stderr"] < 0.014
    assert guessed["builtin_identifier"]["value"] == line["chance"] - 0.25 == 0.0


def test_a_random_network_scores_chance_and_a_memorising_one_100_percent(builtin_suite: LoadedSuite) -> None:
    """Through tokenizer, network and batches: logits that know the texts get every item right."""
    name = "builtin_continuation"
    guessing = SplitLM(tiny_gpt2(), tokenizer(), 32)
    found = evaluate_task(guessing, name, builtin_suite.tasks[name], EvaluationOptions(400))
    chance = found.result["metrics"]
    assert abs(chance["acc_mutual_info,none"] - 0.25) < 4 * chance["acc_mutual_info_stderr,none"]
    for task in ("builtin_continuation", "builtin_identifier"):
        docs = [builtin_suite.tasks[task].eval_docs[index] for index in range(60)]
        texts = [d["context"] + (d["choices"][d["answer"]] if "choices" in d else d["identifier"]) for d in docs]
        metrics = evaluate_task(
            SplitLM(memorising(texts), tokenizer(), 8), task, builtin_suite.tasks[task], EvaluationOptions(60)
        ).result
        assert {
            key: value for key, value in metrics["metrics"].items() if key.startswith("acc") and "std" not in key
        } == ({"acc,none": 1.0, "acc_mutual_info,none": 1.0} if "choices" in docs[0] else {"acc,none": 1.0})


def memorising(texts: list[str]) -> Any:
    """A GPT-2 that gives the next token after any beginning of one of the texts, and knows nothing else."""
    model: Any = tiny_gpt2()
    table: dict[tuple[int, ...], int] = {}
    for text in texts:
        tokens = tokenizer()(text)["input_ids"]
        table.update({tuple(tokens[:end]): tokens[end] for end in range(30, len(tokens))})
    stock = model.forward

    def forward(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = stock(input_ids, **kwargs)
        output.logits.zero_()
        for row, tokens in enumerate(input_ids.tolist()):
            for end in range(30, len(tokens) + 1):
                if tuple(tokens[:end]) in table:
                    output.logits[row, end - 1, table[tuple(tokens[:end])]] = 30.0
        return output

    model.forward = forward
    return model


TASKS = {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu_nutrition": 5, "winogrande": 5, "gsm8k": 5}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), num_positions=700)


@pytest.mark.parametrize("task", list(TASKS))
def test_scores_equal_lm_evals_own_to_the_digit(
    v1: LoadedSuite, data: Path, model_folder: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its command line calls, in the data folder, on the stock task with the stock loader."""
    monkeypatch.chdir(data)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))  # it would find rows of an earlier run
    args = {"pretrained": str(model_folder), "device": "cpu"}
    stock = simple_evaluate(
        model="hf", model_args=args, tasks=[task], num_fewshot=TASKS[task], batch_size=7, limit=12,
        task_manager=_task_manager(V1.folders),
    )  # fmt: skip
    assert stock is not None
    lm = SplitLM(tiny_gpt2(num_positions=700), tokenizer(), 7)
    found = evaluate_task(lm, task, v1.tasks[task], EvaluationOptions(12))
    assert_same(found.result, stock, task)
    assert len(found.items) == stock["n-samples"][task]["effective"]


def assert_same(result: Mapping[str, Any], stock: Any, task: str) -> None:
    expected = {
        key: float(value) for key, value in stock["results"][task].items() if "," in key and not isinstance(value, str)
    }
    assert {key: result["metrics"][key] for key in expected} == expected
    assert (result["version"], result["num_fewshot"]) == (stock["versions"][task], stock["n-shot"][task])


def test_scores_equal_lm_evals_command_line_to_the_digit(data: Path, model_folder: Path, tmp_path: Path) -> None:
    """A stock task, and our own through lm-eval's --include_path, one command."""
    tasks = ["arc_challenge", "builtin_continuation", "builtin_identifier", "builtin_bits_per_byte"]
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model_folder}",
        "--device", "cpu", "--tasks", ",".join(tasks),
        "--num_fewshot", "4", "--limit", "9", "--batch_size", "1", "--log_samples",
        "--include_path", str(OWN_TASKS), "--output_path", str(tmp_path / "stock"),
    ]  # fmt: skip
    root = ROOT
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=data, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "stock").rglob("results_*.json")
    stock = json.loads(path.read_text())
    named = replace(named_suite(",".join(tasks)), folders=("arc",))
    shots = tuple(replace(line, num_fewshot=4 if line.name == "arc_challenge" else None) for line in named.headlines)
    loaded = load_suite(replace(named, headlines=shots), data)
    lm = SplitLM(tiny_gpt2(num_positions=700), tokenizer(), 1)
    for task in tasks:
        result = evaluate_task(lm, task, loaded.tasks[task], EvaluationOptions(9)).result
        assert_same(result, stock, task)
        assert result["task_hash"] == stock["task_hashes"][task]


def test_items_add_up_to_the_scores(v1: LoadedSuite) -> None:
    found = evaluate_task(GuessingLM(), "arc_challenge", v1.tasks["arc_challenge"], EvaluationOptions(30))
    result, items = found.result, found.items
    assert [item["id"] for item in items] == list(range(30))
    for key in ("acc,none", "acc_norm,none"):
        assert sum(item["values"][key] for item in items) / 30 == pytest.approx(result["metrics"][key])
    assert all(len(item["responses"]["none"]) == 4 and item["doc_hash"] for item in items)
    items = evaluate_task(GuessingLM(), "gsm8k", v1.tasks["gsm8k"], EvaluationOptions(5)).items
    assert set(items[0]["values"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}


def test_bits_per_byte_has_a_standard_error(builtin_suite: LoadedSuite) -> None:
    task = builtin_suite.tasks["builtin_bits_per_byte"]
    found = evaluate_task(GuessingLM(), "builtin_bits_per_byte", task, EvaluationOptions(50))
    result, items = found.result, found.items
    pairs = [item["values"]["bits_per_byte,none"] for item in items]
    assert sum(a for a, _ in pairs) / sum(b for _, b in pairs) == pytest.approx(result["metrics"]["bits_per_byte,none"])
    draw = np.random.default_rng(0)
    array = np.array(pairs)
    samples = array[draw.integers(50, size=(4000, 50))].sum(axis=1)
    spread = (samples[:, 0] / samples[:, 1]).std()
    assert result["metrics"]["bits_per_byte_stderr,none"] == pytest.approx(spread, rel=0.08)
    assert ratio_stderr([[1.0, 2.0]]) == 0.0
    assert math.isclose(ratio_stderr([[0.0, 1.0], [1.0, 1.0]]), math.sqrt(0.5 / 2))


def test_random_states_are_the_callers_own_afterwards() -> None:
    def states() -> tuple[Any, Any, Any]:
        return random.random(), np.random.random(), torch.rand(1).item()

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = states()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    with seeded():
        inside = states()
    assert states() == expected != inside
    with seeded():
        assert states() == inside
