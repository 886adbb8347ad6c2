"""Evaluate a run, a checkpoint or a hub model on the Open LLM Leaderboard's tasks or the built-in suite.

    python eval/leaderboard.py --model runs/demo/sparse --suite builtin
    accelerate launch eval/leaderboard.py --model openai-community/gpt2 --suite v1 --data-dir DIR

Several processes split the work; without a GPU start them with `accelerate launch --multi_gpu --num_processes 2`,
as `--cpu` starts one only.

Writes F.json, and one record per item into F.items/.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState

from sparseift_llm.evaluation.harness import evaluate_task, load_suite, named_suite
from sparseift_llm.evaluation.language_model import SplitLM, load_model
from sparseift_llm.evaluation.results import ResultFile, check_held_out, describe_model, table
from sparseift_llm.evaluation.suites import select
from sparseift_llm.utils.outputs import in_words

logger = logging.getLogger("leaderboard")


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run's output folder, a checkpoint, or a hub id")
    parser.add_argument("--suite", required=True, help="v1, v2, builtin, or comma-separated lm-eval tasks and groups")
    parser.add_argument("--only", help="comma-separated tasks of the suite; averages that lack a task are left out")
    parser.add_argument("--data-dir", help="folder of data sets under their hub names; nothing else is read then")
    parser.add_argument("--limit", type=int, help="only the first so many items of each task: for trying out")
    parser.add_argument("--num-fewshot", type=int, help="examples per prompt, for tasks named one by one")
    parser.add_argument("--batch-size", default="auto", help="sequences per call, or auto (default)")
    parser.add_argument("--dtype", help="e.g. bfloat16; default: the checkpoint's")
    parser.add_argument("--output", help="F.json; default: eval_SUITE.json in the model's folder")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted evaluation, task by task")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    """Check everything, evaluate what is not done yet, write the result."""
    state = PartialState(cpu=not torch.cuda.is_available())
    logging.basicConfig(level=logging.WARNING if state.process_index else logging.INFO, format="%(message)s")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        run(arguments(words), words, state)
    except ValueError as error:  # the user's to mend, and the same on every process: no traceback, once
        sys.exit(f"leaderboard: {error}" if state.is_main_process else 1)
    except OSError as error:
        sys.exit(f"leaderboard: {in_words(error)} (process {state.process_index})")
    finally:
        state.destroy_process_group()


def run(args: argparse.Namespace, words: list[str], state: PartialState) -> None:
    """One evaluation; data first, so that what is missing shows before the model is loaded."""
    started = time.perf_counter()
    batch_size = args.batch_size if args.batch_size == "auto" else positive("--batch-size", args.batch_size)
    limit = None if args.limit is None else positive("--limit", args.limit)
    suite = named_suite(args.suite, args.num_fewshot)
    if args.only:
        suite = select(suite, args.only.split(","))
    loaded = load_suite(suite, args.data_dir)
    check_held_out(args.model, loaded.suite)
    model, tokenizer = load_model(args.model, **({"dtype": args.dtype} if args.dtype else {}))
    lm = SplitLM(model.to(state.device), tokenizer, batch_size, state)
    described = describe_model(model, args.model, lm.max_length)
    settings = {
        "suite": loaded.suite.name,
        "tasks": list(loaded.tasks),
        "num_fewshot": {name: task.get_config("num_fewshot") for name, task in loaded.tasks.items()},
        "limit": limit,
        "data": loaded.data,
        "model": described["sha256"],
    }
    state.wait_for_everyone()  # nobody reads what somebody else has begun to write
    file = ResultFile(output_path(args), settings, args.resume, state.is_main_process)
    state.wait_for_everyone()
    for number, (name, task) in enumerate(loaded.tasks.items(), start=1):
        if name not in file.leaves:
            logger.info("%d/%d: %s", number, len(loaded.tasks), name)
            file.add(name, *evaluate_task(lm, name, task, limit))
    result = file.finish(
        loaded.suite,
        described,
        limit=limit,
        batch_size=lm.batch_size,
        num_processes=state.num_processes,
        seconds=time.perf_counter() - started,
        command=shlex.join(["eval/leaderboard.py", *words]),
    )
    logger.info("%s\nwrote %s", table(result), file.path)


def output_path(args: argparse.Namespace) -> Path:
    """--output, or a name in the model's folder."""
    if args.output:
        return Path(args.output)
    if not Path(args.model).is_dir():
        raise ValueError("--output is needed for a model that is not a local folder")
    return Path(args.model) / f"eval_{args.suite.replace(',', '+')}.json"


def positive(option: str, text: str | int) -> int:
    """A whole number of at least 1."""
    if not str(text).isdigit() or int(text) < 1:
        raise ValueError(f"{option} must be a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main(sys.argv[1:])
