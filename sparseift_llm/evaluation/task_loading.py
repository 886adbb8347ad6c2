"""Finding a suite's tasks in lm-eval and loading their data, every piece and every item checked.

Running the tasks is in harness.py. What a suite asks is in suites.py.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped, unused-ignore]
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from sparseift_llm.evaluation.data_files import DataError, count_rows
from sparseift_llm.evaluation.data_folder import Requirement, check_folder, load_files, load_local, merge, split_files
from sparseift_llm.evaluation.hub import hub_fault, use_sentence_splitter
from sparseift_llm.evaluation.item_checks import Inspection, explain_failure, inspect
from sparseift_llm.evaluation.quiet import exchanged, quiet, seeded, templates_compiled_once
from sparseift_llm.evaluation.source_rows import Source
from sparseift_llm.evaluation.suites import SUITES, Headline, Score, Suite, expand, is_ratio
from sparseift_llm.utils.outputs import user_path

_OWN_TASKS = Path(__file__).parent / "tasks"
_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
_FILE_KINDS = ("json", "parquet")  # data sets that are a task's own files
_CHANCE_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # of a choice among given answers


@dataclass(frozen=True)
class LoadedSuite:
    """A suite's tasks, ready to be evaluated.

    Args:
        suite: with its groups expanded.
        tasks: lm-eval's task objects by name.
        data: what the data folder holds, see `check_folder`; empty for data from the hub.
        data_of: task -> the part of `data` that it reads.
        groups: lm-eval's group objects by name, for results in lm-eval's own format.
        wrong_labels: task -> number of items whose gold answer is none of their choices, where there are any.
    """

    suite: Suite
    tasks: dict[str, Any]
    data: dict[str, dict[str, Any]]
    data_of: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    wrong_labels: dict[str, int] = field(default_factory=dict)


def named_suite(name: str, num_fewshot: int | None = None) -> Suite:
    """`v1`, `v2`, `builtin`, or comma-separated lm-eval tasks and groups, each a headline of its own.

    Args:
        name: see above.
        num_fewshot: for tasks that are named one by one.

    Raises:
        ValueError: nothing is named, `num_fewshot` is negative, or it is given for a suite that fixes it.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"--num-fewshot must be 0 or more, got {num_fewshot}")
    if name in SUITES:
        if num_fewshot is not None:
            raise ValueError(f"--num-fewshot is for tasks named one by one; suite {name} fixes it")
        return SUITES[name]
    names = tuple(dict.fromkeys(part.strip() for part in name.split(",") if part.strip()))
    if not names:
        raise ValueError("--suite is empty; give v1, v2, builtin or lm-eval tasks")
    lines = tuple(Headline(task, (Score(task, ""),), num_fewshot) for task in names)
    return Suite(",".join(names), lines, {}, is_named=True)


def requirements_of(suite: Suite, include_path: str | Path | None = None) -> list[Requirement]:
    """The data that the suite's tasks read.

    Args:
        suite: see `named_suite`.
        include_path: a folder with more lm-eval tasks.

    Raises:
        ValueError: lm-eval has no such task.
    """
    leaves = _leaves_by_root(suite, _task_manager(suite.folders, include_path))
    return merge(item for configs in leaves.values() for config in configs.values() for item in _requirement(config))


def load_suite(
    suite: Suite,
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    allow_wrong_labels: bool = False,
) -> LoadedSuite:
    """Find the suite's tasks and load their data; every file is checked before, and every item after loading.

    Args:
        suite: see `named_suite`.
        data_dir: folder of data sets under their hub names; None: the hub.
        include_path: a folder with more lm-eval tasks.
        gen_kwargs: lm-eval's generation settings that take the place of the tasks' own.
        allow_wrong_labels: count items whose gold answer is none of their choices, and score them as wrong.

    Raises:
        DataError: data is missing or damaged, an item has no gold answer among its choices or the like, or there is
            neither a folder nor a network.
        ValueError: lm-eval has no such task, a package that a task needs is missing, or a number of shots is asked
            for that a task does not take.
    """
    data_dir = None if data_dir is None else user_path(data_dir)
    manager = _task_manager(suite.folders, include_path)
    leaves = _leaves_by_root(suite, manager)
    configs = {name: config for found in leaves.values() for name, config in found.items()}
    needed = merge(item for config in configs.values() for item in _requirement(config))
    found = _checked_data(needed, data_dir)
    if any("ifeval" in task for task in configs):
        use_sentence_splitter(data_dir)
    with quiet(), seeded(), templates_compiled_once(), _reading(data_dir):
        tasks, groups = _load_all(manager, leaves, configs, data_dir)
        suite = _complete(suite, leaves, manager, tasks)
        _set_shots(suite, tasks)
        _set_generation(tasks, gen_kwargs)
        asked = {name: tasks[name] for name in suite.tasks()}
        inspections = _inspect_all(asked, configs, data_dir, allow_wrong_labels)
    if suite.is_named:
        suite = _with_chance(suite, tasks, inspections)
    data_of = {
        name: {str(item): found[str(item)] for item in _requirement(config) if str(item) in found}
        for name, config in configs.items()
    }
    wrong_labels = {name: one.wrong_labels for name, one in inspections.items() if one.wrong_labels}
    return LoadedSuite(suite, asked, found, data_of, groups, wrong_labels)


