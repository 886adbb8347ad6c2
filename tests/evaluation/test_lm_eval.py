"""lm-eval's own command line on our checkpoints, and our results in lm-eval's own format: equal to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.registry import get_model

from sparseift_llm.cli import program
from sparseift_llm.evaluation import command, lm_eval_command, lm_eval_files
from sparseift_llm.evaluation.lm_eval_model import SparseIFTLM
from sparseift_llm.utils.files import write_json
from tests.helpers.evaluation import own_tasks_only, quiz_words_of, save_model, tiny_gpt2, tokenizer, write_quiz
from tests.helpers.paths import ROOT

TILES: dict[str, Any] = {"sparsity": 0.75, "init": "paper", "structure": "block", "block_size": 16}
TASKS = "quiz_choice,quiz_words,quiz_cloze,quiz_template"
SECONDS = 280  # a hang is a failure
# What lm-eval knows and cannot be the same in another process or at another time.
INCIDENTAL = {
    "date", "total_evaluation_time_seconds", "pretty_env_info", "git_hash", "upper_git_hash", "config", "model_name",
    "model_name_sanitized", "start_time", "end_time",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "named_suite", own_tasks_only)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_quiz(tmp_path_factory.mktemp("quiz"))
    save_model(folder / "tiles", sparse_ift=TILES)
    group = {"group": "quiz", "task": ["quiz_choice", "quiz_template"], "aggregate_metric_list": [{"metric": "acc"}]}
    write_json(folder / "tasks" / "group.yaml", {**group, "metadata": {"version": 1.0}})  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Path:
    """The output folder of `sparseift lm-eval` as a process, on a checkpoint with tiles."""
    words = [
        "lm-eval", "run", "--model_args", f"pretrained={folder / 'tiles'}", "--device", "cpu", "--tasks",
        "quiz,quiz_words,quiz_cloze", "--num_fewshot", "2", "--batch_size", "1", "--seed", "0,1234,1234,77",
        "--include_path", str(folder / "tasks"), "--log_samples", "--output_path", str(folder / "theirs"),
    ]  # fmt: skip
    code = "import sys; from sparseift_llm.cli.program import main; sys.exit(main())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder / "data", env=environment, capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|quiz_words" in done.stdout
    return folder / "theirs"


@pytest.fixture(scope="module")
def ours(folder: Path) -> Path:
    """F.json of our script with the same settings."""
    output = folder / "ours.json"
    words = [
        "--model",
        str(folder / "tiles"),
        *quiz_words_of(folder, "quiz,quiz_words,quiz_cloze"),
        "--batch-size",
        "1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "named_suite", own_tasks_only)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        command.main([*words, "--num-fewshot", "2", "--seed", "0,1234,1234,77", "--output", str(output)])
        torch.set_num_threads(threads)
    return output


def results_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("results_*.json")
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def samples_of(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sparseift_lm_eval_scores_a_checkpoint_of_tiles_as_our_script_does(theirs: Path, ours: Path) -> None:
    stock, found = results_of(theirs), json.loads(ours.read_text())
    assert set(found["subtasks"]) == set(TASKS.split(","))
    for task, leaf in found["subtasks"].items():
        expected = {k: v for k, v in stock["results"][task].items() if "," in k and not isinstance(v, str)}
        assert leaf["metrics"] == expected, task
        assert leaf["task_hash"] == stock["task_hashes"][task]
    assert found["results"]["quiz"]["value"] == pytest.approx(stock["results"]["quiz"]["acc,none"], abs=1e-15)


def test_our_files_in_lm_evals_format_equal_its_own(theirs: Path, ours: Path) -> None:
    stock, found = results_of(theirs), results_of(ours.with_suffix(".lm_eval"))
    assert found.keys() == stock.keys()
    for key in stock.keys() - INCIDENTAL - {"configs"}:
        assert found[key] == stock[key], key
    assert found["config"].keys() == stock["config"].keys()
    assert "groups" in stock
    for task in TASKS.split(","):
        kept = {k: v for k, v in stock["configs"][task].items() if k not in ("metadata", "task")}
        assert {k: found["configs"][task][k] for k in kept} == kept
        assert samples_of(ours.with_suffix(".lm_eval"), task) == samples_of(theirs, task)
    sample = samples_of(ours.with_suffix(".lm_eval"), "quiz_choice")[0]
    assert sample["doc"]["question"] in sample["arguments"]["gen_args_0"]["arg_0"]
    names = {path.name for path in ours.with_suffix(".lm_eval").rglob("*.json*")}
    assert len({name.rpartition("_")[2].removesuffix(".json").removesuffix(".jsonl") for name in names}) == 1


def test_a_resumed_evaluation_writes_the_same_lm_eval_files(folder: Path, ours: Path) -> None:
    output = folder / "resumed.json"
    for names, more in (("quiz_words", []), ("quiz,quiz_words,quiz_cloze", ["--resume"])):
        words = ["--model", str(folder / "tiles"), *quiz_words_of(folder, names), "--batch-size", "1", *more]
        command.main([*words, "--num-fewshot", "2", "--seed", "0,1234,1234,77", "--output", str(output)])
    once, twice = results_of(ours.with_suffix(".lm_eval")), results_of(output.with_suffix(".lm_eval"))
    for key in once.keys() - INCIDENTAL:
        assert twice[key] == once[key], key
    for task in TASKS.split(","):
        assert samples_of(output.with_suffix(".lm_eval"), task) == samples_of(ours.with_suffix(".lm_eval"), task)


def test_samples_can_be_left_out(folder: Path) -> None:
    output = folder / "small.json"
    words = ["--model", str(folder / "tiles"), *quiz_words_of(folder, "quiz_cloze"), "--limit", "2"]
    command.main([*words, "--no-log-samples", "--output", str(output)])
    assert [path.name[:8] for path in output.with_suffix(".lm_eval").rglob("*.json*")] == ["results_"]


def test_lm_evals_options_are_passed_on(folder: Path) -> None:
    """Each changes prompts, items or answers; lm-eval's files say how the suite was asked."""
    found = {}
    cases = {
        "plain": [],
        "seed": ["--seed", "0,1234,1234,5"],
        "system": ["--system-instruction", "Answer in a word."],
        "samples": ["--samples", '{"quiz_words": [7, 2]}'],
        "generated": ["--gen-kwargs", "max_gen_toks=2"],
        "share": ["--limit", "0.25"],
    }
    for name, words in cases.items():
        output = folder / f"option_{name}.json"
        shared = ["--model", str(folder / "tiles"), *quiz_words_of(folder, "quiz_words"), "--num-fewshot", "1"]
        command.main([*shared, *words, "--output", str(output)])
        found[name] = json.loads(output.read_text())
    hashes = {name: values["subtasks"]["quiz_words"]["task_hash"] for name, values in found.items()}
    assert hashes["generated"] == hashes["plain"]
    assert len({hashes[name] for name in ("plain", "seed", "system", "samples", "share")}) == 5
    assert found["generated"]["subtasks"]["quiz_words"]["max_gen_toks"] == 2
    assert found["share"]["subtasks"]["quiz_words"]["num_items"] == 3
    items = [json.loads(line) for line in (folder / "option_samples.items/quiz_words.jsonl").read_text().splitlines()]
    assert [item["id"] for item in items] == [2, 7]
    sample = samples_of(folder / "option_system.lm_eval", "quiz_words")[0]
    assert sample["arguments"]["gen_args_0"]["arg_0"].startswith("Answer in a word.")
    assert results_of(folder / "option_system.lm_eval")["system_instruction"] == "Answer in a word."
    assert results_of(folder / "option_seed.lm_eval")["config"]["fewshot_seed"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", '{"quiz_words": [99]}'], "samples of quiz_words name item 99; it has items 0 to 11"),
        (["--samples", '{"other": [1]}'], "samples name the task 'other'; the suite has quiz_words"),
        (["--samples", "[1]"], "--samples must be a JSON object from tasks to item numbers"),
        (
            ["--samples", '{"quiz_words": [1, 1]}'],
            "samples of quiz_words must be a list of different item numbers of at least 0",
        ),
        (["--samples", '{"quiz_words": [1]}', "--limit", "2"], "limit and samples exclude each other"),
        (["--fewshot-as-multiturn"], "fewshot_as_multiturn needs apply_chat_template"),
        (["--limit", "1.5"], "--limit must be a whole number of at least 1, or a share of the items between 0 and 1"),
        (["--limit", "1.0"], "--limit must be a whole number of at least 1, or a share of the items between 0 and 1"),
        (["--num-fewshot", "-1"], "--num-fewshot must be 0 or more, got -1"),
        (["--include-path", "no/such"], "--include-path no/such is not a folder"),
    ],
)
def test_wrong_options_are_named(folder: Path, words: list[str], message: str) -> None:
    shared = [
        "--model",
        str(folder / "tiles"),
        *quiz_words_of(folder, "quiz_words"),
        "--output",
        str(folder / "x.json"),
    ]
    with pytest.raises(SystemExit, match=f"leaderboard: {message}"):
        command.main([*shared, *words])


