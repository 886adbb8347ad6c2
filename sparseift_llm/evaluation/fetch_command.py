"""The command line that downloads the data sets of a suite: eval/fetch_data.py and `sparseift fetch-data`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from sparseift_llm.evaluation.hub import fetch, fetch_sentence_splitter
from sparseift_llm.evaluation.task_loading import named_suite, requirements_of
from sparseift_llm.utils.outputs import in_words, user_path

logger = logging.getLogger("fetch_data")

DESCRIPTION = """Download the data sets of a suite into a folder for `sparseift evaluate --data-dir`.

    sparseift fetch-data --data-dir DIR --suite v1
"""


def main(words: Sequence[str], program: str = "eval/fetch_data.py") -> None:
    """Fetch what the suite needs, or only the data sets named.

    Args:
        words: the command line without the program's name.
        program: how the program is called, for its help.

    Raises:
        SystemExit: a mistake of the user's, in words.
    """
    parser = argparse.ArgumentParser(
        program, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True, help="made if need be")
    parser.add_argument("--suite", help="v1, v2, or comma-separated lm-eval tasks; default: v1 and v2")
    parser.add_argument("--datasets", nargs="+", help="hub names: fetch only these of the suite's")
    parser.add_argument("--include-path", metavar="DIR", help="a folder with more lm-eval tasks")
    args = parser.parse_args(list(words))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        data_dir = user_path(args.data_dir)
        include_path = None if args.include_path is None else user_path(args.include_path)
        suites = [named_suite(name) for name in ([args.suite] if args.suite else ["v1", "v2"])]
        needed = [item for suite in suites for item in requirements_of(suite, include_path)]
        unknown = sorted(set(args.datasets or ()) - {item.dataset for item in needed})
        if unknown:
            raise ValueError(f"no task of the suite reads {unknown[0]}; give --suite with the task that does")
        wanted = [item for item in needed if not args.datasets or item.dataset in args.datasets]
        for path in fetch(data_dir, wanted):
            logger.info("wrote %s", path)
        if any(item.dataset == "wis-k/instruction-following-eval" for item in wanted):
            fetch_sentence_splitter(data_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"fetch_data: {in_words(error)}")
