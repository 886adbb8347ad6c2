"""The results in lm-eval's own format, by its own functions, so that its viewers and leaderboards read them.

`F.lm_eval/MODEL/results_DATE.json` holds the results, `samples_TASK_DATE.jsonl` one record per item with its question
and prompts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.evaluator_utils import EvalAcc, aggregate_groups
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers import evaluation_tracker as tracker_module
from lm_eval.loggers.utils import add_tokenizer_info, get_git_commit_hash

from sparseift_llm.evaluation.options import EvaluationOptions
from sparseift_llm.utils.provenance import versions

MODEL_SOURCE = "sparseift"
# What lm-eval's results say about a task: the key in the results, and the field that they are put together from.
_FIELDS = {
    "results": "metrics",
    "configs": "configs",
    "versions": "versions",
    "n-shot": "num_fewshot",
    "higher_is_better": "higher_is_better",
    "n-samples": "n_samples",
}


class LMEvalFiles:
    """Writes lm-eval's files for one evaluation, task by task; a resumed one goes on with the same files.

    Args:
        folder: `F.lm_eval`.
        started: when the evaluation began, in ISO format; it is part of the files' names.
        model: folder or hub id of the model.
        options: how the suite was asked.
        chat_template: the template that prompts were put into, None if none was.
        hub_args: where else the results go, under the names of lm-eval's `--hf_hub_log_args`.
    """

    def __init__(
        self,
        folder: Path,
        started: str,
        model: str,
        options: EvaluationOptions,
        chat_template: str | None = None,
        hub_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.tracker: Any = _DatedTracker(started.replace(":", "-"), output_path=str(folder), **(hub_args or {}))
        self.tracker.general_config_tracker.log_experiment_args(
            model_source=MODEL_SOURCE,
            model_args={"pretrained": model},
            system_instruction=options.system_instruction,
            chat_template=chat_template,
            fewshot_as_multiturn=options.is_multiturn if options.apply_chat_template else options.fewshot_as_multiturn,
        )
        self.folder = folder / str(self.tracker.general_config_tracker.model_name_sanitized)
        self.folder.mkdir(parents=True, exist_ok=True)  # lm-eval would go on if it could not

    def add_samples(self, task: str, samples: list[dict[str, Any]]) -> None:
        """Write a task's records; lm-eval changes the records while it does.

        Raises:
            ValueError: they could not be written.
        """
        path = self.folder / f"samples_{task}_{self.tracker.date_id}.jsonl"
        path.unlink(missing_ok=True)  # lm-eval would append to what a killed run has left
        with _heard():
            self.tracker.save_results_samples(task_name=task, samples=samples)
        _refuse_missing(path)

    def finish(self, results: dict[str, Any], items: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
        """Write the results.

        Args:
            results: see `assemble`.
            items: task -> records with the hashes of items, prompts and answers, and the answers by filter.

        Returns:
            The file.

        Raises:
            ValueError: it could not be written.
        """
        hashed = {
            task: [
                {key: record[key] for key in ("doc_hash", "prompt_hash", "target_hash")}
                for _ in records[0]["responses"]
                for record in records
            ]
            for task, records in items.items()
        }
        path = self.folder / f"results_{self.tracker.date_id}.json"
        path.unlink(missing_ok=True)
        with _heard():
            self.tracker.save_results_aggregated(results=results, samples=hashed)
        _refuse_missing(path)
        if self.tracker.push_results_to_hub or self.tracker.push_samples_to_hub:
            with _heard():
                self.tracker.recreate_metadata_card()
        return path


class _DatedTracker(EvaluationTracker):  # type: ignore[misc, unused-ignore]
    """lm-eval's writer of files, with one date in all of their names, however often the evaluation was resumed.

    Args:
        date_id: as it stands in the names.
        kwargs: lm-eval's own.
    """

    def __init__(self, date_id: str, **kwargs: Any) -> None:
        self._date_id = date_id
        super().__init__(**kwargs)

    @property
    def date_id(self) -> str:
        """The date of the evaluation."""
        return self._date_id

    @date_id.setter
    def date_id(self, value: str) -> None:
        """lm-eval sets the time of writing, which is not wanted."""


def assemble(
    records: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, Any],
    lm: Any,
    model: Mapping[str, Any],
    options: EvaluationOptions,
) -> dict[str, Any]:
    """lm-eval's results of all tasks, groups included, as its command line would have them.

    Args:
        records: task -> what lm-eval said about it, see `harness.TaskResult`.
        groups: lm-eval's group objects; those that lack a task are left out.
        lm: the model.
        model: see `model_facts.describe_model`.
        options: how the suite was asked.
    """
    fields: dict[str, Any] = {
        name: {task: record[key] for task, record in records.items()} for key, name in _FIELDS.items()
    }
    whole = {
        name: group for name, group in groups.items() if all(t.task_name in records for t in group.get_all_tasks())
    }
    results: dict[str, Any] = dict(aggregate_groups(EvalAcc(**fields, groups=whole))._to_eval_results())
    python, numpy, torch, fewshot = options.seeds
    results["config"] = {
        "model": MODEL_SOURCE,
        "model_args": {"pretrained": model["name"]},
        "model_num_parameters": model["num_parameters"],
        "model_dtype": model["dtype"],
        "model_revision": model["revision"] or "",
        "model_sha": model["revision"] or "",
        "batch_size": lm.batch_size,
        "batch_sizes": [],
        "device": str(lm.device),
        "use_cache": None,
        "limit": options.limit,
        "bootstrap_iters": 100000,
        "gen_kwargs": dict(options.gen_kwargs) or None,
        "random_seed": python,
        "numpy_seed": numpy,
        "torch_seed": torch,
        "fewshot_seed": fewshot,
    }
    found = versions()
    results |= {
        "git_hash": get_git_commit_hash(),
        "date": datetime.now().timestamp(),
        "pretty_env_info": json.dumps(found),
        "transformers_version": found["transformers"],
        "lm_eval_version": version("lm_eval"),
        "upper_git_hash": None,
    }
    add_tokenizer_info(results, lm)
    return results


def read_records(folder: Path, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What lm-eval said about the tasks of a finished evaluation, from its results file.

    Args:
        folder: `F.lm_eval`.
        tasks: the tasks that are wanted.

    Raises:
        ValueError: the file is missing or damaged, or lacks a task.
    """
    paths = sorted(folder.glob("*/results_*.json"))
    try:
        values = json.loads(paths[-1].read_text(encoding="utf-8"))
        return {task: {key: values[key][task] for key in _FIELDS} for task in tasks}
    except (IndexError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} does not hold lm-eval's results of {', '.join(tasks)} ({error!r}), without which the evaluation "
            "cannot go on; give another --output"
        ) from error


@contextmanager
def _heard() -> Iterator[None]:
    """What lm-eval says about writing and uploading is logged: it goes on after errors there."""
    logger = logging.getLogger(tracker_module.__name__)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _refuse_missing(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"lm-eval could not write {path}; its reason is logged above")