def only_tasks(loaded: LoadedSuite, suite: Suite) -> LoadedSuite:
    """The part of a loaded suite that a smaller suite needs."""
    return replace(loaded, suite=suite, tasks={name: loaded.tasks[name] for name in suite.tasks()})


def _checked_data(needed: Sequence[Requirement], data_dir: str | Path | None) -> dict[str, dict[str, Any]]:
    if needed and data_dir is not None:
        return check_folder(data_dir, needed)
    if needed and (fault := hub_fault()):
        names = " ".join(sorted({item.dataset for item in needed}))
        raise DataError(f"no --data-dir is given and {fault}; the suite reads {names}")
    return {}


def _task_manager(folders: tuple[str, ...] | None, include_path: str | Path | None = None) -> TaskManager:
    """lm-eval's index of these folders below its tasks, or of everything, which takes seconds; and of further tasks."""
    if include_path is None:
        return _own_task_manager(folders)
    include_path = user_path(include_path)
    if not include_path.is_dir():
        raise ValueError(f"--include-path {include_path} is not a folder; give one with lm-eval task files (YAML)")
    return _new_task_manager(folders, [str(_OWN_TASKS), str(include_path)])  # the user's files may change


@functools.cache
def _own_task_manager(folders: tuple[str, ...] | None) -> TaskManager:
    return _new_task_manager(folders, [str(_OWN_TASKS)])


def _new_task_manager(folders: tuple[str, ...] | None, further: list[str]) -> TaskManager:
    if folders is None:
        return TaskManager(include_path=further)
    root = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_defaults=False, include_path=[*(str(root / name) for name in folders), *further])


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


@contextlib.contextmanager
def _reading(data_dir: str | Path | None) -> Iterator[None]:
    """Files of a task's own, and with a data folder whatever a task loads, are read from there and from no cache."""
    stock = datasets.load_dataset

    def load(path: str, name: str | None = None, **kwargs: Any) -> Any:
        if data_dir is not None and "/" in path:
            return load_local(data_dir, path, name)
        files = _own_files(path, kwargs)
        if not files:
            return stock(path, name, **kwargs)
        for file in (file for paths in files.values() for file in paths):
            count_rows(file)
        return load_files(files)

    with exchanged(datasets, "load_dataset", load):  # tasks call it in their own files, too
        yield


def _own_files(path: str, kwargs: Mapping[str, Any]) -> dict[str, list[Path]]:
    """split -> local files of a task whose data set is its own files; empty for any other task."""
    named = kwargs.get("data_files")
    if path not in _FILE_KINDS or not named:
        return {}
    by_split = named if isinstance(named, Mapping) else {"train": named}
    found: dict[str, list[Path]] = {}
    for split, patterns in by_split.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if "://" in pattern:
                return {}  # read by `datasets` from the network
            paths = sorted(map(Path, glob.glob(pattern)))
            if not paths:
                raise DataError(f"the file {pattern} of split {split!r} is missing")
            found.setdefault(split, []).extend(paths)
    return found


