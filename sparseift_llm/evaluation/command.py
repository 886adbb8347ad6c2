"""The command line that evaluates a model on a suite: eval/leaderboard.py and `sparseift evaluate`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lm_eval._cli.utils import MergeDictAction, _int_or_none_list_arg_type
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparseift_llm.evaluation.harness import evaluate_task, max_gen_toks
from sparseift_llm.evaluation.language_model import SplitLM, TooLongError, load_model
from sparseift_llm.evaluation.limits import shortened_answers, tasks_too_long
from sparseift_llm.evaluation.lm_eval_files import LMEvalFiles, assemble
from sparseift_llm.evaluation.model_facts import check_held_out, config_digest, describe_model, tokenizer_digest
from sparseift_llm.evaluation.options import EvaluationOptions
from sparseift_llm.evaluation.quiet import DEFAULT_SEEDS
from sparseift_llm.evaluation.result_file import ResultFile
from sparseift_llm.evaluation.results import read_items, table
from sparseift_llm.evaluation.suites import select, without
from sparseift_llm.evaluation.task_loading import LoadedSuite, load_suite, named_suite, only_tasks
from sparseift_llm.utils.outputs import in_words, user_path
from sparseift_llm.utils.words import check_choice

logger = logging.getLogger("leaderboard")
_DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")

DESCRIPTION = """Evaluate a run, a checkpoint or a hub model on the Open LLM Leaderboard's tasks or the built-in suite.

    sparseift evaluate --model runs/demo/sparse --suite builtin
    accelerate launch eval/leaderboard.py --model openai-community/gpt2 --suite v1 --data-dir DIR

Several processes split the work; without a GPU start them with `accelerate launch --multi_gpu --num_processes 2`,
as `--cpu` starts one only.

Writes F.json, one record per item into F.items/, and the same results in lm-eval's own format into F.lm_eval/.
"""


def main(words: Sequence[str], program: str = "eval/leaderboard.py") -> None:
    """Check everything, evaluate what is not done yet, write the result.

    Args:
        words: the command line without the program's name.
        program: how the program is called, for the result file.

    Raises:
        SystemExit: a mistake of the user's, in words.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    logging.basicConfig(level=logging.WARNING if state.process_index else logging.INFO, format="%(message)s")
    try:
        run(arguments(words, program), shlex.join([*program.split(), *words]), state)
    except ValueError as error:  # the user's to mend, and the same on every process: no traceback, once
        sys.exit(f"leaderboard: {error}" if state.is_main_process else 1)
    except OSError as error:
        sys.exit(f"leaderboard: {in_words(error)} (process {state.process_index})")
    finally:
        state.destroy_process_group()


