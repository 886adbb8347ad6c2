"""Data that would make a model look bad, or good: every damage is named with file, row and problem, before a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, array, binary, parquet, string  # type: ignore[import-untyped, unused-ignore]

from sparseift_llm.evaluation import command, item_checks
from sparseift_llm.evaluation.data_files import DataError
from sparseift_llm.evaluation.suites import V1, V2, Headline, Score, select
from sparseift_llm.evaluation.task_loading import load_suite
from tests.helpers.evaluation import (
    QUIZ,
    QUIZ_TASKS,
    own_tasks_only,
    quiz_rows,
    quiz_suite,
    quiz_words_of,
    save_model,
    write_leaderboard_data,
    write_quiz,
)

KINDS = ("jsonl", "parquet")
CHOICES = ("quiz_choice", "quiz_template")
ANSWERS = ("quiz_words", "quiz_cloze")
# MMLU's 57 subjects take long to load; the rule is the same for one of them.
ANATOMY = replace(V1, headlines=(Headline("mmlu", (Score("mmlu_anatomy"),), 5),), averages={})
BAD = 7  # the row that is damaged, counted from 0


def one(**changes: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """Change one row."""
    return lambda rows: rows[BAD].update(changes)


def each(change: Callable[[dict[str, Any]], Any]) -> Callable[[list[dict[str, Any]]], Any]:
    """Change all rows."""
    return lambda rows: [change(row) for row in rows]


def rename(old: str, new: str) -> Callable[[list[dict[str, Any]]], Any]:
    return each(lambda row: row.update({new: row.pop(old)}))


def text_label(row: dict[str, Any]) -> None:
    row["label"] = str(row["label"])


Change = Callable[[list[dict[str, Any]]], Any]
MINUS_ONE = "gold answer is '?-1'?; allowed are 0 to 2"
TOO_LARGE = "gold answer is 3; allowed are 0 to 2"
# kind of damage -> (tasks, what is done to the scored rows, problem, whether all rows have it)
DAMAGE: dict[str, tuple[Sequence[str], Change, str, bool]] = {
    "label renamed": (["quiz_choice"], rename("label", "gold"), "no column 'label', which the task", True),
    "label renamed in a template": (["quiz_template"], rename("label", "gold"), "'label' is undefined", True),
    "labels as text": (["quiz_choice"], each(text_label), "answer is '\\d'; allowed are 0 to 2", True),
    "all labels -1": (CHOICES, each(lambda row: row.update(label=-1)), MINUS_ONE, True),
    "one label -1": (CHOICES, one(label=-1), MINUS_ONE, False),
    "one label too large": (CHOICES, one(label=3), TOO_LARGE, False),
    "one label null": (CHOICES, one(label=None), "gold answer is (null|'None')", False),
    "a choice is null": (CHOICES, one(choices=["stone", None, "river"]), "choice 2 of 3 is null", False),
    "a choice is empty": (CHOICES, one(choices=["stone", "", "river"]), "choice 2 of 3 is empty", False),
    "a choice is missing": (CHOICES, one(choices=["stone"], label=0), "1 choices, .* needs at least 2", False),
    "no choices": (CHOICES, one(choices=[]), "0 choices", False),
    "choices are null": (CHOICES, one(choices=None), "choices are None, not a list", False),
    "choices renamed": (CHOICES, rename("choices", "options"), "cannot use it .* columns are .*'options'", True),
    "question null": (["quiz_template"], one(question=None), "question is null", False),
    "question null in a template": (["quiz_choice", *ANSWERS], one(question=None), "column 'question' is null", False),
    "question renamed": (["quiz_template"], rename("question", "text"), "no column 'question'", True),
    "question renamed, template": (["quiz_choice", *ANSWERS], rename("question", "text"), "'question' is undef", True),
    "answer null": (ANSWERS, one(answer=None), "column 'answer' is null", False),
    "answer empty": (ANSWERS, one(answer="  "), "gold answer is empty", False),
}  # fmt: skip
IN_ALL_SPLITS = ("labels as text",)  # in one split only, `datasets` makes numbers of them
CASES = [(damage, task) for damage, (tasks, *_) in DAMAGE.items() for task in tasks]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", list(QUIZ_TASKS))
def test_whole_data_is_accepted(tmp_path: Path, kind: str, task: str) -> None:
    loaded = quiz_suite(write_quiz(tmp_path, kind), task, 2)
    assert len(loaded.tasks[task].eval_docs) == 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("damage", "task"), CASES)
def test_damaged_rows_are_named(tmp_path: Path, kind: str, damage: str, task: str) -> None:
    _, change, problem, is_everywhere = DAMAGE[damage]
    rows, examples = quiz_rows(12, 1), quiz_rows(8)
    change(rows)
    if is_everywhere:
        change(examples)
    folder = write_quiz(tmp_path, kind, {"train": examples, "test": rows})
    with pytest.raises(DataError, match=problem) as raised:
        quiz_suite(folder, task)
    message = str(raised.value)
    unit = "line" if kind == "jsonl" else "row"
    number = 1 if is_everywhere else BAD + 1
    assert f"{folder}/data/{QUIZ}/default/test.{kind}, {unit} {number}: " in message
    assert f"task {task}" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("damage", "task"), [case for case in CASES if case[0] not in IN_ALL_SPLITS])
def test_damaged_examples_are_named_if_they_are_used(tmp_path: Path, kind: str, damage: str, task: str) -> None:
    """A column renamed in one split only, and so on: the split that few-shot examples come from."""
    _, change, _, _ = DAMAGE[damage]
    rows = quiz_rows(8)
    change(rows)
    folder = write_quiz(tmp_path, kind, {"train": rows, "test": quiz_rows(12, 1)})
    quiz_suite(folder, task, 0)
    with pytest.raises(DataError, match=rf"default/train.{kind}, (line|row) \d+: ") as raised:
        quiz_suite(folder, task, 2)
    assert f"task {task}" in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", list(QUIZ_TASKS))
def test_too_few_rows_for_the_shots(tmp_path: Path, kind: str, task: str) -> None:
    folder = write_quiz(tmp_path, kind, {"train": quiz_rows(3), "test": quiz_rows(5, 1)})
    quiz_suite(folder, task, 3)
    with pytest.raises(
        DataError, match=rf"4 examples per prompt need 4 rows, and split 'train' has 3; .* \(task {task}"
    ):
        quiz_suite(folder, task, 4)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    rows = quiz_rows(12, 1)
    rows[2]["label"], rows[4]["label"], rows[5]["answer"] = 9, -1, ""
    folder = write_quiz(tmp_path, "jsonl", {"train": quiz_rows(8), "test": rows})
    with pytest.raises(DataError) as raised:
        quiz_suite(folder, "quiz_choice,quiz_words,quiz_cloze")
    assert "line 3: its gold answer is 9" in str(raised.value)
    assert "(task quiz_choice, and of 1 more of 12 rows)" in str(raised.value)
    assert "line 6: its gold answer is empty (task quiz_words)" in str(raised.value)
    assert "line 6: its gold answer is empty (task quiz_cloze)" in str(raised.value)


def bad_utf8(path: Path) -> None:
    if path.suffix == ".jsonl":
        lines = path.read_bytes().splitlines(keepends=True)
        lines[BAD] = lines[BAD].replace(b'"question": "', b'"question": "\xff')
        path.write_bytes(b"".join(lines))
        return
    rows = quiz_rows(12, 1)
    texts = [row["question"].encode() for row in rows]
    texts[BAD] += b"\xff"
    table = Table.from_pylist(rows)
    index = table.column_names.index("question")
    parquet.write_table(table.set_column(index, "question", array(texts, binary()).view(string())), path)


def half_a_pair(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[BAD] = lines[BAD].replace('"question": "', '"question": "\\ud83d')
    path.write_text("".join(lines))


def text_for_choices(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[BAD]["choices"] = "stone"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def word_for_a_label(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[BAD]["label"] = "B"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 30])


FILES: dict[str, tuple[Callable[[Path], Any], Sequence[str], str]] = {
    "text that is not UTF-8": (bad_utf8, KINDS, rf"(line|row) {BAD + 1} cannot be read .*(utf-8|UTF8).*; the file is"),
    "half of a surrogate pair": (half_a_pair, ["jsonl"], rf"line {BAD + 1} cannot .*it holds '.ud83d', half of a"),
    "text for choices": (text_for_choices, ["jsonl"], rf"line {BAD + 1}: its choices are 'stone', not a list"),
    "a word for a label": (word_for_a_label, ["jsonl"], rf"line {BAD + 1}: its gold answer is 'B'; allowed are 0 to 2"),
    "cut off": (cut, KINDS, "cannot be read .*; the file is truncated or damaged"),
    "empty": (lambda path: path.write_bytes(b""), ["jsonl"], "has no rows; the file is truncated or damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "kind"), [(name, kind) for name, (_, kinds, _) in FILES.items() for kind in kinds])
def test_damaged_files_are_named(tmp_path: Path, damage: str, kind: str) -> None:
    folder = write_quiz(tmp_path, kind)
    change, _, problem = FILES[damage]
    path = folder / "data" / QUIZ / "default" / f"test.{kind}"
    change(path)
    with pytest.raises(DataError, match=problem) as raised:
        quiz_suite(folder, "quiz_choice")
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("task", list(QUIZ_TASKS))
def test_a_byte_order_mark_and_blank_lines_are_no_damage(tmp_path: Path, task: str) -> None:
    folder = write_quiz(tmp_path)
    expected = list(quiz_suite(folder, task).tasks[task].eval_docs)
    path = folder / "data" / QUIZ / "default" / "test.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\n  \n" + b"".join(lines[1:]) + b"\n")
    assert list(quiz_suite(folder, task).tasks[task].eval_docs) == expected
    lines[BAD] = lines[BAD].replace(b'"label": ', b'"label": 7')
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\n  \n" + b"".join(lines[1:]))
    with pytest.raises(DataError, match=rf"test.jsonl, line {BAD + 3}: its gold answer is 7\d; allowed"):
        quiz_suite(folder, "quiz_choice")  # lines are counted as an editor does


ARC = "allenai/ai2_arc/ARC-Challenge/test"
HELLASWAG = "Rowan/hellaswag/default/validation"
WINOGRANDE = "allenai/winogrande/winogrande_xl/validation"
TRUTHFULQA = "truthfulqa/truthful_qa/multiple_choice/validation"
MMLU = "cais/mmlu/anatomy/test"
GSM8K = "openai/gsm8k/main"


def put(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda row: row.update(values)


def mc2_labels(*labels: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda row: row["mc2_targets"].update(labels=list(labels))


# What lm-eval's own tasks make of damage: their functions are in Python, and prepare the rows before they are read.
STOCK: dict[str, tuple[str, str, Callable[[dict[str, Any]], Any], str]] = {
    "arc, unknown label": ("arc_challenge", ARC, put(answerKey="E"), "cannot use it .ValueError: 'E' is not in list"),
    "arc, null label": ("arc_challenge", ARC, put(answerKey=None), "cannot use it|is null"),
    "hellaswag, label as a word": ("hellaswag", HELLASWAG, put(label="B"), "cannot use it .ValueError: invalid"),
    "hellaswag, label too large": ("hellaswag", HELLASWAG, put(label="4"), "gold answer is 4; allowed are 0 to 3"),
    "hellaswag, null text": ("hellaswag", HELLASWAG, put(ctx_b=None), "cannot use it .AttributeError: 'NoneType'"),
    "winogrande, label": ("winogrande", WINOGRANDE, put(answer="3"), "cannot use it .KeyError: '3'"),
    "winogrande, no option": ("winogrande", WINOGRANDE, lambda row: row.pop("option2"), "cannot use it .TypeError"),
    "truthfulqa, none right": ("truthfulqa_mc2", TRUTHFULQA, mc2_labels(0, 0, 0, 0), "every choice scores .*0.0"),
    "truthfulqa, words": ("truthfulqa_mc2", TRUTHFULQA, mc2_labels("a", "a", "b", "b"), "every choice scores"),
    "mmlu, label": ("mmlu", MMLU, put(answer=4), "gold answer is 4; allowed are 0 to 3"),
    "mmlu, no option": ("mmlu", MMLU, lambda row: row["choices"].pop(), "cannot use it"),
    "gsm8k, null answer": ("gsm8k", f"{GSM8K}/test", put(answer=None), "column 'answer' is null"),
    "gsm8k, null in an example": ("gsm8k", f"{GSM8K}/train", put(answer=None), "column 'answer' is null"),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(STOCK))
def test_damage_to_the_suites_own_data_is_named(tmp_path: Path, damage: str) -> None:
    task, file, change, problem = STOCK[damage]
    folder = write_leaderboard_data(tmp_path, ["anatomy"], num_items=20)
    suite = select(V1, [task]) if task != "mmlu" else ANATOMY
    load_suite(suite, folder)
    path = folder / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[1])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=problem) as raised:
        load_suite(suite, folder)
    assert f"{path}, line 2: " in str(raised.value)


def test_rows_that_a_task_sorts_out_and_shuffles_are_found_again(tmp_path: Path) -> None:
    folder = write_quiz(tmp_path)
    (folder / "tasks" / "preparing.py").write_text(
        "def keep(rows):\n"
        "    kept = rows.filter(lambda row: row['label'] != 1).shuffle(seed=3)\n"
        "    return kept.map(lambda row: {'choices': [choice.upper() for choice in row['choices']]})\n"
    )
    task = folder / "tasks" / "quiz_choice.yaml"
    task.write_text(task.read_text() + "process_docs: !function preparing.keep\n")
    rows = quiz_rows(30, 5)
    rows[21].update(label=8)
    write_quiz_data(folder, rows)
    with pytest.raises(DataError, match=r"test.jsonl, line 22: its gold answer is 8"):
        quiz_suite(folder, "quiz_choice")
    rows[21].update(label=2, choices=["a", None, "c"])
    write_quiz_data(folder, rows)
    with pytest.raises(DataError, match=r"test.jsonl, line 22: the task cannot use it \(AttributeError"):
        quiz_suite(folder, "quiz_choice")


def write_quiz_data(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    path = folder / "data" / QUIZ / "default" / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_files_of_a_tasks_own_are_checked_as_well(tmp_path: Path, kind: str) -> None:
    """A task whose data set is its own files, not a data set of the hub."""
    folder = write_quiz(tmp_path, "jsonl" if kind == "json" else "parquet")
    (path,) = (folder / "data" / QUIZ / "default").glob("test.*")
    task = folder / "tasks" / "quiz_choice.yaml"
    text = (
        task.read_text().replace(f"dataset_path: {QUIZ}", f"dataset_path: {kind}").replace("fewshot_split: train\n", "")
    )
    task.write_text(f"{text}dataset_kwargs:\n  data_files:\n    test: {path}\n")
    quiz_suite(folder, "quiz_choice")
    rows = quiz_rows(12, 1)
    rows[BAD]["label"] = 5
    if kind == "json":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=rf"{path.name}, (line|row) {BAD + 1}: its gold answer is 5"):
        quiz_suite(folder, "quiz_choice")
    path.unlink()
    with pytest.raises(DataError, match=rf"the file .*{path.name} of split 'test' is missing"):
        quiz_suite(folder, "quiz_choice")


def test_the_command_stops_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = quiz_rows(12, 1)
    rows[BAD]["label"] = -1
    folder = write_quiz(tmp_path, "jsonl", {"train": quiz_rows(8), "test": rows})
    model = save_model(tmp_path / "model")
    loaded = []
    monkeypatch.setattr(command, "load_model", lambda *args, **kwargs: loaded.append(args))
    monkeypatch.setattr(command, "named_suite", own_tasks_only)
    words = [
        "--model",
        model,
        "--suite",
        "quiz_choice",
        "--data-dir",
        folder / "data",
        "--include-path",
        folder / "tasks",
    ]
    with pytest.raises(SystemExit, match=r"leaderboard: .*\n.*line 8: its gold answer is -1"):
        command.main([str(word) for word in words])
    assert not loaded
    assert not list(model.glob("eval_*"))


def test_chance_is_counted_from_the_items(tmp_path: Path) -> None:
    rows = quiz_rows(12, 1)
    for row in rows[:6]:
        row["choices"], row["label"] = [*row["choices"], "north", "south", "east"], 0
    folder = write_quiz(tmp_path, "jsonl", {"train": quiz_rows(8), "test": rows})
    lines = {line.name: line for line in quiz_suite(folder, ",".join(QUIZ_TASKS)).suite.headlines}
    assert lines["quiz_choice"].scores[0].chance == pytest.approx((1 / 3 + 1 / 6) / 2)
    assert lines["quiz_choice/acc_norm"].scores[0].chance == pytest.approx((1 / 3 + 1 / 6) / 2)
    assert lines["quiz_words"].scores[0].chance == 0
    assert lines["quiz_cloze"].scores[0].chance == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", [-1, 7])
def test_wrong_labels_pass_if_that_is_asked_for_and_are_counted(
    tmp_path: Path, kind: str, label: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(command, "named_suite", own_tasks_only)
    rows = quiz_rows(12, 1)
    rows[3]["label"] = rows[BAD]["label"] = label
    folder = write_quiz(tmp_path, kind, {"train": quiz_rows(8), "test": rows})
    output = tmp_path / "f.json"
    words = [
        "--model",
        str(save_model(tmp_path / "model")),
        *quiz_words_of(folder, "quiz_choice"),
        "--output",
        str(output),
    ]
    with caplog.at_level("INFO"):
        command.main([*words, "--allow-wrong-labels"])
    assert json.loads(output.read_text())["wrong_labels"] == {"quiz_choice": 2}
    assert "which are wrong for all models: 2 of quiz_choice." in caplog.text
    rows[5]["question"] = None  # which is another matter
    folder = write_quiz(tmp_path, kind, {"train": quiz_rows(8), "test": rows})
    with pytest.raises(SystemExit, match=r"(line|row) 6: column 'question' is null"):
        command.main([*words, "--allow-wrong-labels"])


def test_what_published_data_has_wrong_passes_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(item_checks.PUBLISHED_WRONG, "quiz_choice", frozenset({"Monsters, Inc"}))
    rows = [{**row, "label": row["choices"][row["label"]]} for row in quiz_rows(12, 1)]
    rows[2]["label"] = "Monsters, Inc"
    assert quiz_suite(write_quiz(tmp_path, "jsonl", {"train": rows[:2], "test": rows}), "quiz_choice").wrong_labels == {
        "quiz_choice": 1
    }
    rows[4]["label"] = "another"
    with pytest.raises(DataError, match="line 5: its gold answer is 'another'"):
        quiz_suite(write_quiz(tmp_path, "jsonl", {"train": rows[:2], "test": rows}), "quiz_choice")


@pytest.mark.skipif("SPARSEIFT_DATA" not in os.environ, reason="needs real evaluation sets in SPARSEIFT_DATA")
def test_published_data_is_accepted() -> None:
    folder = Path(os.environ["SPARSEIFT_DATA"]) / "leaderboard"
    loaded = load_suite(select(V2, ["leaderboard_bbh", "leaderboard_musr"]), folder)
    assert loaded.wrong_labels == {"leaderboard_bbh_movie_recommendation": 1, "leaderboard_bbh_ruin_names": 2}
