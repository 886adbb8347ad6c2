"""The command line that compares evaluations of several models: eval/compare.py and `sparseift compare`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sparseift_llm.evaluation.comparison import COMPARISON_BEGINNING, compare, read_arm
from sparseift_llm.evaluation.comparison_table import markdown
from sparseift_llm.utils.files import write_json, write_text
from sparseift_llm.utils.outputs import in_words, refuse_foreign, user_path

DESCRIPTION = """Compare evaluations of several models, dense against sparse, with intervals over items and seeds.

    sparseift compare dense/eval_v1.json sparse/eval_v1.json
    sparseift compare dense=d0.json,d1.json,d2.json sparse=s0.json,s1.json,s2.json --output runs/comparison

A comma joins the files of several training seeds. The first model is what the others are compared to.
"""


def main(words: Sequence[str]) -> None:
    """Print the comparison; with --output, write it as .md and .json.

    Args:
        words: the command line without the program's name.

    Raises:
        SystemExit: a mistake of the user's, in words.
    """
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="F.json, or [name=]F.json,G.json for several seeds")
    parser.add_argument("--output", help="write OUTPUT.md and OUTPUT.json")
    parser.add_argument("--samples", type=int, default=2000, help="resamples of the items (default 2000)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default 0.95)")
    args = parser.parse_args(list(words))
    outputs = [user_path(args.output).with_suffix(suffix) for suffix in (".json", ".md")] if args.output else []
    try:
        refuse_foreign(outputs, COMPARISON_BEGINNING, "sparseift compare")
        found = compare([read_arm(text) for text in args.files], args.samples, args.confidence)
        text = markdown(found)
        print(text)
        if outputs:
            write_json(outputs[0], found)
            write_text(outputs[1], text)
    except (ValueError, OSError) as error:
        sys.exit(f"compare: {in_words(error)}")
