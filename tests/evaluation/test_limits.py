"""Models with a short context: all that does not fit is said before the first task runs, the rest is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm.evaluation import command
from sparseift_llm.evaluation.language_model import SplitLM
from sparseift_llm.evaluation.limits import tasks_too_long
from sparseift_llm.evaluation.options import EvaluationOptions
from tests.helpers.evaluation import (
    QUIZ_TASKS,
    own_tasks_only,
    quiz_rows,
    quiz_suite,
    quiz_words_of,
    save_model,
    tiny_gpt2,
    tokenizer,
    write_quiz,
)

LONG = " ".join(["winter"] * 80)
# task -> what is done to a row, or to the task's file, so that it does not fit a context of 64, and why it does not
LONG_ANSWER = r"item 5 has an answer of \d+ tokens, more than the model's context of 64"
NO_ROOM = "generates up to 64 tokens, which leaves no room for a prompt in the context of 64"
TOO_LONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "quiz_choice": ({"choices": ["stone", LONG, "river"]}, "", LONG_ANSWER),
    "quiz_template": ({"choices": [LONG, "lamp", "river"]}, "", LONG_ANSWER),
    "quiz_cloze": ({"answer": LONG}, "", LONG_ANSWER),
    "quiz_words": ({}, "max_gen_toks: 64", NO_ROOM),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), num_positions=64)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "named_suite", own_tasks_only)


def make_too_long(folder: Path, task: str) -> Path:
    changes, generation, _ = TOO_LONG[task]
    rows = quiz_rows(8, 1)
    rows[5].update(changes)
    write_quiz(folder, "jsonl", {"train": quiz_rows(8), "test": rows})
    if generation:
        path = folder / "tasks" / f"{task}.yaml"
        path.write_text(path.read_text().replace("max_gen_toks: 8", generation))
    return folder


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


@pytest.mark.parametrize("task", list(TOO_LONG))
def test_what_does_not_fit_is_said_before_anything_runs(
    model: Path, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_too_long(tmp_path, task)
    asked: list[str] = []
    monkeypatch.setattr(command, "evaluate_task", lambda lm, name, *rest, **options: asked.append(name))
    words = ["--model", str(model), *quiz_words_of(folder), "--output", str(tmp_path / "f.json")]
    with pytest.raises(
        SystemExit, match=rf"tasks do not fit the model:\n  (?s:.*){task}: {TOO_LONG[task][2]}"
    ) as raised:
        command.main(words)
    assert "leave them out with --skip-too-long, or evaluate a model with a longer context" in str(raised.value)
    assert asked == []
    lm = SplitLM(tiny_gpt2(64), tokenizer(), 4)
    tasks = quiz_suite(folder, task).tasks
    assert list(tasks_too_long(lm, tasks, EvaluationOptions())) == [task]
    first = EvaluationOptions(limit=5)  # which leaves out the long item, but not a task that generates too much
    assert list(tasks_too_long(lm, tasks, first)) == ([task] if task == "quiz_words" else [])
    chosen = EvaluationOptions(samples={task: [5, 6]})
    assert list(tasks_too_long(lm, tasks, chosen)) == [task]
    assert tasks_too_long(SplitLM(tiny_gpt2(384), tokenizer(), 4), tasks, EvaluationOptions()) == {}


@pytest.mark.parametrize("task", ["quiz_cloze", "quiz_words"])
def test_tasks_that_do_not_fit_can_be_left_out(
    model: Path, tmp_path: Path, task: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_too_long(tmp_path, task)
    output = tmp_path / "f.json"
    words = ["--model", str(model), *quiz_words_of(folder), "--output", str(output), "--skip-too-long"]
    with caplog.at_level("INFO"):
        command.main(words)
    found = read(output)
    kept = [name for name in QUIZ_TASKS if name != task]
    assert list(found["subtasks"]) == kept
    assert list(found["left_out"]) == [task]
    assert f"| {task} |  |  |  |  | left out |  |  |" in caplog.text
    assert f"{task} was left out: {found['left_out'][task]}." in caplog.text
    assert found["averages"] == {"average": kept}


def test_nothing_that_fits_is_an_error(model: Path, tmp_path: Path) -> None:
    folder = make_too_long(tmp_path, "quiz_words")
    words = ["--model", str(model), *quiz_words_of(folder, "quiz_words"), "--output", str(tmp_path / "f.json")]
    with pytest.raises(SystemExit, match="none of the tasks fits the model:\n  quiz_words: generates up to 64"):
        command.main([*words, "--skip-too-long"])


def test_a_suite_keeps_no_headline_that_lacks_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """IFEval and MATH need longer contexts: their headlines and the average go, the others stay."""
    from sparseift_llm.evaluation.suites import V2, without

    smaller, dropped = without(V2, ["leaderboard_ifeval", "leaderboard_math_algebra_hard"])
    assert dropped == ["leaderboard_ifeval", "leaderboard_math_hard"]
    assert not {"leaderboard_ifeval", "leaderboard_math_geometry_hard"} & set(smaller.tasks())
    assert smaller.averages == {}
    assert {line.name for line in V2.headlines} - {line.name for line in smaller.headlines} == set(dropped)


def test_finished_tasks_are_kept_when_one_turns_out_too_long(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out only while it runs, as the answer is one token longer after its prompt."""
    folder = make_too_long(tmp_path, "quiz_cloze")
    words = ["--model", str(model), *quiz_words_of(folder), "--output", str(tmp_path / "f.json")]
    stock, asked = command.evaluate_task, []

    def evaluate(lm: Any, name: str, *rest: Any, **options: Any) -> Any:
        asked.append(name)
        return stock(lm, name, *rest, **options)

    monkeypatch.setattr(command, "evaluate_task", evaluate)
    monkeypatch.setattr(command, "tasks_too_long", lambda *_: {})
    with pytest.raises(SystemExit, match=r"item 5 of quiz_cloze has an answer of .*--resume --skip-too-long"):
        command.main(words)
    assert asked == ["quiz_choice", "quiz_template", "quiz_words", "quiz_cloze"]
    finished = read(tmp_path / "f.progress.json")["subtasks"]
    command.main([*words, "--resume", "--skip-too-long"])
    assert asked[4:] == ["quiz_cloze"]
    found = read(tmp_path / "f.json")
    assert found["subtasks"] == finished
    assert "item 5 of quiz_cloze" in found["left_out"]["quiz_cloze"]


