"""Result files of evaluations: headlines and averages, what was evaluated, per-item records, and going on after a kill.

`F.json` is the result, `F.items/TASK.jsonl` the items, `F.progress.json` what an unfinished run has so far.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparseift_llm.evaluation import builtin
from sparseift_llm.evaluation.suites import (
    Headline,
    Score,
    Suite,
    averages,
    headline_chance,
    headline_normalized,
    headline_value,
    is_ratio,
)
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.models.projections import find_projections
from sparseift_llm.planning.planner import cost_of
from sparseift_llm.runs.record import RECIPE_NAME, SUMMARY_NAME
from sparseift_llm.utils.files import write_json, write_text
from sparseift_llm.utils.provenance import commit, machine, versions
from sparseift_llm.utils.tables import markdown_table

Leaves = Mapping[str, Mapping[str, Any]]


def summarize(suite: Suite, leaves: Leaves) -> dict[str, Any]:
    """`results`, the averages, and how they follow from the tasks.

    Args:
        suite: with its groups expanded.
        leaves: task -> result, see `harness.evaluate_task`.

    Returns:
        JSON-ready. A headline's `value` is in lm-eval's unit, accuracies from 0 to 1. Averages are means of
        `value`, or of `normalized`, 0 to 100, where the suite normalises.
    """
    results = {line.name: _headline_result(suite, line, leaves) for line in suite.headlines}
    key = "normalized" if suite.normalized else "value"
    return {
        "results": results,
        **averages(suite, {name: result[key] for name, result in results.items()}),
        "averages": {name: list(of) for name, of in suite.averages.items()},
        "average_of": key,
        "subtasks": {task: dict(leaves[task]) for task in suite.tasks()},
    }


def _headline_result(suite: Suite, line: Headline, leaves: Leaves) -> dict[str, Any]:
    values = {score: leaves[score.task]["metrics"][score.key] for score in line.scores}
    weights = {score: leaves[score.task]["num_items"] for score in line.scores}
    tasks = list(dict.fromkeys(score.task for score in line.scores))
    shots = {leaves[task]["num_fewshot"] for task in tasks}
    result = {
        "metric": " and ".join(dict.fromkeys(score.metric for score in line.scores)),
        "value": headline_value(line, values, weights),
        "stderr": _stderr(line, leaves, weights),
        "num_fewshot": shots.pop() if len(shots) == 1 else None,
        "num_items": sum(leaves[task]["num_items"] for task in tasks),
        "chance": headline_chance(line),
        "version": " ".join(dict.fromkeys(str(leaves[task]["version"]) for task in tasks)),
        "task_hash": _joined_hash([leaves[task]["task_hash"] for task in tasks]),
        "pooled": line.pooled,
        "scores": [asdict(score) for score in line.scores],
    }
    if suite.normalized:
        result["normalized"] = headline_normalized(line, values, weights)
    return result


def _stderr(line: Headline, leaves: Leaves, weights: Mapping[Score, float]) -> float | None:
    """Of independent tasks; several metrics of one task are taken as fully correlated, which overstates it."""
    total = sum(weights.values())
    by_task: dict[str, float] = {}
    for score in line.scores:
        stderr = leaves[score.task]["metrics"].get(f"{score.metric}_stderr,{score.filter}")
        if stderr is None:
            return None
        share = weights[score] / total if line.pooled else 1 / len(line.scores)
        by_task[score.task] = by_task.get(score.task, 0.0) + share * stderr
    return by_task.popitem()[1] if len(by_task) == 1 else math.sqrt(sum(value**2 for value in by_task.values()))


def _joined_hash(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def describe_model(model: PreTrainedModel, name: str, seq_len: int) -> dict[str, Any]:
    """What was evaluated: a digest of all weights, sparsity as it is, FLOPs, and what its training run left behind.

    Args:
        model: as loaded.
        name: folder or hub id.
        seq_len: tokens that FLOPs per token are counted at.
    """
    found: dict[str, Any] = {
        "name": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "sha256": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_parameters": model.num_parameters(),
        "seq_len": seq_len,
        **_cost(model, seq_len),
    }
    for folder in (Path(name), Path(name).parent):
        if (folder / SUMMARY_NAME).is_file():
            summary = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))
            keys = ("train_flops", "train_tokens", "eval_loss", "commit")
            found["run"] = {key: summary.get(key) for key in keys}
            found["run"]["seed"] = summary.get("config", {}).get("training", {}).get("seed")
            break
    return found


def _cost(model: PreTrainedModel, seq_len: int) -> dict[str, Any]:
    try:
        cost = cost_of(model, seq_len)
    except ValueError as error:
        return {"linear_sparsity": None, "forward_flops_per_token": None, "cost_unknown": str(error)}
    active = cost.linear_active_params
    if not sparse_layers(model):  # a stock model may hold zeros, too
        names = [projection.name for projection in find_projections(model)]
        parameters = dict(model.named_parameters())
        active = sum(int(torch.count_nonzero(parameters[f"{name}.weight"])) for name in names)
    return {**cost.to_dict(), "linear_active_params": active, "linear_sparsity": 1 - active / cost.linear_params}


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over the names, types and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_held_out(name: str, suite: Suite) -> None:
    """Refuse the built-in suite for a run that trained on text the suite's items are drawn from.

    Raises:
        ValueError: the run's recipe says it held out less of the built-in corpus.
    """
    if not any(task.startswith("builtin_") for task in suite.tasks()):
        return
    for folder in (Path(name), Path(name).parent):
        if (folder / RECIPE_NAME).is_file():
            data = json.loads((folder / RECIPE_NAME).read_text(encoding="utf-8"))["data"]
            if data["corpus"] == "builtin" and data["eval_fraction"] < builtin.EVAL_FRACTION:
                raise ValueError(
                    f"{folder} trained with data.eval_fraction={data['eval_fraction']}, so on some of the suite's "
                    f"items; the built-in suite needs {builtin.EVAL_FRACTION} or more"
                )


class ResultFile:
    """Where one evaluation goes, and what an interrupted one has left there.

    Args:
        path: `F.json`.
        settings: what the scores depend on; an evaluation only goes on with the same.
        resume: go on with what is there.
        is_writer: whether this process writes.

    Raises:
        ValueError: something is there and `resume` is not set, or it is from other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], resume: bool, is_writer: bool = True) -> None:
        self.path = Path(path)
        if self.path.suffix != ".json":
            raise ValueError(f"--output must end in .json, got {path}")
        self.items_dir = self.path.with_suffix(".items")
        self.progress_path = self.path.with_suffix(".progress.json")
        self.settings = json.loads(json.dumps(settings))
        self.is_writer = is_writer
        self.is_complete = self.path.is_file()
        self.leaves: dict[str, dict[str, Any]] = {}
        before = next((p for p in (self.path, self.progress_path) if p.is_file()), None)
        if before is None:
            return
        if not resume:
            raise ValueError(f"{before} is there already; go on with --resume, or give another --output")
        values = json.loads(before.read_text(encoding="utf-8"))
        changed = [key for key, value in self.settings.items() if values["settings"].get(key) != value]
        if changed:
            raise ValueError(
                f"{before} was begun with another {changed[0]}: {values['settings'].get(changed[0])}, now "
                f"{self.settings[changed[0]]}; give another --output"
            )
        self.leaves = values["subtasks"]

    def add(self, task: str, leaf: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> None:
        """Keep a finished task, items first, so that a kill never leaves a result without its items."""
        self.leaves[task] = dict(leaf)
        if not self.is_writer:
            return
        write_text(self.items_dir / f"{task}.jsonl", "".join(json.dumps(item) + "\n" for item in items))
        write_json(self.progress_path, {"settings": self.settings, "subtasks": self.leaves})

    def finish(self, suite: Suite, model: Mapping[str, Any], **values: Any) -> dict[str, Any]:
        """Write `F.json` and return what it holds; `values` are entered as they are."""
        result = {
            "suite": suite.name,
            **summarize(suite, self.leaves),
            "items": self.items_dir.name,
            "model": dict(model),
            "settings": self.settings,
            **values,
            "commit": commit(),
            "versions": {**versions(), "lm_eval": version("lm_eval")},
            "machine": machine(),
        }
        if self.is_writer:
            write_json(self.path, result)
            self.progress_path.unlink(missing_ok=True)
        return result


def read_items(items_dir: Path, task: str) -> list[dict[str, Any]]:
    """The records of one task.

    Raises:
        ValueError: they are missing or damaged.
    """
    path = items_dir / f"{task}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"the item records {path} are missing or damaged: {error}") from error


def table(result: Mapping[str, Any]) -> str:
    """The headlines of a result file as markdown."""
    header = ("task", "metric", "shots", "items", "score", "stderr", "chance")
    rows = []
    for name, line in result["results"].items():
        cells = [shown(line[key], line["metric"]) for key in ("value", "stderr", "chance")]
        if "normalized" in line:
            cells[0] += f" ({line['normalized']:.2f} normalised)"
        rows.append([name, line["metric"], str(line["num_fewshot"]), f"{line['num_items']:,}", *cells])
    for name in result["averages"]:
        average = result[name] if result["average_of"] == "normalized" else 100 * result[name]
        rows.append([f"**{name}**", "", "", "", f"{average:.2f}", "", ""])
    return markdown_table(header, rows, "llrrrrr") + "\n"


def shown(value: float | None, metric: str) -> str:
    """Accuracies in percent, everything else as it is."""
    if value is None:
        return "-"
    return f"{value:.4f}" if is_ratio(metric) else f"{100 * value:.2f}"
