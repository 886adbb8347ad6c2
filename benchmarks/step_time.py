"""Dense, masked and block-sparse layers and training steps, timed side by side: `sparseift bench` as a script.

python benchmarks/step_time.py --json
"""

from __future__ import annotations

import sys

from sparseift_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
