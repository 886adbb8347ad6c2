"""Download the data sets of a suite into a folder for `leaderboard.py --data-dir`.

python eval/fetch_data.py --data-dir DIR --suite v1

The work is done in sparseift_llm/evaluation/fetch_command.py.
"""

from __future__ import annotations

import sys

from sparseift_llm.evaluation.fetch_command import main

if __name__ == "__main__":
    main(sys.argv[1:])
