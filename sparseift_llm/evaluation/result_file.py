"""Where one evaluation goes: its result, a record per item, and what an interrupted one has left to go on with.

`F.json` is the result, `F.items/TASK.jsonl` the items, `F.progress.json` what an unfinished run has so far. The same
results in lm-eval's own format are in `F.lm_eval/`, see lm_eval_files.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparseift_llm.evaluation.harness import TaskResult
from sparseift_llm.evaluation.lm_eval_files import read_records
from sparseift_llm.evaluation.results import summarize
from sparseift_llm.evaluation.suites import Suite
from sparseift_llm.utils.files import write_json, write_text
from sparseift_llm.utils.provenance import commit, machine, versions


class ResultFile:
    """The result of one evaluation, task by task.

    Args:
        path: `F.json`.
        settings: what all scores depend on.
        task_settings: task -> what its scores depend on besides; the tasks that are asked for now.
        resume: go on with what is there. Finished tasks are kept if all of their settings are the same; how many
            tasks are asked for may change, as long as none that is finished is dropped.
        is_writer: whether this process writes.

    Raises:
        ValueError: something is there and `resume` is not set, or it is from other settings, or holds other tasks.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        task_settings: Mapping[str, Mapping[str, Any]],
        resume: bool,
        is_writer: bool = True,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix != ".json":
            raise ValueError(f"--output must end in .json, got {path}")
        self.items_dir = self.path.with_suffix(".items")
        self.harness_dir = self.path.with_suffix(".lm_eval")
        self.progress_path = self.path.with_suffix(".progress.json")
        self.started = datetime.now().isoformat()
        self.settings: dict[str, Any] = json.loads(json.dumps({**settings, "tasks": task_settings}))
        self.is_writer = is_writer
        self.leaves: dict[str, dict[str, Any]] = {}
        self.provenance: dict[str, dict[str, Any]] = {}
        self.records: dict[str, dict[str, Any]] = {}
        before = next((p for p in (self.progress_path, self.path) if p.is_file()), None)
        if before is None:
            return
        if not resume:
            raise ValueError(f"{before} is there already; go on with --resume, or give another --output")
        values = json.loads(before.read_text(encoding="utf-8"))
        self._check_settings(before, values)
        self.leaves, self.provenance = values["subtasks"], values["provenance"]
        self.records = values.get("lm_eval") or read_records(self.harness_dir, list(self.leaves))
        self.started = values["started"]

    def _check_settings(self, before: Path, values: Mapping[str, Any]) -> None:
        done, kept = values.get("settings", {}), list(values.get("subtasks", {}))
        lost = [task for task in kept if task not in self.settings["tasks"]]
        if lost:
            raise ValueError(
                f"{before} holds {', '.join(lost)}, which would be lost; ask for these tasks, too, or give another "
                "--output"
            )
        wanted = {key: value for key, value in self.settings.items() if key != "tasks"}
        self._refuse_changes(before, "", wanted, done)
        for task in kept:
            self._refuse_changes(before, f" of {task}", self.settings["tasks"][task], done["tasks"].get(task, {}))

    @staticmethod
    def _refuse_changes(before: Path, whose: str, wanted: Mapping[str, Any], done: Mapping[str, Any]) -> None:
        for key, value in wanted.items():
            if key not in done:
                raise ValueError(f"{before} does not say which {key}{whose} it was begun with; give another --output")
            if done[key] != value:
                raise ValueError(
                    f"{before} was begun with another {key}{whose}: {done[key]}, now {value}; give another --output"
                )

    def add(self, task: str, found: TaskResult, **provenance: Any) -> None:
        """Keep a finished task, items first, so that a kill never leaves a result without its items.

        Args:
            task: its name.
            found: what it gave.
            provenance: what is worth knowing about this process and does not decide scores by intention, such as
                seconds and batch size; versions, commit and machine are added.
        """
        self.leaves[task] = dict(found.result)
        self.records[task] = found.record
        self.provenance[task] = {**provenance, "commit": commit(), "versions": versions(), "machine": machine()}
        if not self.is_writer:
            return
        write_text(self.items_dir / f"{task}.jsonl", "".join(json.dumps(item) + "\n" for item in found.items))
        write_json(self.progress_path, self._progress())

    def _progress(self) -> dict[str, Any]:
        """Everything that another process needs to go on."""
        return {
            "settings": self.settings,
            "started": self.started,
            "subtasks": self.leaves,
            "provenance": self.provenance,
            "lm_eval": self.records,
        }

    def finish(self, suite: Suite, model: Mapping[str, Any], **values: Any) -> dict[str, Any]:
        """Write `F.json` and return what it holds.

        Args:
            suite: with its groups expanded, and without what was left out.
            model: see `model_facts.describe_model`.
            values: entered as they are.
        """
        provenance = list(self.provenance.values())
        result = {
            "suite": suite.name,
            **summarize(suite, self.leaves),
            "items": self.items_dir.name,
            "model": dict(model),
            "settings": self.settings,
            "started": self.started,
            **values,
            "seconds": sum(one.get("seconds", 0.0) for one in provenance),
            **{
                key: _agreed([one.get(key) for one in provenance]) for key in ("batch_size", "num_processes", "machine")
            },
            "commit": _agreed([one["commit"] for one in provenance]),
            "versions": {**_agreed_versions(provenance), "lm_eval": version("lm_eval")},
            "provenance": self.provenance,
        }
        if self.is_writer:
            write_json(self.path, result)
            self.progress_path.unlink(missing_ok=True)
        return result


def _agreed(values: Sequence[Any]) -> Any:
    """The value that all tasks share, or the list of different ones, in the order of the tasks."""
    different: list[Any] = []
    for value in values:
        if value not in different:
            different.append(value)
    return different[0] if len(different) == 1 else different


def _agreed_versions(provenance: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Package -> the version that all tasks were run with, or the list of different ones."""
    packages = dict.fromkeys(name for one in provenance for name in one["versions"])
    return {name: _agreed([one["versions"].get(name) for one in provenance]) for name in packages}
