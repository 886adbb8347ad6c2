"""Download the data sets of a suite into a folder for `leaderboard.py --data-dir`.

python eval/fetch_data.py --data-dir DIR --suite v1
"""

from __future__ import annotations

import argparse
import logging
import sys

from sparseift_llm.evaluation.harness import named_suite, requirements_of
from sparseift_llm.evaluation.hub import fetch, fetch_sentence_splitter
from sparseift_llm.utils.outputs import in_words

logger = logging.getLogger("fetch_data")


def main(words: list[str]) -> None:
    """Fetch what the suite needs, or only the data sets named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="made if need be")
    parser.add_argument("--suite", help="v1, v2, or comma-separated lm-eval tasks; default: v1 and v2")
    parser.add_argument("--datasets", nargs="+", help="hub names: fetch only these of the suite's")
    args = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        suites = [named_suite(name) for name in ([args.suite] if args.suite else ["v1", "v2"])]
        needed = [item for suite in suites for item in requirements_of(suite)]
        unknown = sorted(set(args.datasets or ()) - {item.dataset for item in needed})
        if unknown:
            raise ValueError(f"no task of the suite reads {unknown[0]}; give --suite with the task that does")
        wanted = [item for item in needed if not args.datasets or item.dataset in args.datasets]
        for path in fetch(args.data_dir, wanted):
            logger.info("wrote %s", path)
        if any(item.dataset == "wis-k/instruction-following-eval" for item in wanted):
            fetch_sentence_splitter(args.data_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"fetch_data: {in_words(error)}")


if __name__ == "__main__":
    main(sys.argv[1:])
