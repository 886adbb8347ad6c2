"""The program `sparseift`: help, version, unknown commands, and a file per command, imported when asked for."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import sparseift_llm.cli
from sparseift_llm.cli import main
from sparseift_llm.cli.program import COMMANDS
from tests.helpers.pretrain_runs import RIGL, read_json, tiny_recipe
from tests.helpers.processes import median_cpu_seconds, output_of

PROGRAM = str(Path(sys.executable).with_name("sparseift"))
NO_LIBRARY = "import sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sys.modules\n"


def printed_by_exiting(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """What the program prints before argparse ends it."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == status
    printed = capsys.readouterr()
    return printed.err if status else printed.out


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    # `true` ends before anything is printed
    command = f"set -o pipefail; {PROGRAM} plan --model gpt3-small --sparsity 0.75 | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_file_is_a_command_and_every_command_has_a_file() -> None:
    files = {path.stem for path in Path(sparseift_llm.cli.__file__).parent.glob("*.py")}
    assert files - {"__init__", "program"} == {command.module for command in COMMANDS.values()}
    for command in COMMANDS.values():
        module = command.load()
        assert hasattr(module, "add_arguments") != command.is_foreign  # which parses its words by itself
        assert callable(module.run)


def test_help_has_one_line_per_command_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    printed = printed_by_exiting(capsys, "--help")
    lines = [line.split(maxsplit=1) for line in printed.splitlines() if line]
    for command in COMMANDS.values():
        assert [command.name, command.help] in lines
        assert len(command.help) <= 80
    examples = [line.split() for line in printed.splitlines() if line.startswith("  sparseift ")]
    assert len(examples) >= 2
    assert all(words[1] in COMMANDS for words in examples)


@pytest.mark.parametrize("name", ["evaluate", "fetch-data"])
def test_help_of_a_command_line_that_scripts_share_has_the_commands_name(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    printed = printed_by_exiting(capsys, name, "--help")
    assert printed.startswith(f"usage: sparseift {name} ")
    assert "--suite" in printed


def test_a_script_that_ends_with_a_message_is_a_refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--data-dir", str(tmp_path), "--suite", "v1", "--datasets", "no/such"]
    assert main(["fetch-data", *words]) == 2
    assert capsys.readouterr().err == (
        "sparseift: fetch_data: no task of the suite reads no/such; give --suite with the task that does\n"
    )


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not command.is_foreign])
def test_help_of_a_command_describes_it(capsys: pytest.CaptureFixture[str], name: str) -> None:
    printed = printed_by_exiting(capsys, name, "--help")
    assert printed.startswith(f"usage: sparseift {name} ")
    assert str(COMMANDS[name].load().__doc__).splitlines()[0] in printed


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sparseift {version('sparseift_llm')}\n"


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    printed = printed_by_exiting(capsys, "repotr", "run", status=2)
    assert "'repotr' is not one of plan, " in printed
    assert "did you mean 'report'?" in printed
    assert "give a command: plan, " in printed_by_exiting(capsys, status=2)


def test_help_and_version_import_no_library() -> None:
    program = "from sparseift_llm.cli import main\ntry:\n    main([{word!r}])\nexcept SystemExit:\n    pass\n"
    for word in ("--help", "--version", "paln"):
        output_of(program.format(word=word) + NO_LIBRARY)
    for name in COMMANDS:  # the files of commands leave libraries to `run`
        output_of(f"from sparseift_llm.cli.program import COMMANDS\nCOMMANDS[{name!r}].load()\n" + NO_LIBRARY)


def test_help_takes_half_a_second_at_most() -> None:
    program = "import sys; from sparseift_llm.cli import main; sys.argv = ['sparseift', '--help']; main()"
    assert median_cpu_seconds({"help": program}, repeats=5)["help"] <= 0.5


# ---- pretrain


def test_pretrain_trains_a_recipe_in_one_process(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, RIGL, save_strategy="no")
    words = ["pretrain", str(recipe), "--max_steps", "2", "--learning_rate=0.02"]
    done = subprocess.run([PROGRAM, *words], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["step"] == 2
    assert summary["config"]["training"]["learning_rate"] == 0.02
    assert summary["command"] == " ".join(["sparseift", *words])
    assert f"eval loss {summary['eval_loss']:.4f}; wrote {tmp_path / 'run' / 'summary.json'}" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rte", "1"], "unknown option --learning_rte; did you mean 'learning_rate'?"),
        (["--learning_rate"], "--learning_rate needs a value"),
        (["more"], "expected --field value, got 'more'"),
        (["--sparse_ift.sparsity", "-1"], "sparse_ift.sparsity must be in [0, 1), got -1.0"),
    ],
)
def test_pretrain_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["pretrain", str(tiny_recipe(tmp_path)), *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"sparseift: {message}")
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_training_itself_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("a tensor of the wrong shape")

    monkeypatch.setattr("sparseift_llm.runs.pretrain.train", fail)
    with pytest.raises(RuntimeError, match="failed: a tensor of the wrong shape"):
        main(["pretrain", str(tiny_recipe(tmp_path))])