def _load_all(
    manager: TaskManager,
    leaves: Mapping[str, Mapping[str, Any]],
    configs: Mapping[str, Mapping[str, Any]],
    data_dir: str | Path | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All tasks and groups by name.

    Raises:
        DataError: some cannot be built from their data; all of those are named.
    """
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    faults = []
    for root in leaves:
        try:
            loaded = _load(manager, root, configs, data_dir)
        except DataError as error:
            faults.append(str(error))
            continue
        tasks |= loaded["tasks"]
        groups |= loaded.get("groups", {})
    _refuse(faults)
    return tasks, groups


def _load(
    manager: TaskManager, root: str, configs: Mapping[str, Mapping[str, Any]], data_dir: str | Path | None
) -> Any:
    try:
        return manager.load([root])
    except DataError:
        raise
    except ImportError as error:
        raise ValueError(f"task {root} needs a package: pip install 'sparseift_llm[eval]' ({error})") from error
    except Exception as error:  # whatever a task's functions raise
        task = _task_at_fault(error)
        if getattr(task, "dataset", None) is None:
            raise DataError(f"task {root} cannot read its data ({type(error).__name__}: {error})") from error
        name = task.config.task
        source = _source(name, configs.get(name, {}), data_dir)
        raise DataError(explain_failure(name, task, source, error)) from error


def _task_at_fault(error: Exception) -> Any:
    """The task that was being built when `error` was raised, as far as it was; None if there was none."""
    objects = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((one for one in reversed(objects) if isinstance(one, ConfigurableTask)), None)


def _source(name: str, config: Mapping[str, Any], data_dir: str | Path | None) -> Source:
    requirement = next(iter(_requirement(config)), None)
    if requirement is None:
        return Source(name, _own_files(config.get("dataset_path") or "", config.get("dataset_kwargs") or {}))
    if data_dir is None:
        return Source(str(requirement))
    return Source(str(requirement), split_files(data_dir, requirement.dataset, requirement.config))


def _inspect_all(
    tasks: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    data_dir: str | Path | None,
    allow_wrong_labels: bool,
) -> dict[str, Inspection]:
    """Look at all items of all tasks.

    Raises:
        DataError: some are faulty; the first of every split and task is named.
    """
    found = {
        name: inspect(name, task, _source(name, configs[name], data_dir), allow_wrong_labels)
        for name, task in tasks.items()
    }
    _refuse([fault for inspection in found.values() for fault in inspection.faults])
    return found


def _refuse(faults: Iterable[str]) -> None:
    lines = list(dict.fromkeys(faults))
    if lines:
        raise DataError("the data cannot be evaluated:\n  " + "\n  ".join(lines))


def _complete(
    suite: Suite, leaves: Mapping[str, Mapping[str, Any]], manager: TaskManager, tasks: Mapping[str, Any]
) -> Suite:
    """Expand groups, and find the metrics of tasks that were named one by one."""
    if not suite.is_named:
        return expand(suite, {root: list(configs) for root, configs in leaves.items()})
    lines: list[Headline] = []
    for line in suite.headlines:
        root = line.scores[0].task
        entry = manager.task_index[root]
        aggregates = (entry.cfg or {}).get("aggregate_metric_list") if entry.kind.name == "GROUP" else None
        if aggregates:
            metric = aggregates[0]["metric"]
            scores = tuple(Score(task, metric, _filters(tasks[task])[0]) for task in leaves[root])
            lines.append(replace(line, scores=scores, pooled=aggregates[0].get("weight_by_size", True)))
        else:
            lines += [one for task in leaves[root] for one in _task_lines(task, tasks[task], line.num_fewshot)]
    shares = tuple(line.name for line in lines if not line.is_further and not is_ratio(line.scores[0].metric))
    return replace(suite, headlines=tuple(lines), averages={"average": shares} if shares else {})


def _task_lines(name: str, task: Any, num_fewshot: int | None) -> list[Headline]:
    """One line for every metric and filter of a task; the first one has the task's name."""
    metrics, filters = list(task.aggregation()), _filters(task)
    if not metrics:
        raise ValueError(f"task {name} names no metric; only tasks with a metric_list can be evaluated")
    lines = []
    for number, (metric, filter_name) in enumerate((m, f) for m in metrics for f in filters):
        called = name if number == 0 else further_name(name, metric, filter_name, filters[0])
        lines.append(Headline(called, (Score(name, metric, filter_name),), num_fewshot, is_further=number > 0))
    return lines


def further_name(task: str, metric: str, filter_name: str, first_filter: str) -> str:
    """How the line of a task's further metric is called."""
    return f"{task}/{metric}" if filter_name == first_filter else f"{task}/{metric},{filter_name}"


def _filters(task: Any) -> list[str]:
    return [one.name for one in task._filters]


def _set_shots(suite: Suite, tasks: Mapping[str, Any]) -> None:
    """Give every task the number of examples that its line asks for, or its own.

    Raises:
        ValueError: examples are asked for of a task that takes none; lm-eval would leave them out without a word.
    """
    fixed = []
    for line in suite.headlines:
        for name in line.tasks():
            task = tasks[name]
            own = task.get_config("num_fewshot")
            if line.num_fewshot is not None and own != 0:
                task.set_config("num_fewshot", line.num_fewshot)
            elif line.num_fewshot and suite.is_named:
                fixed.append(name)
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
    if fixed:
        names = ", ".join(dict.fromkeys(fixed))
        raise ValueError(
            f"--num-fewshot cannot be given for {names}: lm-eval fixes 0 examples there; evaluate it without the option"
        )


def _set_generation(tasks: Mapping[str, Any], gen_kwargs: Mapping[str, Any] | None) -> None:
    for task in tasks.values():
        if gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", dict(gen_kwargs), update=True)


def _with_chance(suite: Suite, tasks: Mapping[str, Any], inspections: Mapping[str, Inspection]) -> Suite:
    """What guessing scores on the tasks that were named one by one, as far as that is known."""

    def chance(score: Score) -> float | None:
        kind = tasks[score.task].OUTPUT_TYPE
        if kind == "multiple_choice":
            return inspections[score.task].chance if score.metric in _CHANCE_METRICS else None
        return 0.0 if score.metric in ("acc", "exact_match") and kind != "loglikelihood_rolling" else None

    lines = tuple(
        replace(line, scores=tuple(replace(score, chance=chance(score)) for score in line.scores))
        for line in suite.headlines
    )
    return replace(suite, headlines=lines)
