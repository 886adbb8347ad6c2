"""The help on the keys of a recipe: complete, and the same as what the classes say that it does without."""

from __future__ import annotations

import dataclasses
import json

import pytest
from transformers import TrainingArguments

from sparseift_llm.cli import main
from sparseift_llm.runs.recipe import recipe_options
from sparseift_llm.runs.recipe_help import recipe_help, trainer_options
from sparseift_llm.runs.recipe_training import training_options
from tests.helpers.processes import median_cpu_seconds, output_of

HELP = "from sparseift_llm.cli import main\ntry:\n    main(['pretrain', '--help'])\nexcept SystemExit:\n    pass\n"
SUM = "total = 0\nfor number in range(5_500_000):\n    total += number\n"


def test_help_of_pretrain_lists_every_key_with_its_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    printed = capsys.readouterr().out
    entries = {line.split()[0]: line for line in printed.splitlines() if line.startswith("  --")}
    sections = {"model", "data", "training"}
    assert set(entries) - {"--help", "--dry-run"} == {f"--{option.name}" for option in recipe_options()} - {
        f"--{section}" for section in (*sections, "sparse_ift")
    }
    assert "  --sparse_ift.sparsity  float in [0, 1); " in printed
    assert "Share of the documents held out where there is no separate held-out text" in printed
    for title in (*sections, "sparse_ift"):
        assert f"\n\n{title}: " in printed


def test_fields_of_the_trainer_are_those_of_the_class() -> None:
    read = {option.name: option for option in trainer_options()}
    told = {option.name: option for option in training_options()}
    fields = {f"training.{field.name}": field for field in dataclasses.fields(TrainingArguments) if field.init}
    assert list(read) == list(fields)
    for name, option in read.items():
        assert told[name].meaning.startswith(option.meaning)
        assert bool(option.meaning) == bool(told[name].meaning)
        default = fields[name].default
        if default is not dataclasses.MISSING and option.default not in ("default_optim",):
            assert option.default == json.dumps(default), name
    assert read["training.learning_rate"].type == told["training.learning_rate"].type == "float, at least 0"
    assert read["training.save_total_limit"].type == told["training.save_total_limit"].type
    assert read["training.optim"].default == "default_optim"  # which depends on the version of torch


def test_help_of_pretrain_needs_no_library_and_little_time() -> None:
    """Less than Python takes to add up 5.5 million numbers, which is about half a second, on a slow machine more."""
    output_of(HELP + "import sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sys.modules\n")
    seconds = median_cpu_seconds({"help": HELP, "sum": SUM}, repeats=5)
    assert seconds["help"] <= seconds["sum"]


def test_no_line_of_the_help_is_wider_than_its_page() -> None:
    assert max(map(len, recipe_help().splitlines())) <= 110
