"""The README: short, with a picture of what it is, a script that does what it says, and figures from result files."""

from __future__ import annotations

import re

from tests.docs.does_it_pay import BETWEEN, MAX_ROWS, table
from tests.docs.page_blocks import blocks_of
from tests.helpers.pages import PAGES
from tests.helpers.paths import ROOT

README = PAGES["README.md"]
MAX_WORDS = 900
SECTIONS = [
    "Does it pay?", "Install", "A complete script", "Choose", "Your own text, in one command", "Load, generate, export",
    "Evaluate and report", "Many GPUs", "Limits", "Links",
]  # fmt: skip


def test_it_is_short() -> None:
    assert len(README.split()) <= MAX_WORDS


def test_it_answers_a_newcomers_questions_in_their_order() -> None:
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == SECTIONS
    assert README.index("![") < README.index("## Does it pay?")
    limits = README.partition("## Limits")[2].partition("\n## ")[0]
    assert len(re.findall(r"^- ", limits, re.MULTILINE)) == 5


def test_the_table_of_what_pays_is_made_from_result_files() -> None:
    found = BETWEEN.search(README)
    assert found is not None
    assert found[0] == table(), "run python -m tests.docs.does_it_pay"
    assert len(found[0].splitlines()) - 2 <= MAX_ROWS


def test_a_figure_that_was_changed_by_hand_is_caught() -> None:
    changed = README.replace("1.29x", "0.29x", 1)
    assert BETWEEN.search(changed)[0] != table()  # type: ignore[index]


def test_what_choosing_promises_is_what_the_table_says() -> None:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table().splitlines()[2:]]
    losses = {
        row[0].removesuffix(" (within noise)"): [float(number) for number in row[1].split(" → ")]
        for row in rows
        if "→" in row[1]
    }
    rows_of_goals = {
        "equal_flops": [f"`scope: ffn`, 50%, {corpus}" for corpus in ("builtin", "novels")],
        "balanced": ["`scope: model`, tiles, 8 per side"],
        "lowest_loss": ["`scope: model`, single weights"],
    }
    for goal, titles in rows_of_goals.items():
        gained = " to ".join(f"{losses[title][0] - losses[title][1]:.2f}" for title in titles)
        line = next(line for line in README.splitlines() if line.startswith(f"| `{goal}`"))
        assert f"{gained} nats lower" in line, goal


def test_the_script_trains_a_sparse_model_with_few_lines_of_ours() -> None:
    """tests/docs/test_pages.py runs it, and compares what it prints."""
    script = next(block.code for block in blocks_of(README) if "trainer.train()" in block.code)
    ours = [
        line for line in script.splitlines() if re.search(r"sparseift_llm|sparsify\(|SparseTrainingCallback\(", line)
    ]
    assert len(ours) == 3


def test_continuous_integration_runs_its_command_for_tests() -> None:
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
