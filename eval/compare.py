"""Compare evaluations of several models, dense against sparse, with paired bootstrap intervals.

    python eval/compare.py dense/eval_v1.json sparse/eval_v1.json
    python eval/compare.py dense=d0.json,d1.json sparse=s0.json,s1.json --output runs/comparison

A comma joins the files of several training seeds. The first model is what the others are compared to.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparseift_llm.evaluation.comparison import COMPARISON_BEGINNING, compare, markdown, read_arm
from sparseift_llm.utils.files import write_json, write_text
from sparseift_llm.utils.outputs import in_words, refuse_foreign


def main(words: list[str]) -> None:
    """Print the comparison; with --output, write it as .md and .json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="F.json, or [name=]F.json,G.json for several seeds")
    parser.add_argument("--output", help="write OUTPUT.md and OUTPUT.json")
    parser.add_argument("--samples", type=int, default=2000, help="bootstrap samples (default 2000)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default 0.95)")
    args = parser.parse_args(words)
    outputs = [Path(args.output).with_suffix(suffix) for suffix in (".json", ".md")] if args.output else []
    try:
        refuse_foreign(outputs, COMPARISON_BEGINNING, "eval/compare.py")
        found = compare([read_arm(text) for text in args.files], args.samples, args.confidence)
        text = markdown(found)
        print(text)
        if outputs:
            write_json(outputs[0], found)
            write_text(outputs[1], text)
    except (ValueError, OSError) as error:
        sys.exit(f"compare: {in_words(error)}")


if __name__ == "__main__":
    main(sys.argv[1:])
