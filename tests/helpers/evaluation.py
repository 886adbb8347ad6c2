"""Helpers of the evaluation tests: a tiny model with a tokenizer, a made-up data folder, and models that know or guess.

Not a test module; evaluation_script.py uses it in other processes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.api.model import LM
from pyarrow import Table, parquet  # type: ignore[import-untyped, unused-ignore]
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from sparseift_llm import SparseIFTConfig, sparsify
from sparseift_llm.data.options import DataConfig
from sparseift_llm.data.tokenizer import load_tokenizer
from sparseift_llm.evaluation.builtin import held_out_documents
from sparseift_llm.evaluation.suites import Suite
from sparseift_llm.evaluation.task_loading import LoadedSuite, load_suite, named_suite

WORDS = (
    "stone",
    "river",
    "seven",
    "green",
    "engine",
    "paper",
    "winter",
    "market",
    "signal",
    "copper",
    "thread",
    "lamp",
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of 400 entries."""
    return load_tokenizer(DataConfig(vocab_size=400), held_out_documents()[:2])


def tiny_gpt2(num_positions: int = 384, seed: int = 0, sparse_ift: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A random GPT-2 whose logits are far from uniform, so that a wrong prompt or order shows in the scores."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer()), n_positions=num_positions, n_embd=32, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    dense = GPT2LMHeadModel(config)
    return sparsify(dense, SparseIFTConfig(**sparse_ift)) if sparse_ift else dense


def save_model(folder: Path, **options: Any) -> Path:
    """A tiny model and its tokenizer in `folder`."""
    tiny_gpt2(**options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_dataset(
    folder: Path, configs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], kind: str = "jsonl"
) -> None:
    """`{config: {split: rows}}` as JSON lines or parquet, with the README that names the files."""
    entries = []
    for number, (config, splits) in enumerate(configs.items()):
        files = []
        for split, rows in splits.items():
            path = folder / config / f"{split}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "parquet":
                parquet.write_table(Table.from_pylist(list(rows)), path)
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files.append({"split": split, "path": f"{config}/{split}.{kind}"})
        entries.append({"config_name": config, "data_files": files, **({"default": True} if number == 0 else {})})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': entries})}---\n")


def arc_rows(draw: random.Random, number: int) -> list[dict[str, Any]]:
    """Rows of allenai/ai2_arc."""
    labels = ["A", "B", "C", "D"]
    return [
        {
            "id": str(index),
            "question": sentence(draw),
            "choices": {"text": [sentence(draw, 3) for _ in labels], "label": labels},
            "answerKey": draw.choice(labels),
        }
        for index in range(number)
    ]


def mmlu_rows(draw: random.Random, number: int) -> list[dict[str, Any]]:
    """Rows of cais/mmlu."""
    return [
        {
            "question": sentence(draw),
            "subject": "anything",
            "choices": [sentence(draw, 2) for _ in range(4)],
            "answer": draw.randrange(4),
        }
        for _ in range(number)
    ]


def gsm8k_rows(draw: random.Random, number: int) -> list[dict[str, Any]]:
    """Rows of openai/gsm8k."""
    return [
        {"question": sentence(draw), "answer": f"{sentence(draw)}\n#### {draw.randrange(100)}"} for _ in range(number)
    ]


def _hellaswag_rows(draw: random.Random, number: int) -> list[dict[str, Any]]:
    return [
        {
            "ind": index,
            "activity_label": draw.choice(WORDS),
            "ctx_a": sentence(draw),
            "ctx_b": draw.choice(WORDS),
            "ctx": sentence(draw),
            "endings": [sentence(draw, 3) for _ in range(4)],
            "label": str(draw.randrange(4)),
        }
        for index in range(number)
    ]


def _winogrande_rows(draw: random.Random, number: int) -> list[dict[str, Any]]:
    return [
        {
            "sentence": f"The {draw.choice(WORDS)} met the {draw.choice(WORDS)} because _ was {draw.choice(WORDS)}.",
            "option1": draw.choice(WORDS[:6]),
            "option2": draw.choice(WORDS[6:]),
            "answer": draw.choice("12"),
        }
        for _ in range(number)
    ]


def _truthfulqa_rows(draw: random.Random, number: int) -> list[dict[str, Any]]:
    return [
        {
            "question": sentence(draw),
            "mc1_targets": {"choices": [sentence(draw), sentence(draw)], "labels": [1, 0]},
            "mc2_targets": {"choices": [sentence(draw) for _ in range(4)], "labels": [1, 1, 0, 0]},
        }
        for _ in range(number)
    ]


QUIZ = "owner/quiz"
QUIZ_TASKS: dict[str, dict[str, Any]] = {
    # a choice whose answer is a column, as it is
    "quiz_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    },
    # a choice whose answer is written by a template
    "quiz_template": {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    # an answer that the model writes
    "quiz_words": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    # an answer whose likelihood is asked for
    "quiz_cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


def quiz_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the data set that QUIZ_TASKS read."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        choices = draw.sample(WORDS, 3)
        label = draw.randrange(3)
        rows.append({"question": sentence(draw), "choices": choices, "label": label, "answer": choices[label]})
    return rows


def write_quiz(
    folder: Path, kind: str = "jsonl", splits: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> Path:
    """A folder with the data set and the tasks of QUIZ_TASKS, see `quiz_suite`.

    Args:
        folder: the data sets go into its `data`, the task files into its `tasks`.
        kind: of the data files, jsonl or parquet.
        splits: the rows, by default 8 to draw examples from and 12 to be scored.
    """
    splits = splits or {"train": quiz_rows(8), "test": quiz_rows(12, 1)}
    write_dataset(folder / "data" / QUIZ, {"default": splits}, kind)
    tasks = folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    for name, values in QUIZ_TASKS.items():
        shared = {"task": name, "dataset_path": QUIZ, "test_split": "test", "fewshot_split": "train"}
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump({**shared, **values, "metadata": {"version": 1.0}}))
    return folder


def quiz_suite(folder: Path, names: str, num_fewshot: int | None = None) -> LoadedSuite:
    """Some of QUIZ_TASKS, loaded from what `write_quiz` wrote; lm-eval's own tasks are not looked through."""
    return load_suite(replace(named_suite(names, num_fewshot), folders=()), folder / "data", folder / "tasks")


def own_tasks_only(name: str, num_fewshot: int | None = None) -> Suite:
    """`named_suite` without lm-eval's own tasks, whose index takes seconds; tests put it in the command's place."""
    suite = named_suite(name, num_fewshot)
    return replace(suite, folders=()) if suite.is_named else suite


def quiz_words_of(folder: Path, names: str = ",".join(QUIZ_TASKS)) -> list[str]:
    """Arguments of the command that evaluate tasks of `write_quiz`."""
    return ["--suite", names, "--data-dir", str(folder / "data"), "--include-path", str(folder / "tasks")]


def sentence(draw: random.Random, length: int = 5) -> str:
    """Some words."""
    return " ".join(draw.choice(WORDS) for _ in range(length))


def write_leaderboard_data(root: Path, subjects: Sequence[str], num_items: int = 40) -> Path:
    """A folder of made-up rows that the stock v1 tasks run on, with these MMLU subjects."""
    draw = random.Random(0)
    make = dict.fromkeys(("validation", "test"), num_items) | {"train": 30}
    arc = {split: arc_rows(draw, number) for split, number in make.items()}
    write_dataset(root / "allenai" / "ai2_arc", {"ARC-Challenge": arc})
    splits = ("train", "validation")
    write_dataset(root / "Rowan" / "hellaswag", {"default": {s: _hellaswag_rows(draw, make[s]) for s in splits}})
    write_dataset(
        root / "allenai" / "winogrande", {"winogrande_xl": {s: _winogrande_rows(draw, make[s]) for s in splits}}
    )
    truthful = {"validation": _truthfulqa_rows(draw, num_items)}
    write_dataset(root / "truthfulqa" / "truthful_qa", {"multiple_choice": truthful})
    write_dataset(root / "openai" / "gsm8k", {"main": {s: gsm8k_rows(draw, make[s]) for s in ("train", "test")}})
    sizes = {"dev": 5, "validation": 2}
    mmlu = {
        subject: {s: mmlu_rows(draw, n) for s, n in {**sizes, "test": 3 + number % 5}.items()}
        for number, subject in enumerate(subjects)
    }
    write_dataset(root / "cais" / "mmlu", mmlu)
    return root


class RiggedLM(LM):  # type: ignore[misc, unused-ignore]
    """Knows the answers: the right choice, continuation or text is certain, everything else impossible.

    Args:
        tasks: lm-eval's task objects by name.
    """

    def __init__(self, tasks: Mapping[str, Any]) -> None:
        super().__init__()
        self.tasks = tasks

    def _is_right(self, request: Any) -> bool:
        task, doc = self.tasks[request.task_name], request.doc
        if request.task_name.startswith("truthfulqa"):
            return bool(doc["mc2_targets"]["labels"][request.idx])
        if task.OUTPUT_TYPE == "loglikelihood":
            return bool(request.args[1] == task.doc_to_target(doc))
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        num_choices = len(task.doc_to_choice(doc))
        if request.idx >= num_choices:  # the choice without its context, for mutual information
            return False
        return bool(request.idx == (gold if isinstance(gold, int) else task.doc_to_choice(doc).index(gold)))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(0.0, True) if self._is_right(request) else (-1000.0, False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return [0.0 for _ in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [request.doc["answer"] for request in requests]


class GuessingLM(LM):  # type: ignore[misc, unused-ignore]
    """Draws log-likelihoods from a hash of the request: no knowledge, no ties, the same every time."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(-self._draw(request), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return [-self._draw(request) * 1000 for request in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [f"#### {int(100 * self._draw(request)) + 1000}" for request in requests]

    @staticmethod
    def _draw(request: Any) -> float:
        digest = hashlib.sha256(repr((request.args, request.idx)).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64
