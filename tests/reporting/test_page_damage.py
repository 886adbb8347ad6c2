"""The report page of runs that are unfinished, damaged or not there: it is written, and says what is wrong."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm.cli import main
from sparseift_llm.reporting.page.page import write_report
from sparseift_llm.reporting.page.runs import Run
from tests.helpers.html_pages import (
    LAYERS,
    Node,
    log_lines,
    parse,
    table_rows,
    write_full_run,
    write_lines,
    write_masks,
)
from tests.helpers.pretrain_runs import read_json
from tests.reporting.test_page import check_page

JSON_FILES = ("summary.json", "recipe.json", "spectral.json", "eval_tiny.json", "config.json")
LINE_FILES = ("metrics.jsonl", "layers.jsonl")
OTHERS = (None, True, "words", [], [1], {}, {"a": None}, -1, 0, 1.5, math.nan, math.inf, 10**400)


def read(*folders: Path) -> tuple[list[Run], Node]:
    output = folders[0].parent / "report.html"
    runs = write_report(folders, output)
    text = output.read_text(encoding="utf-8")
    root = parse(text)
    check_page(root, text)
    return runs, root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_full_run(tmp_path / "run")


def cut(name: str) -> Callable[[Path], None]:
    """Leaves the first two thirds of a file."""

    def change(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) * 2 // 3])

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text) and None


def summary_with(**changes: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / "summary.json").write_text(json.dumps({**read_json(run / "summary.json"), **changes}))

    return change


def logged(**changes: Any) -> Callable[[Path], None]:
    """Changes the fourth line of the log."""

    def change(run: Path) -> None:
        lines = log_lines()
        lines[3] |= changes
        write_lines(run / "metrics.jsonl", lines)

    return change


def binary(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"\xff\n\xfe\n")


def without_masks(run: Path) -> None:
    (run / "sparse_masks.safetensors").unlink()
    (run / "model.safetensors").write_bytes(b"")


BROKEN: tuple[tuple[str, Callable[[Path], None], str], ...] = (
    ("summary cut", cut("summary.json"), "summary.json is truncated or damaged: "),
    ("summary of something else", write("summary.json", "{}"), "summary.json is not the summary of a run"),
    ("summary no object", write("summary.json", "[1]"), "summary.json holds no JSON object, but list"),
    ("summary not finite", summary_with(eval_loss=math.nan, perplexity=math.inf), "eval_loss, perplexity not finite"),
    ("recipe cut", cut("recipe.json"), "recipe.json is truncated or damaged: "),
    ("recipe too deep", write("recipe.json", "[" * 100_000), "recipe.json is truncated or damaged: "),
    ("log line damaged", logged(step="4"), "metrics.jsonl is damaged: line 4 is no JSON object with a step"),
    ("log not text", binary, "metrics.jsonl is damaged: lines 1, 2 are no JSON"),
    ("loss lost", logged(loss=math.nan), "the training loss is not finite in 1 logged step, first at step 3 (nan)"),
    ("loss a word", logged(loss="high"), "in 1 logged step, first at step 3 (no number)"),
    ("held-out loss lost", logged(eval_loss=math.inf), "the held-out loss is not finite in 1 logged step"),
    ("layers damaged", write("layers.jsonl", "null\n"), "layers.jsonl is damaged: line 1 is no JSON object"),
    ("spectral cut", cut("spectral.json"), "spectral.json is truncated or damaged: "),
    ("spectral of another format", write("spectral.json", '{"format": "v2"}'), "'sparseift_spectral_v1', but 'v2'"),
    ("spectral without checkpoints", write("spectral.json", '{"format": "sparseift_spectral_v1"}'), "all of its ch"),
    ("masks cut", cut("sparse_masks.safetensors"), "sparse_masks.safetensors is truncated or damaged"),
    ("masks missing", without_masks, "sparse_masks.safetensors is missing: without it the masks"),
    ("evaluation cut", cut("eval_tiny.json"), "eval_tiny.json: eval_tiny.json is truncated or damaged"),
    ("evaluation of something else", write("eval_tiny.json", "{}"), "eval_tiny.json is not a result file"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_run_says_why(run: Path, change: Callable[[Path], None], reason: str) -> None:
    change(run)
    (found,), root = read(run)
    assert found.state == "broken"
    (state,) = root.all("ul", "states")
    assert state.all("span")[0].text == "broken"
    assert reason in state.text
    assert str(run) not in root.by_id("runs").text
    assert len(root.all("table")) >= 3  # what can be read is shown


def test_no_run_that_can_be_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "summary.json").write_text("{")
    folders = [tmp_path / "empty", tmp_path / "damaged"]
    page = tmp_path / "report.html"
    assert main(["report", *map(str, folders), "-o", str(page)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "output folders of `sparseift pretrain`, which hold summary.json, recipe.json or metrics.jsonl, or" in said
    assert f"{folders[0]}: none of summary.json, recipe.json and metrics.jsonl is there" in said
    assert f"{folders[1]}: summary.json is truncated or damaged: " in said
    assert not page.exists()
    assert main(["report", *map(str, folders), str(run), "-o", str(page)]) == 0
    assert "empty: broken; none of " in capsys.readouterr().out
    assert page.exists()


@pytest.mark.parametrize("left", ["summary.json", "recipe.json", "metrics.jsonl"])
def test_any_one_file_makes_a_run(run: Path, left: str) -> None:
    for path in run.iterdir():
        if path.name != left:
            path.unlink()
    (found,), _ = read(run)
    assert found.state == ("finished" if left == "summary.json" else "unfinished")


def test_a_run_that_has_just_begun(run: Path) -> None:
    for path in run.iterdir():
        if path.name != "recipe.json":
            path.unlink()
    (found,), root = read(run)
    assert found.state == "unfinished"
    assert "nothing was logged yet" in root.by_id("runs").text
    assert "No run has logged a loss." in root.by_id("loss").text
    assert "summary.json (headline numbers), metrics.jsonl (curves)" in root.by_id("notes").text
    assert not root.all("svg", "chart")


def test_a_folder_beside_a_finished_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    runs, root = read(tmp_path / "empty", run)
    assert [found.state for found in runs] == ["broken", "finished"]
    assert "none of summary.json, recipe.json and metrics.jsonl is there" in root.by_id("runs").text
    rows = table_rows(root, "Ratio: run / empty")[""]
    assert rows[0] == ["optimizer steps", "", "\u2013", "6"]


def test_an_unfinished_run(run: Path) -> None:
    (run / "summary.json").unlink()
    (found,), root = read(run)
    assert found.state == "unfinished"
    reason = "summary.json, which a run writes at its end, is missing; the last log line is of step 6 of 6"
    assert root.all("ul", "states")[0].all("li")[1].text == reason
    rows = {row[0]: row[1] for row in table_rows(root, "Headline numbers")[""]}
    assert rows["optimizer steps"] == "6"
    assert rows["held-out loss (nats/token)"] == f"{6.5 / 6 + 0.1:.4f} at step 6"
    assert rows["training tokens"] == "768 at step 6"
    assert rows["held-out perplexity"] == "\u2013"
    (run / "metrics.jsonl").unlink()
    assert "nothing was logged yet" in read(run)[1].by_id("runs").text


def test_a_run_that_was_continued(run: Path) -> None:
    write_lines(run / "metrics.jsonl", log_lines(8))
    (found,), root = read(run)
    assert found.state == "unfinished"
    assert "summary.json is of step 6, but the log goes on to step 8" in root.by_id("runs").text


@pytest.mark.parametrize("name", LINE_FILES)
def test_a_last_line_that_was_cut(run: Path, name: str) -> None:
    text = (run / name).read_text()
    (run / name).write_text(text[:-10])
    (found,), root = read(run)
    assert found.state == "finished"
    assert found.reasons == (f"the last line of {name} was cut off, as when a run is killed; left out",)
    assert found.reasons[0] in root.by_id("runs").text
    assert len(found.metrics if name == "metrics.jsonl" else found.layers) == text.count("\n") - 1


def test_an_interrupted_evaluation(run: Path) -> None:
    (run / "eval_v1.progress.json").write_text("{}")
    (found,), root = read(run)
    assert found.state == "finished"
    assert "eval_v1.progress.json: an evaluation was interrupted" in root.by_id("runs").text


def test_lost_losses_leave_gaps(run: Path) -> None:
    lines = [line for line in log_lines() if "loss" in line]
    for line in lines[2:4]:
        line["loss"] = math.nan
    write_lines(run / "metrics.jsonl", lines)
    (_,), root = read(run)
    (figure,) = root.all("figure", "tokens-whole")
    points = [line.attributes["points"].count(",") for line in figure.all("polyline", "thin")]
    assert points == [2, 2]
    assert "2 logged steps, first at step 3 (nan)" in root.by_id("runs").text
    rows = table_rows(root, "Loss (nats per token) over training")["run"]
    assert [row[4] for row in rows if row[4] == "nan"] == ["nan"]  # a gap, once
    write_lines(run / "metrics.jsonl", [{**line, "loss": math.nan} for line in lines])
    assert "No run has logged a loss." in read(run)[1].by_id("loss").text


def test_a_run_without_masks_or_weights(run: Path) -> None:
    (run / "sparse_masks.safetensors").unlink()
    (found,), root = read(run)
    assert found.state == "finished"  # logs may be kept without weights
    assert "masks (degree maps)" in found.missing
    assert "No run here has masks" in root.by_id("degrees").text


@pytest.mark.parametrize("step", [10**400, math.nan, "six", None])
def test_a_step_that_is_no_step(run: Path, step: Any) -> None:
    summary_with(step=step)(run)
    (found,), _ = read(run)
    assert found.masks is not None
    assert (found.masks.folder, found.masks.step) == (".", None)


# ---- which masks are newest


def test_the_newest_masks(run: Path) -> None:
    for step in (4, 6, 10):
        (run / f"checkpoint-{step}").mkdir()
        shutil.copy(run / "config.json", run / f"checkpoint-{step}")
    write_masks(run / "checkpoint-4", seed=4)
    write_masks(run / "checkpoint-6", seed=6)
    (found,), _ = read(run)
    assert found.masks is not None
    assert (found.masks.folder, found.masks.step) == (".", 6)  # of equal steps the final model
    write_masks(run / "checkpoint-10", seed=10)
    (found,), root = read(run)
    assert found.masks is not None
    assert (found.masks.folder, found.masks.step) == ("checkpoint-10", 10)
    assert "Masks of step 10 from checkpoint-10: " in root.by_id("degrees").text
    cut("checkpoint-10/sparse_masks.safetensors")(run)
    (found,), root = read(run)
    assert found.state == "broken"
    assert found.masks is not None
    assert found.masks.folder == "."
    assert "checkpoint-10/sparse_masks.safetensors is truncated" in root.by_id("runs").text


def test_kinds_from_analyses_where_the_config_does_not_tell(run: Path) -> None:
    (run / "config.json").unlink()
    layers = read(run)[0][0].masks
    assert layers is not None
    assert [(layer.name, layer.kind) for layer in layers.layers] == [(name, LAYERS[name][0]) for name in LAYERS]
    (run / "layers.jsonl").unlink()
    (run / "spectral.json").unlink()
    layers = read(run)[0][0].masks
    assert layers is not None
    assert {layer.kind for layer in layers.layers} == {"unknown"}
    assert "masks are shown as they are stored" in read(run)[1].by_id("runs").text


# ---- anything at all


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values in nested mappings and lists."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


def replaced(values: Any, path: tuple[Any, ...], other: Any) -> Any:
    result = copy.deepcopy(values)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = other
    return result


@pytest.mark.parametrize("name", [*JSON_FILES, *LINE_FILES])
def test_any_value_may_be_anything(run: Path, name: str) -> None:
    draw = random.Random(name)
    text = (run / name).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    paths = list(places(lines))
    for _ in range(12):
        changed = lines
        for path in draw.sample([path for path in paths if len(path) > 1], 2):
            try:
                changed = replaced(changed, path, draw.choice(OTHERS))
            except (TypeError, KeyError, IndexError):  # the first change took the second's place away
                continue
        write_lines(run / name, changed)
        write_report([run], run.parent / "report.html")
        parse((run.parent / "report.html").read_text())


@pytest.mark.parametrize("name", ["sparse_masks.safetensors", *JSON_FILES, *LINE_FILES])
def test_any_bytes_may_be_lost(run: Path, name: str) -> None:
    draw = random.Random(name)
    content = (run / name).read_bytes()
    for _ in range(8):
        start = draw.randrange(len(content))
        (run / name).write_bytes(
            content[:start] + draw.randbytes(draw.randrange(3)) + content[start + draw.randrange(9) :]
        )
        write_report([run], run.parent / "report.html")
        parse((run.parent / "report.html").read_text())
