"""Running one task through lm-eval: its scores, what became of every item, and the results in lm-eval's own words.

Tasks are loaded in task_loading.py; the model is in language_model.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import handle_non_serializable, hash_string

from sparseift_llm._moved import old_names
from sparseift_llm.evaluation.language_model import SplitLM
from sparseift_llm.evaluation.options import EvaluationOptions
from sparseift_llm.evaluation.quiet import quiet, seeded, templates_compiled_once

if not TYPE_CHECKING:  # so that type checkers still know what is here
    __getattr__ = old_names(__name__)

DEFAULT_OPTIONS = EvaluationOptions()
# What lm-eval's results say about a task, under these keys.
_RECORD_KEYS = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass(frozen=True)
class TaskResult:
    """What one task gave.

    Args:
        result: `version`, `num_fewshot`, `num_items`, `task_hash`, `metrics` under lm-eval's names, how many prompts
            were cut off to fit the model (None if the model does not say), and for tasks that generate text the most
            tokens that they may.
        items: one record per item: `id`, hashes, `values` that add up to the metrics, `target`, `responses`, and
            `cut_tokens`, by which the item's longest prompt was too long.
        samples: lm-eval's own records, with questions and prompts.
        record: what lm-eval's results say about the task, JSON-serialisable.
    """

    result: dict[str, Any]
    items: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    record: dict[str, Any]


def evaluate_task(
    lm: LM, name: str, task: Any, options: EvaluationOptions = DEFAULT_OPTIONS, bars: bool = False
) -> TaskResult:
    """Run one task.

    Args:
        lm: the model; if it has several processes, all of them call this.
        name: the task's name.
        task: of `LoadedSuite.tasks`.
        options: which items, and how they are asked.
        bars: draw progress bars.

    Raises:
        TooLongError: an item does not fit the model.
    """
    samples = options.samples_of(name)
    if isinstance(lm, SplitLM):
        lm.take_cut_tokens()  # of a task that failed
    with quiet(bars), seeded(options.seeds), templates_compiled_once():
        task.set_fewshot_seed(options.seeds[3])
        out = evaluate(
            lm=lm,
            task_dict={"tasks": {name: task}, "groups": {}},
            limit=options.limit,
            samples=None if samples is None else {name: samples},
            system_instruction=options.system_instruction,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.is_multiturn,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        )
    samples_given = out.pop("samples")[name]
    cut = lm.take_cut_tokens() if isinstance(lm, SplitLM) else None
    items = _items(samples_given, cut or {})
    result = {
        "version": out["versions"][name],
        "num_fewshot": out["n-shot"][name],
        "num_items": out["n-samples"][name]["effective"],
        "task_hash": hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples_given)),
        "metrics": _metrics(out["results"][name], items),
        "truncated_items": None if cut is None else sum(item["cut_tokens"] > 0 for item in items),
        "truncated_prompts": None if cut is None else sum(tokens > 0 for tokens in cut.values()),
        "max_gen_toks": max_gen_toks(lm, task),
    }
    record = {key: out[key][name] for key in _RECORD_KEYS}
    return TaskResult(result, items, samples_given, json.loads(json.dumps(record, default=handle_non_serializable)))


def max_gen_toks(lm: LM, task: Any) -> int | None:
    """The most tokens that the model may write in answer to an item; None for tasks that do not generate text."""
    if task.OUTPUT_TYPE != "generate_until":
        return None
    kwargs = task.get_config("generation_kwargs") or {}
    return int(normalize_gen_kwargs(kwargs, getattr(lm, "max_gen_toks", 256))["max_gen_toks"])


def ratio_stderr(pairs: Sequence[Sequence[float]]) -> float:
    """Standard error of sum(numerators) / sum(denominators) over independent items, to first order."""
    above, below = np.array(pairs, dtype=np.float64).T
    residuals = above - below * above.sum() / below.sum()
    return float(math.sqrt(residuals.var(ddof=1) * len(pairs)) / below.sum()) if len(pairs) > 1 else 0.0


def _metrics(found: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """lm-eval's numbers, and standard errors of ratios, which it does not give."""
    metrics = {
        key: float(value)
        for key, value in found.items()
        if "," in key and isinstance(value, int | float | np.number)  # others are names and "N/A"
    }
    for key in list(metrics):
        metric, _, filter_name = key.partition(",")
        stderr_key = f"{metric}_stderr,{filter_name}"
        pairs = [item["values"].get(key) for item in items]
        if "_stderr" not in key and stderr_key not in metrics and all(isinstance(pair, list) for pair in pairs):
            metrics[stderr_key] = ratio_stderr(pairs)
    return metrics


def _items(samples: Sequence[Mapping[str, Any]], cut: Mapping[tuple[int, int], int]) -> list[dict[str, Any]]:
    """One record per item from lm-eval's samples, which have one per item and filter."""
    longest: dict[int, int] = {}
    for (doc_id, _), tokens in cut.items():
        longest[doc_id] = max(tokens, longest.get(doc_id, 0))
    order = {doc_id: number for number, doc_id in enumerate(sorted({sample["doc_id"] for sample in samples}))}
    items: dict[int, dict[str, Any]] = {}
    for sample in samples:
        item = items.setdefault(
            sample["doc_id"],
            {
                "id": sample["doc_id"],
                **{key: sample[key] for key in ("doc_hash", "prompt_hash", "target_hash")},
                "values": {},
                "target": str(sample["target"]),
                "responses": {},
                "cut_tokens": longest.get(order[sample["doc_id"]], 0),
            },
        )
        for metric in sample["metrics"]:
            value = _item_value(metric, sample[metric])
            if value is not None:
                item["values"][f"{metric},{sample['filter']}"] = value
        item["responses"][sample["filter"]] = [_plain(response) for response in sample["filtered_resps"]]
    return [items[key] for key in sorted(items)]


def _item_value(metric: str, value: Any) -> float | list[float] | None:
    """An item's share in a metric: a number to average, or a pair whose sums are divided; None if it is neither."""
    if metric == "bits_per_byte":
        log_likelihood, num_bytes = value
        return [-float(log_likelihood) / math.log(2), float(num_bytes)]
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return float(value)
    if isinstance(value, list) and all(isinstance(entry, bool | int | float) for entry in value):
        return [float(sum(value)), float(len(value))]
    return None


def _plain(response: Any) -> Any:
    """JSON-ready."""
    return [float(response[0]), bool(response[1])] if isinstance(response, tuple | list) else response