def arguments(words: Sequence[str], program: str = "eval/leaderboard.py") -> argparse.Namespace:
    """The command line, parsed; arguments as those of `main`."""
    parser = argparse.ArgumentParser(
        program, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a run's output folder, a checkpoint, or a hub id")
    parser.add_argument("--suite", required=True, help="v1, v2, builtin, or comma-separated lm-eval tasks and groups")
    parser.add_argument("--only", help="comma-separated tasks of the suite; averages that lack a task are left out")
    parser.add_argument("--skip-too-long", action="store_true", help="leave out tasks that do not fit the context")
    parser.add_argument("--data-dir", help="folder of data sets under their hub names; nothing else is read then")
    parser.add_argument(
        "--allow-wrong-labels",
        action="store_true",
        help="go on if gold answers are none of the choices: such items are wrong whatever the model says, and counted",
    )
    parser.add_argument("--batch-size", default="auto", help="sequences per call, or auto (default)")
    parser.add_argument("--dtype", help="e.g. bfloat16; default: the checkpoint's")
    parser.add_argument("--output", help="F.json; default: eval_SUITE.json in the model's folder")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted evaluation, task by task")
    _add_lm_eval_options(parser.add_argument_group("as in lm-eval"))
    args = parser.parse_args(list(words))
    for name in ("data_dir", "include_path"):
        if getattr(args, name) is not None:
            setattr(args, name, user_path(getattr(args, name)))
    if args.model.startswith("~"):
        args.model = str(user_path(args.model))
    return args


def _add_lm_eval_options(group: Any) -> None:
    """Options that are passed on to lm-eval, and mean what they mean there."""
    group.add_argument("--limit", help="only the first so many items of each task, or a share below 1: for trying out")
    group.add_argument("--samples", metavar="JSON", help="items by task, e.g. '{\"arc_easy\": [0, 4]}', or a file")
    group.add_argument("--num-fewshot", type=int, help="examples per prompt, for tasks named one by one")
    seed = ",".join(map(str, DEFAULT_SEEDS))
    group.add_argument(
        "--seed",
        type=partial(_int_or_none_list_arg_type, 3, 4, seed),
        default=list(DEFAULT_SEEDS),
        metavar="PYTHON,NUMPY,TORCH,FEWSHOT",
        help=f"seeds, one for all or four (default {seed})",
    )
    group.add_argument("--apply-chat-template", nargs="?", const=True, default=False, metavar="NAME")
    group.add_argument("--fewshot-as-multiturn", action=argparse.BooleanOptionalAction, default=None)
    group.add_argument("--system-instruction", metavar="TEXT")
    group.add_argument("--gen-kwargs", nargs="+", action=MergeDictAction, metavar="KEY=VALUE")
    group.add_argument("--include-path", metavar="DIR", help="a folder with more lm-eval tasks")
    group.add_argument("--confirm-run-unsafe-code", action="store_true", help="allow tasks that run the model's code")
    group.add_argument(
        "--log-samples",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write questions and prompts of all items in lm-eval's format (default)",
    )
    group.add_argument("--hf-hub-log-args", nargs="+", action=MergeDictAction, metavar="KEY=VALUE")
    group.add_argument("--wandb-args", nargs="+", action=MergeDictAction, metavar="KEY=VALUE", help="log the scores")


def run(args: argparse.Namespace, command: str, state: PartialState) -> dict[str, Any]:
    """One evaluation; data first, so that what is missing shows before the model is loaded.

    Args:
        args: see `arguments`.
        command: for the result file.
        state: accelerate's view of the processes.

    Returns:
        What the result file holds.

    Raises:
        ValueError: a mistake of the user's.
    """
    if args.dtype is not None:
        check_choice("--dtype", args.dtype, _DTYPES)
    batch_size = args.batch_size if args.batch_size == "auto" else positive("--batch-size", args.batch_size)
    options = options_of(args)
    suite = named_suite(args.suite, args.num_fewshot)
    if args.only:
        suite = select(suite, args.only.split(","))
    loaded = load_suite(suite, args.data_dir, args.include_path, options.gen_kwargs, args.allow_wrong_labels)
    options.check_samples(loaded.tasks)
    check_held_out(args.model, loaded.suite)
    model, tokenizer = load_model(args.model, **({"dtype": args.dtype} if args.dtype else {}))
    lm = SplitLM(model.to(state.device), tokenizer, batch_size, state)
    described = describe_model(model, args.model, lm.max_length)
    loaded, left_out = _without_too_long(lm, loaded, options, args.skip_too_long)
    state.wait_for_everyone()  # nobody reads what somebody else has begun to write
    file = ResultFile(
        output_path(args),
        _settings(model, tokenizer, described, lm, options),
        {name: _task_settings(lm, loaded, name) for name in loaded.tasks},
        args.resume,
        state.is_main_process,
    )
    state.wait_for_everyone()
    template = lm.chat_template(options.apply_chat_template) if options.apply_chat_template else None
    copies = None
    if state.is_main_process:
        hub_args = _with_token(args.hf_hub_log_args)
        copies = LMEvalFiles(file.harness_dir, file.started, args.model, options, template, hub_args)
    late = _evaluate(args, command, state, lm, loaded, options, file, copies)
    loaded, left_out = _shrunk(loaded, left_out | late)
    shortened = shortened_answers(lm, loaded.tasks)
    result = file.finish(
        loaded.suite,
        described,
        limit=options.limit,
        left_out=left_out,
        shortened_answers=shortened,
        wrong_labels={name: number for name, number in loaded.wrong_labels.items() if name in loaded.tasks},
        command=command,
    )
    if copies is not None:
        items = {name: read_items(file.items_dir, name) for name in loaded.tasks}
        records = {name: file.records[name] for name in loaded.tasks}
        results = assemble(records, loaded.groups, lm, described, options)
        path = copies.finish(results, items)
        _log_to_wandb(args.wandb_args, results)
        logger.info("%s\nwrote %s and %s", table(result), file.path, path)
    return result


def options_of(args: argparse.Namespace) -> EvaluationOptions:
    """The part of the command line that decides how items are asked.

    Raises:
        ValueError: a value out of range.
    """
    python, numpy, torch_seed, fewshot = args.seed
    return EvaluationOptions(
        limit=None if args.limit is None else limit_of(args.limit),
        samples=None if args.samples is None else _samples(args.samples),
        apply_chat_template=args.apply_chat_template,
        fewshot_as_multiturn=args.fewshot_as_multiturn,
        system_instruction=args.system_instruction,
        gen_kwargs=args.gen_kwargs or {},
        seeds=(python, numpy, torch_seed, fewshot),
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
    )


def limit_of(text: str) -> int | float:
    """A number of items, or a share of them.

    Raises:
        ValueError: it is neither.
    """
    if text.isdigit() and int(text) >= 1:
        return int(text)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(
            f"--limit must be a whole number of at least 1, or a share of the items between 0 and 1, got {text}"
        )
    return share


def positive(option: str, text: str | int) -> int:
    """A whole number of at least 1."""
    if not str(text).isdigit() or int(text) < 1:
        raise ValueError(f"{option} must be a whole number of at least 1, got {text!r}")
    return int(text)


def output_path(args: argparse.Namespace) -> Path:
    """--output, or a name in the model's folder."""
    if args.output:
        return user_path(args.output)
    if not Path(args.model).is_dir():
        raise ValueError("--output is needed for a model that is not a local folder")
    return Path(args.model) / f"eval_{args.suite.replace(',', '+')}.json"


def _samples(text: str) -> dict[str, list[int]]:
    content = user_path(text).read_text(encoding="utf-8") if text.endswith(".json") else text
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ValueError(f"--samples must be a JSON object, or a file of one, got {text!r} ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--samples must be a JSON object from tasks to item numbers, got {text!r}")
    return values


def _settings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    described: Mapping[str, Any],
    lm: SplitLM,
    options: EvaluationOptions,
) -> dict[str, Any]:
    """What the scores of all tasks depend on. Batch size and versions of torch change no more than roundings."""
    return {
        "model": described["sha256"],
        "config": config_digest(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "dtype": described["dtype"],
        "context": lm.max_length,
        "lm_eval": version("lm_eval"),
        **options.to_dict(),
    }


def _task_settings(lm: SplitLM, loaded: LoadedSuite, name: str) -> dict[str, Any]:
    """What the scores of one task depend on besides."""
    task = loaded.tasks[name]
    return {
        "num_fewshot": task.get_config("num_fewshot"),
        "version": task.VERSION,
        "max_gen_toks": max_gen_toks(lm, task),
        "data": loaded.data_of.get(name, {}),
    }


def _without_too_long(
    lm: SplitLM, loaded: LoadedSuite, options: EvaluationOptions, skip: bool
) -> tuple[LoadedSuite, dict[str, str]]:
    """The suite without tasks that do not fit the model's context, and which headlines that cost, and why.

    Raises:
        ValueError: some do not fit and `skip` is not set, or none does.
    """
    reasons = tasks_too_long(lm, loaded.tasks, options)
    if not reasons:
        return loaded, {}
    listed = "\n  ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if not skip:
        raise TooLongError(
            f"{len(reasons)} of {len(loaded.tasks)} tasks do not fit the model:\n  {listed}\n"
            "leave them out with --skip-too-long, or evaluate a model with a longer context"
        )
    return _shrunk(loaded, reasons)


def _shrunk(loaded: LoadedSuite, reasons: Mapping[str, str]) -> tuple[LoadedSuite, dict[str, str]]:
    """The suite without the tasks or headlines that `reasons` names, and headline -> reason of what was dropped."""
    tasks = [name for name in reasons if name in loaded.tasks]
    if not tasks:
        return loaded, dict(reasons)
    suite, _ = without(loaded.suite, tasks)
    if not suite.headlines:
        listed = "\n  ".join(f"{name}: {reasons[name]}" for name in tasks)
        raise TooLongError(f"none of the tasks fits the model:\n  {listed}\nevaluate a model with a longer context")
    left_out = {name: reason for name, reason in reasons.items() if name not in loaded.tasks}
    for line in loaded.suite.headlines:
        causes = [task for task in line.tasks() if task in tasks]
        if causes and not line.is_further:
            of = "" if line.tasks() == causes else f"{causes[0]} "
            left_out[line.name] = f"{of}{reasons[causes[0]]}"
    return only_tasks(loaded, suite), left_out


def _evaluate(
    args: argparse.Namespace,
    command: str,
    state: PartialState,
    lm: SplitLM,
    loaded: LoadedSuite,
    options: EvaluationOptions,
    file: ResultFile,
    copies: LMEvalFiles | None,
) -> dict[str, str]:
    """Run what is not done yet.

    Returns:
        Tasks that turned out not to fit the model only now, with the reason.

    Raises:
        TooLongError: there are such tasks, and they are not to be left out; what is finished is kept.
    """
    late: dict[str, str] = {}
    for number, (name, task) in enumerate(loaded.tasks.items(), start=1):
        if name in file.leaves:
            continue
        logger.info("%d/%d: %s", number, len(loaded.tasks), name)
        started = time.perf_counter()
        try:
            found = evaluate_task(lm, name, task, options, bars=state.is_main_process and sys.stderr.isatty())
        except TooLongError as error:
            if not args.skip_too_long:
                raise TooLongError(
                    f"{error}; leave the task out with --resume --skip-too-long, or evaluate a model with a longer "
                    "context"
                ) from error
            late[name] = str(error)
            continue
        cut = found.result["truncated_items"]
        if cut:
            logger.warning(
                "%s: the prompts of %d of %d items are longer than the model's context and lost their beginning",
                name, cut, found.result["num_items"],
            )  # fmt: skip
        if copies is not None and args.log_samples:
            copies.add_samples(name, found.samples)
        seconds = time.perf_counter() - started
        file.add(
            name, found, seconds=seconds, batch_size=lm.batch_size, num_processes=state.num_processes, command=command
        )
    return late


def _with_token(hub_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where results go on the hub, with the token that lm-eval's command line takes from the environment, too."""
    token = os.environ.get("HF_TOKEN")
    return {**(hub_args or {}), **({"token": token} if hub_args and token else {})}


def _log_to_wandb(wandb_args: Mapping[str, Any] | None, results: dict[str, Any]) -> None:
    """Log the scores to Weights & Biases by lm-eval's own logger.

    Raises:
        ValueError: wandb is not installed.
    """
    if not wandb_args:
        return
    from lm_eval.loggers import WandbLogger

    wandb = WandbLogger(dict(wandb_args))
    wandb.post_init(results)
    wandb.log_eval_result()
    wandb.run.finish()