def test_shots_for_a_task_that_takes_none_are_refused(folder: Path) -> None:
    path = folder / "tasks" / "quiz_none.yaml"
    text = (folder / "tasks" / "quiz_cloze.yaml").read_text().replace("task: quiz_cloze", "task: quiz_none")
    path.write_text(text + "num_fewshot: 0\n")
    words = ["--model", str(folder / "tiles"), *quiz_words_of(folder, "quiz_cloze,quiz_none"), "--limit", "1"]
    try:
        with pytest.raises(
            SystemExit, match="--num-fewshot cannot be given for quiz_none: lm-eval fixes 0 examples there"
        ):
            command.main([*words, "--num-fewshot", "2", "--output", str(folder / "none.json")])
        command.main([*words, "--num-fewshot", "0", "--output", str(folder / "none.json")])
    finally:
        path.unlink()


def test_every_metric_of_a_named_task_is_shown_with_chance(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [
        "--model",
        str(folder / "tiles"),
        *quiz_words_of(folder, "quiz_choice"),
        "--output",
        str(folder / "m.json"),
    ]
    with caplog.at_level("INFO"):
        command.main(words)
    found = json.loads((folder / "m.json").read_text())
    assert [(name, line["metric"]) for name, line in found["results"].items()] == [
        ("quiz_choice", "acc"),
        ("quiz_choice/acc_norm", "acc_norm"),
    ]
    assert [line["chance"] for line in found["results"].values()] == pytest.approx([1 / 3, 1 / 3])
    assert found["averages"] == {"average": ["quiz_choice"]}
    assert "| quiz_choice/acc_norm | acc_norm | 0 | 12 | 0 |" in caplog.text


def test_a_mean_over_subtasks_is_said(ours: Path) -> None:
    from sparseift_llm.evaluation.results import table

    text = table(json.loads(ours.read_text()))
    assert "| quiz | acc, mean of 2 subtasks, over all items | 2 | 24 |" in text


def test_the_scores_go_to_wandb_by_lm_evals_logger(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Logger:
        def __init__(self, init_args: Any = None, config_args: Any = None) -> None:
            calls.append(init_args)
            self.run = self

        def post_init(self, results: dict[str, Any]) -> None:
            calls.append(sorted(results["results"]))

        def log_eval_result(self) -> None:
            calls.append("logged")

        def finish(self) -> None:
            calls.append("finished")

    monkeypatch.setattr("lm_eval.loggers.WandbLogger", Logger)
    words = ["--model", str(folder / "tiles"), *quiz_words_of(folder, "quiz_cloze"), "--output", str(folder / "w.json")]
    command.main([*words, "--wandb-args", "project=p", "name=n", "--limit", "2"])
    assert calls == [{"project": "p", "name": "n"}, ["quiz_cloze"], "logged", "finished"]


def test_the_hub_is_lm_evals_own_affair(folder: Path) -> None:
    words = ["--model", str(folder / "tiles"), *quiz_words_of(folder, "quiz_cloze"), "--output", str(folder / "h.json")]
    with pytest.raises(SystemExit, match="leaderboard: Hugging Face token is not defined"):
        command.main([*words, "--hf-hub-log-args", "push_results_to_hub=True", "--limit", "2"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tasks", "a"], ["--tasks", "a", "--model", "sparseift"]),
        (["run", "--tasks", "a"], ["run", "--tasks", "a", "--model", "sparseift"]),
        (["--model", "hf"], ["--model", "hf"]),
        (["--model=hf"], ["--model=hf"]),
        (["-M", "hf"], ["-M", "hf"]),
        (["run", "--config", "c.yaml"], ["run", "--config", "c.yaml"]),
        (["--model_args", "pretrained=x"], ["--model_args", "pretrained=x", "--model", "sparseift"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["run", "--help"], ["run", "--help"]),
        ([], []),
    ],
)
def test_our_model_type_is_taken_if_none_is_named(words: list[str], expected: list[str]) -> None:
    assert lm_eval_command.with_model(words) == expected


@pytest.mark.parametrize("kind", ["tiles", "masked", "stock"])
def test_the_model_type_loads_every_checkpoint(tmp_path: Path, kind: str) -> None:
    """Logits are those of the model that was saved."""
    options = {"tiles": TILES, "masked": {"sparsity": 0.75, "init": "paper"}, "stock": None}[kind]
    saved = save_model(tmp_path / "model", sparse_ift=options)
    assert get_model("sparseift") is SparseIFTLM
    lm = SparseIFTLM(pretrained=str(saved), device="cpu", batch_size=1)
    torch.manual_seed(0)
    tokens = torch.randint(len(tokenizer()), (2, 20))
    expected = tiny_gpt2(sparse_ift=options).eval()(tokens).logits
    torch.testing.assert_close(lm.model(tokens).logits, expected)


def test_options_that_sparse_layers_do_not_know_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="model_args peft cannot be used with the Sparse-IFT checkpoint"):
        SparseIFTLM(pretrained=str(folder / "tiles"), device="cpu", peft="adapter")


def test_lost_lm_eval_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not hold lm-eval's results of quiz_words .*; give another --output"):
        lm_eval_files.read_records(tmp_path, ["quiz_words"])


def test_all_words_of_the_command_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[list[str]] = []
    monkeypatch.setattr(lm_eval_command, "main", handed.append)
    assert program.main(["lm-eval", "run", "--help"]) == 0
    assert program.main(["lm-eval", "--limit", "3", "--num-fewshot=2"]) == 0
    assert handed == [["run", "--help"], ["--limit", "3", "--num-fewshot=2"]]
