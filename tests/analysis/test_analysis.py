"""`sparseift analyze`: checkpoints found, kept and left out, correlations across runs, files and pictures."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparseift_llm.analysis.checkpoints
from sparseift_llm import SparseIFTConfig, sparsify, spectral_report
from sparseift_llm.analysis.across_runs import analyze
from sparseift_llm.analysis.correlation import correlate
from sparseift_llm.analysis.tables import render
from sparseift_llm.checkpoints.mask_file import read_digest
from sparseift_llm.cli import main
from tests.helpers.models import tiny_model
from tests.helpers.pretrain_runs import RIGL, read_json, tiny_recipe
from tests.helpers.scripts import load_script
from tests.reporting.test_comparison import DENSE, SPARSE, write_run

QUANTITIES = ("delta_r", "delta_r_imdb", "lambda", "lambda_imsg")


def save_model(folder: Path, seed: int, sparsity: float = 0.5, step: int | None = None) -> None:
    """A tiny Sparse-IFT model, of a complete checkpoint if `step` is given."""
    config = SparseIFTConfig(sparsity=sparsity, seed=seed)
    sparsify(tiny_model("gpt2", dtype=torch.float32, seed=seed), config).save_pretrained(folder)
    if step is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def make_run(folder: Path, seed: int = 0, loss: float = 2.0, sparsity: float = 0.5, **data: Any) -> Path:
    """A finished run of 8 steps: checkpoint-4, checkpoint-8 and the final model, which is that of step 8."""
    write_run(folder, {**SPARSE, "eval_loss": loss, "step": 8}, **data)
    save_model(folder, seed, sparsity)
    save_model(folder / "checkpoint-4", seed + 100, sparsity, step=4)
    save_model(folder / "checkpoint-8", seed, sparsity, step=8)
    return folder


def dense_run(folder: Path) -> Path:
    write_run(folder, {**DENSE, "step": 8})
    tiny_model("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four finished runs; tests that change one copy it."""
    root = tmp_path_factory.mktemp("runs")
    sparsity = (0.5, 0.5, 0.6, 0.7)
    return [make_run(root / f"run{i}", i, loss, sparsity[i]) for i, loss in enumerate((2.0, 2.3, 2.1, 2.6))]


@pytest.fixture
def runs(made: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in made]


# ---- one run


def test_the_file_of_a_run(runs: list[Path], tmp_path: Path) -> None:
    run = runs[0]
    analyze([run], tmp_path / "out")
    values = read_json(run / "spectral.json")
    assert values["format"] == "sparseift_spectral_v1"
    assert values["settings"]["every_nth_layer"] == 1
    assert [(entry["step"], entry["folder"]) for entry in values["checkpoints"]] == [(4, "checkpoint-4"), (8, ".")]
    for entry in values["checkpoints"]:
        folder = run / entry["folder"]
        assert {key: entry[key] for key in ("masks_digest", "layers", "model")} == spectral_report(folder).to_dict()
        assert entry["masks_digest"] == read_digest(folder)
        for row in entry["layers"].values():
            assert list(row) == [
                "kind", "shape", "sparsity", "mean_degree_left", "mean_degree_right", *QUANTITIES, "excluded",
            ]  # fmt: skip
        assert set(entry["model"]) == {*QUANTITIES, "num_layers", "num_excluded"}


