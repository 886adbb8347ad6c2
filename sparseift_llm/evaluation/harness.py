"""Running a suite's tasks through lm-eval: finding them, loading their data, and evaluating one task at a time."""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import datasets  # type: ignore[import-untyped, unused-ignore]
import jinja2
import lm_eval.tasks
import lm_eval.utils
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import hash_string

from sparseift_llm.evaluation.data_folder import DataError, Requirement, check_folder, load_local, merge
from sparseift_llm.evaluation.hub import hub_fault, use_sentence_splitter
from sparseift_llm.evaluation.suites import SUITES, Headline, Score, Suite, expand, is_ratio

_OWN_TASKS = Path(__file__).parent / "tasks"
_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
_UNREADABLE = (jinja2.UndefinedError, KeyError, IndexError, TypeError, AttributeError, ValueError)


@dataclass(frozen=True)
class LoadedSuite:
    """A suite's tasks, ready to be evaluated.

    Args:
        suite: with its groups expanded.
        tasks: lm-eval's task objects by name.
        data: what the data folder holds, see `check_folder`; empty for data from the hub.
    """

    suite: Suite
    tasks: dict[str, Any]
    data: dict[str, dict[str, Any]]


def named_suite(name: str, num_fewshot: int | None = None) -> Suite:
    """`v1`, `v2`, `builtin`, or comma-separated lm-eval tasks and groups, each a headline of its own.

    Args:
        name: see above.
        num_fewshot: for tasks that are named one by one.

    Raises:
        ValueError: nothing is named, or `num_fewshot` is given for a suite that fixes it.
    """
    if name in SUITES:
        if num_fewshot is not None:
            raise ValueError(f"--num-fewshot is for tasks named one by one; suite {name} fixes it")
        return SUITES[name]
    names = tuple(dict.fromkeys(part.strip() for part in name.split(",") if part.strip()))
    if not names:
        raise ValueError("--suite is empty; give v1, v2, builtin or lm-eval tasks")
    lines = tuple(Headline(task, (Score(task, ""),), num_fewshot) for task in names)
    return Suite(",".join(names), lines, {})


def requirements_of(suite: Suite) -> list[Requirement]:
    """The data that the suite's tasks read.

    Raises:
        ValueError: lm-eval has no such task.
    """
    leaves = _leaves_by_root(suite, _task_manager(suite.folders))
    return merge(item for configs in leaves.values() for config in configs.values() for item in _requirement(config))


def load_suite(suite: Suite, data_dir: str | Path | None = None) -> LoadedSuite:
    """Find the suite's tasks and load their data, every piece checked before the first is loaded.

    Args:
        suite: see `named_suite`.
        data_dir: folder of data sets under their hub names; None: the hub.

    Raises:
        DataError: data is missing or damaged, or there is neither a folder nor a network.
        ValueError: lm-eval has no such task, or a package that a task needs is missing.
    """
    manager = _task_manager(suite.folders)
    leaves = _leaves_by_root(suite, manager)
    needed = merge(item for configs in leaves.values() for config in configs.values() for item in _requirement(config))
    found: dict[str, dict[str, Any]] = {}
    if needed and data_dir is not None:
        found = check_folder(data_dir, needed)
    elif needed and (fault := hub_fault()):
        names = " ".join(sorted({item.dataset for item in needed}))
        raise DataError(f"no --data-dir is given and {fault}; the suite reads {names}")
    if any("ifeval" in task for configs in leaves.values() for task in configs):
        use_sentence_splitter(data_dir)
    suite = _complete(suite, leaves, manager)
    with seeded(), _reading(data_dir):
        loaded = {name: task for root in leaves for name, task in _load(manager, root).items()}
    for line in suite.headlines:
        for score in line.scores:
            task = loaded[score.task]
            if line.num_fewshot is not None and task.get_config("num_fewshot") != 0:  # lm-eval never overrides a 0
                task.set_config("num_fewshot", line.num_fewshot)
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
    return LoadedSuite(suite, {name: loaded[name] for name in suite.tasks()}, found)