def test_fewer_tasks_go_on_with_the_finished_ones(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_quiz(tmp_path)
    shared = ["--model", str(model), "--output", str(tmp_path / "f.json"), "--limit", "3"]
    command.main([*shared, *quiz_words_of(folder, "quiz_choice,quiz_words")])
    before = read(tmp_path / "f.json")
    asked: list[str] = []
    stock = command.evaluate_task
    monkeypatch.setattr(command, "evaluate_task", lambda lm, n, *r, **o: (asked.append(n), stock(lm, n, *r, **o))[1])
    command.main([*shared, *quiz_words_of(folder, "quiz_words,quiz_cloze,quiz_choice"), "--resume"])
    assert asked == ["quiz_cloze"]
    after = read(tmp_path / "f.json")
    assert {name: after["subtasks"][name] for name in before["subtasks"]} == before["subtasks"]
    with pytest.raises(SystemExit, match=r"f.json holds quiz_words, quiz_choice, which would be lost; ask for these"):
        command.main([*shared, *quiz_words_of(folder, "quiz_cloze"), "--resume"])


@pytest.mark.parametrize("shots", [0, 6])
def test_truncated_prompts_are_counted(
    model: Path, tmp_path: Path, shots: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_quiz(tmp_path)
    output = tmp_path / "f.json"
    names = "quiz_choice,quiz_words,quiz_cloze"
    words = ["--model", str(model), *quiz_words_of(folder, names), "--num-fewshot", str(shots), "--output", str(output)]
    with caplog.at_level("INFO"):
        command.main(words)
    found = read(output)
    for task in names.split(","):
        (path,) = (tmp_path / "f.lm_eval").rglob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        room = 64 - 8 if task == "quiz_words" else 64
        too_long = {
            sample["doc_id"]: [n for n in map(len_of, sample["arguments"].values()) if n > room] for sample in samples
        }
        items, prompts = sum(map(bool, too_long.values())), sum(map(len, too_long.values()))
        leaf = found["subtasks"][task]
        assert (leaf["truncated_items"], leaf["truncated_prompts"]) == (items, prompts)
        assert (found["results"][task]["truncated_items"], items > 0) == (items, shots == 6)
        records = [json.loads(line) for line in (tmp_path / "f.items" / f"{task}.jsonl").read_text().splitlines()]
        assert [record["cut_tokens"] for record in records] == [
            max((n - room for n in too_long[record["id"]]), default=0) for record in records
        ]
        assert f"| {task} |" in caplog.text
    warned = "the prompts of 12 of 12 items are longer than the model's context and lost their beginning"
    assert caplog.text.count(warned) == (3 if shots else 0)
    assert ("lost its beginning, examples first" in caplog.text) == bool(shots)


def len_of(arguments: dict[str, Any]) -> int:
    """Tokens that the model has to see: all of the prompt, and of the answer all but the last."""
    prompt, answer = arguments["arg_0"], arguments["arg_1"]
    if isinstance(answer, dict):  # settings of the text to generate
        return len(tokenizer()(prompt)["input_ids"])
    return len(tokenizer()(prompt + answer)["input_ids"]) - 1


@pytest.mark.parametrize(("context", "expected"), [(64, 32), (256, 128), (257, 256), (384, 256)])
def test_answers_are_as_long_as_in_lm_eval_or_it_is_said(
    tmp_path: Path, context: int, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_quiz(tmp_path)
    path = folder / "tasks" / "quiz_words.yaml"
    path.write_text(path.read_text().replace("  max_gen_toks: 8\n", ""))
    words = ["--model", str(save_model(tmp_path / "model", num_positions=context)), "--limit", "1"]
    output = tmp_path / "f.json"
    with caplog.at_level("INFO"):
        command.main([*words, *quiz_words_of(folder, "quiz_words"), "--output", str(output)])
    found = read(output)
    assert found["subtasks"]["quiz_words"]["max_gen_toks"] == expected
    assert found["shortened_answers"] == ({"quiz_words": expected} if expected < 256 else {})
    assert (f"Answers to quiz_words end after {expected} tokens, half of the model's" in caplog.text) == (
        expected < 256
    )