def count_reports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are analysed from now on, not taken from a file."""
    analysed: list[Path] = []

    def report(folder: Path, every_nth_layer: int) -> Any:
        analysed.append(folder)
        return spectral_report(folder, every_nth_layer)

    monkeypatch.setattr(sparseift_llm.analysis.checkpoints, "spectral_report", report)
    return analysed


def test_what_was_computed_is_reused(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs[0]
    first = analyze([run], tmp_path / "out").to_dict()
    analysed = count_reports(monkeypatch)
    assert analyze([run], tmp_path / "out").to_dict() == first
    assert analysed == []
    save_model(run / "checkpoint-6", 50, step=6)
    analyze([run], tmp_path / "out")
    assert analysed == [run / "checkpoint-6"]
    assert [entry["step"] for entry in read_json(run / "spectral.json")["checkpoints"]] == [4, 6, 8]


def test_other_masks_weights_or_settings_are_computed_anew(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs[0]
    before = analyze([run], tmp_path / "out").runs[0].checkpoints[0]["model"]
    analysed = count_reports(monkeypatch)
    weights = load_file(run / "checkpoint-4" / "model.safetensors")  # as static masks: only the weights are new
    save_file({key: 2 * value for key, value in weights.items()}, run / "checkpoint-4" / "model.safetensors")
    after = analyze([run], tmp_path / "out").runs[0].checkpoints[0]["model"]
    assert analysed == [run / "checkpoint-4"]
    assert after["delta_r"] == before["delta_r"]
    assert after["lambda"] == pytest.approx(2 * before["lambda"])
    save_model(run / "checkpoint-4", 70, step=4)
    analyze([run], tmp_path / "out")
    assert analysed[1:] == [run / "checkpoint-4"]
    analyze([run], tmp_path / "out", every_nth_layer=2)
    assert analysed[2:] == [run, run / "checkpoint-4"]
    assert len(read_json(run / "spectral.json")["checkpoints"][0]["layers"]) == 4


def test_an_interruption_loses_nothing(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs[0]
    analyze([run], tmp_path / "out")
    save_model(run, 60)  # the final model comes first, and is new

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    save_model(run / "checkpoint-2", 61, step=2)
    reports = [spectral_report]
    take_turns = lambda *words: (reports.pop() if reports else interrupted)(*words)  # noqa: E731
    monkeypatch.setattr(sparseift_llm.analysis.checkpoints, "spectral_report", take_turns)
    with pytest.raises(KeyboardInterrupt):
        analyze([run], tmp_path / "out")
    analysed = count_reports(monkeypatch)
    analyze([run], tmp_path / "out")
    assert analysed == [run / "checkpoint-2"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "sparseift_spectral_v1"}', '{"format": 1}'])
def test_a_damaged_file_of_a_run_is_written_anew(runs: list[Path], tmp_path: Path, text: str) -> None:
    (runs[0] / "spectral.json").write_text(text)
    analyze([runs[0]], tmp_path / "out")
    assert len(read_json(runs[0] / "spectral.json")["checkpoints"]) == 2


def test_a_real_run_is_analysed(tmp_path: Path) -> None:
    load_script("recipes/pretrain.py").main([str(tiny_recipe(tmp_path, RIGL, max_steps=8))])
    result = analyze([tmp_path / "run"], tmp_path / "out").runs[0]
    assert [entry["step"] for entry in result.checkpoints] == [4, 8]
    assert result.excluded == {}
    assert result.eval_loss == read_json(tmp_path / "run" / "summary.json")["eval_loss"]


# ---- broken and half-finished runs


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BREAKS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "half written": ("trainer_state.json", Path.unlink, "was not written to its end"),
    "no masks": ("sparse_masks.safetensors", Path.unlink, "sparse_masks.safetensors is missing"),
    "cut masks": ("sparse_masks.safetensors", cut, "is truncated or damaged"),
    "no weights": ("model.safetensors", Path.unlink, "are missing or damaged"),
    "cut weights": ("model.safetensors", cut, "are missing or damaged"),
    "no config": ("config.json", Path.unlink, "has no readable config.json"),
    "cut config": ("config.json", cut, "has no readable config.json"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_checkpoint_is_left_out_by_name(name: str, runs: list[Path], tmp_path: Path) -> None:
    file, damage, message = BREAKS[name]
    damage(runs[0] / "checkpoint-4" / file)
    result = analyze([runs[0]], tmp_path / "out")
    assert list(result.runs[0].excluded) == ["checkpoint-4"]
    assert message in result.runs[0].excluded["checkpoint-4"]
    assert [entry["step"] for entry in result.runs[0].checkpoints] == [8]
    assert f"left out: {runs[0]} (checkpoint-4): " in render(result)


def test_a_damaged_final_model_gives_way_to_the_last_checkpoint(runs: list[Path], tmp_path: Path) -> None:
    cut(runs[0] / "model.safetensors")
    result = analyze([runs[0]], tmp_path / "out").runs[0]
    assert [(entry["step"], entry["folder"]) for entry in result.checkpoints] == [
        (4, "checkpoint-4"),
        (8, "checkpoint-8"),
    ]
    assert result.eval_loss == 2.0
    assert list(result.excluded) == ["."]


def test_a_run_that_goes_on_has_no_loss(runs: list[Path], tmp_path: Path) -> None:
    (runs[0] / "summary.json").unlink()
    result = analyze([runs[0]], tmp_path / "out").runs[0]
    assert [entry["folder"] for entry in result.checkpoints] == ["checkpoint-4", "checkpoint-8"]
    assert result.excluded == {
        ".": "the step of this model is not known: no summary.json and no trainer_state.json has it"
    }
    assert result.eval_loss is None
    assert "is not a finished run" in str(result.no_loss)


def test_numbers_of_deleted_checkpoints_are_kept(runs: list[Path], tmp_path: Path) -> None:
    (before,) = analyze(runs[:1], tmp_path / "out").runs
    shutil.rmtree(runs[0] / "checkpoint-4")
    (after,) = analyze(runs[:1], tmp_path / "out").runs
    assert [entry["step"] for entry in after.checkpoints] == [4, 8]
    assert after.checkpoints == before.checkpoints
    assert read_json(runs[0] / "spectral.json")["checkpoints"] == list(before.checkpoints)


def test_a_loss_of_another_step_or_not_finite_does_not_count(runs: list[Path], tmp_path: Path) -> None:
    shutil.rmtree(runs[0] / "checkpoint-8")
    cut(runs[0] / "model.safetensors")
    summary = read_json(runs[1] / "summary.json")
    (runs[1] / "summary.json").write_text(json.dumps({**summary, "eval_loss": float("nan")}))
    first, second = analyze(runs[:2], tmp_path / "out").runs
    assert first.no_loss == "eval_loss is that of step 8, the last model analysed that of step 4"
    assert second.no_loss == "eval_loss is nan"
    assert (first.eval_loss, second.eval_loss) == (None, None)


def test_dense_and_empty_runs_are_left_out(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = analyze([dense_run(tmp_path / "dense"), tmp_path / "empty", *runs], tmp_path / "out")
    assert result.runs[0].excluded == {"all": "a dense model, without masks to analyse"}
    assert result.runs[1].excluded == {"all": "holds neither a checkpoint nor a model"}
    assert result.correlations == analyze(runs, tmp_path / "out").correlations
    with pytest.raises(ValueError, match=r"nothing to analyse: .*dense \(all\): a dense model, .*empty \(all\): holds"):
        analyze([tmp_path / "dense", tmp_path / "empty"], tmp_path / "out")


# ---- across runs


def test_correlations_are_those_of_last_models_and_losses(runs: list[Path], tmp_path: Path) -> None:
    result = analyze(runs, tmp_path / "out")
    rows = [{**spectral_report(run).model, "eval_loss": read_json(run / "summary.json")["eval_loss"]} for run in runs]
    names = [(pair.first, pair.second) for pair in result.correlations]
    assert len(names) == 10
    for (first, second), pair in zip(names, result.correlations, strict=True):
        pairs: list[Any] = [(row[first], row[second]) for row in rows]
        assert pair == correlate(first, second, [item for item in pairs if None not in item])
    assert result.correlations[names.index(("delta_r", "eval_loss"))].num_runs == 4
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict() == read_json(tmp_path / "out" / "analysis.json")


def test_fewer_than_three_runs(runs: list[Path], tmp_path: Path) -> None:
    result = analyze(runs[:2], tmp_path / "out")
    assert {pair.excluded for pair in result.correlations} == {"correlations need at least 3 runs, got 2"}
    assert "no correlation of any pair: correlations need at least 3 runs, got 2" in render(result)


def test_losses_of_different_data_are_not_correlated(made: list[Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", 9, seq_len=64)
    result = analyze([*made[:3], other], tmp_path / "out")
    reasons = [pair.excluded for pair in result.correlations if pair.second == "eval_loss"]
    assert all(str(reason).startswith("losses are not of the same data: ") for reason in reasons)
    assert "data.seq_len is 128 and 64" in str(reasons[0])
    assert all(pair.excluded is None for pair in result.correlations if pair.second != "eval_loss")
    for run in made[:3]:
        (run / "spectral.json").unlink()


def test_the_table_has_a_line_per_layer_and_checkpoint(runs: list[Path], tmp_path: Path) -> None:
    analyze(runs[:1], tmp_path / "out")
    with (tmp_path / "out" / "analysis.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["layer"]) for row in rows if row["layer"] == "model"] == [("4", "model"), ("8", "model")]
    assert len(rows) == 2 * (8 + 1)
    assert [row["eval_loss"] for row in rows if row["layer"] == "model"] == ["", "2.0"]
    entry = read_json(runs[0] / "spectral.json")["checkpoints"][1]
    for row in rows[9:]:
        source = entry["model"] if row["layer"] == "model" else entry["layers"][row["layer"]]
        assert [row[key] for key in QUANTITIES] == [
            "" if source[key] is None else str(source[key]) for key in QUANTITIES
        ]


@pytest.mark.parametrize("twice", [True, False])
def test_runs_that_cannot_be_meant(twice: bool, runs: list[Path], tmp_path: Path) -> None:
    words = [runs[0], runs[0].parent / "." / runs[0].name / ".." / runs[0].name] if twice else [tmp_path / "nowhere"]
    message = "a run is given twice" if twice else "nowhere is not a folder"
    with pytest.raises(ValueError, match=message):
        analyze(words, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the command


def test_the_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    assert main(["analyze", *map(str, runs), "--output", str(out), "--every-nth-layer", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| run | step | delta_r | delta_r_imdb | lambda | lambda_imsg | eval_loss |")
    assert "| run3 | 8 | " in printed
    assert "| delta_r | eval_loss | 4 | " in printed
    for name in ("spectral.png", "correlations.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert str(out / name) in printed
    assert main(["analyze", str(runs[0]), "--output", str(out)]) == 0
    assert not (out / "correlations.png").exists()


def test_without_matplotlib_tables_are_written_all_the_same(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["analyze", str(runs[0]), "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "sparseift: drawing needs matplotlib" in printed.err
    assert "| run0 | 8 | " in printed.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["analysis.csv", "analysis.json"]


@pytest.mark.parametrize("words", [["--every-nth-layer", "0"], ["--every-nth-layer", "-1"]])
def test_mistakes_are_messages(
    words: list[str], runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", str(runs[0]), "--output", str(tmp_path / "out"), *words]) == 2
    assert capsys.readouterr().err == f"sparseift: every_nth_layer must be at least 1, got {words[1]}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["analysis.json", "analysis.csv", "spectral.png", "correlations.png"])
def test_files_of_others_are_kept(
    name: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"format": "another"}')
    assert main(["analyze", str(runs[0]), "--output", str(out)]) == 2
    assert f"{name} is there already, and not from sparseift analyze; " in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, '{"format": "another"}')]
    assert not (runs[0] / "spectral.json").exists()


def test_an_output_that_is_a_file_is_named(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    assert main(["analyze", str(runs[0]), "--output", str(tmp_path / "out")]) == 2
    assert "out: File exists" in capsys.readouterr().err