def evaluate_task(
    lm: LM, name: str, task: Any, limit: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run one task.

    Args:
        lm: the model; if it has several processes, all of them call this.
        name: the task's name.
        task: of `LoadedSuite.tasks`.
        limit: only the first so many items.

    Returns:
        The result (`version`, `num_fewshot`, `num_items`, `task_hash`, `metrics` under lm-eval's names) and one
        record per item (`id`, hashes, `values` that add up to the metrics, `target`, `responses`).
    """
    with seeded(), _templates_compiled_once():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        out = evaluate(lm=lm, task_dict={"tasks": {name: task}, "groups": {}}, limit=limit)
    samples = out["samples"][name]
    items = _items(samples)
    metrics = {
        key: float(value)
        for key, value in out["results"][name].items()
        if "," in key and isinstance(value, int | float | np.number)
    }
    for key in metrics:
        metric, _, filter_name = key.partition(",")
        stderr_key = f"{metric}_stderr,{filter_name}"
        pairs = [item["values"].get(key) for item in items]
        if "_stderr" not in key and stderr_key not in metrics and all(isinstance(pair, list) for pair in pairs):
            metrics = {**metrics, stderr_key: ratio_stderr(pairs)}
    result = {
        "version": out["versions"][name],
        "num_fewshot": out["n-shot"][name],
        "num_items": out["n-samples"][name]["effective"],
        "task_hash": hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)),
        "metrics": metrics,
    }
    return result, items


def ratio_stderr(pairs: Sequence[Sequence[float]]) -> float:
    """Standard error of sum(numerators) / sum(denominators) over independent items, to first order."""
    above, below = np.array(pairs, dtype=np.float64).T
    residuals = above - below * above.sum() / below.sum()
    return float(math.sqrt(residuals.var(ddof=1) * len(pairs)) / below.sum()) if len(pairs) > 1 else 0.0


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's seeds inside, the caller's random states back outside: a training run goes on undisturbed."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@functools.cache
def _task_manager(folders: tuple[str, ...] | None) -> TaskManager:
    """lm-eval's index of these folders below its tasks, or of everything, which takes seconds; and of our own tasks."""
    if folders is None:
        return TaskManager(include_path=str(_OWN_TASKS))
    root = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_defaults=False, include_path=[*(str(root / name) for name in folders), str(_OWN_TASKS)])


def _leaves_by_root(suite: Suite, manager: TaskManager) -> dict[str, dict[str, Mapping[str, Any]]]:
    return {root: dict(_leaf_configs(manager, root)) for root in suite.roots()}


def _leaf_configs(manager: TaskManager, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The tasks that a task, group or tag stands for, with their YAML configs; no data is loaded."""
    entry = manager.task_index.get(name)
    if entry is None:
        raise ValueError(f"lm-eval {lm_eval.__version__} has no task, group or tag {name!r}")
    if entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _leaf_configs(manager, member)
    elif entry.kind.name == "GROUP":
        for member in load_yaml(entry.yaml_path, resolve_func=False)["task"]:
            if isinstance(member, dict):
                raise ValueError(f"group {name} changes its tasks inside the group; name its tasks one by one")
            yield from _leaf_configs(manager, member)
    else:
        yield name, load_yaml(entry.yaml_path, resolve_func=False)


def _requirement(config: Mapping[str, Any]) -> Iterator[Requirement]:
    dataset = config.get("dataset_path")
    if dataset and "/" in dataset:  # json, csv and the like read the task's own files
        fewshot = config.get("fewshot_config") or {}
        splits = {config.get(key) for key in _SPLIT_KEYS} | {fewshot.get("split")}
        yield Requirement(dataset, config.get("dataset_name") or "", tuple(sorted(filter(None, splits))))


def _complete(suite: Suite, leaves: Mapping[str, Mapping[str, Mapping[str, Any]]], manager: TaskManager) -> Suite:
    """Expand groups, and find the metric of tasks that were named one by one."""
    lines: list[Headline] = []
    for line in suite.headlines:
        first = line.scores[0]
        if first.metric:
            lines.append(line)
            continue
        configs = leaves[first.task]
        entry = manager.task_index[first.task]
        aggregates = (entry.cfg or {}).get("aggregate_metric_list") if entry.kind.name == "GROUP" else None
        if aggregates:
            metric = aggregates[0]["metric"]
            scores = tuple(Score(task, metric, _filter(config)) for task, config in configs.items())
            lines.append(replace(line, scores=scores, pooled=aggregates[0].get("weight_by_size", True)))
        else:
            lines += [Headline(task, (_first_score(task, c),), line.num_fewshot) for task, c in configs.items()]
    members = {root: list(configs) for root, configs in leaves.items()}
    averages = suite.averages
    if any(not line.scores[0].metric for line in suite.headlines):
        shares = tuple(line.name for line in lines if not is_ratio(line.scores[0].metric))
        averages = {"average": shares} if shares else {}
    return expand(replace(suite, headlines=tuple(lines), averages=averages), members)


def _first_score(task: str, config: Mapping[str, Any]) -> Score:
    metrics = config.get("metric_list")
    if not metrics:
        raise ValueError(f"task {task} names no metric; only tasks with a metric_list can be evaluated")
    return Score(task, metrics[0]["metric"], _filter(config))


def _filter(config: Mapping[str, Any]) -> str:
    filters = config.get("filter_list")
    return filters[0]["name"] if filters else "none"


@contextlib.contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles each prompt template anew for each example, which takes most of the time that prompts take."""
    templates = lm_eval.utils.env
    with mock.patch.object(templates, "from_string", functools.cache(templates.from_string)):
        yield


@contextlib.contextmanager
def _reading(data_dir: str | Path | None) -> Iterator[None]:
    """With a data folder: whatever a task loads comes from there, never from a cache or the hub."""
    if data_dir is None:
        yield
        return
    stock = datasets.load_dataset

    def load(path: str, name: str | None = None, **kwargs: Any) -> Any:
        return load_local(data_dir, path, name) if "/" in path else stock(path, name, **kwargs)

    with mock.patch.object(datasets, "load_dataset", load):
        yield


def _load(manager: TaskManager, root: str) -> dict[str, Any]:
    try:
        tasks: dict[str, Any] = manager.load([root])["tasks"]
    except DataError:
        raise
    except ImportError as error:
        raise ValueError(f"task {root} needs a package: pip install 'sparseift_llm[eval]' ({error})") from error
    except _UNREADABLE as error:
        raise DataError(
            f"task {root} cannot read its data ({type(error).__name__}: {error}); were columns renamed?"
        ) from error
    return tasks


def _items(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record per item from lm-eval's samples, which have one per item and filter."""
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
