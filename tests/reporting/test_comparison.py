"""The comparison table, on summaries written by hand, and the loss picture."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from sparseift_llm.reporting.comparison import comparison_table, read_summary
from sparseift_llm.reporting.loss_picture import loss_picture

DATA = {
    "corpus": "builtin",
    "eval_corpus": None,
    "tokenizer": "bpe",
    "vocab_size": 512,
    "seq_len": 128,
    "max_eval_sequences": 64,
}
DENSE = {
    "eval_loss": 2.0,
    "perplexity": 7.389,
    "bits_per_byte": 1.5,
    "linear_active_params": 1_000_000,
    "stored_params": 1_200_000,
    "linear_sparsity": 0.0,
    "linear_flops_per_token": 2_000_000,
    "forward_flops_per_token": 2_500_000,
    "train_flops": 4_000_000_000,
    "train_tokens": 1000,
    "tokens_per_second": 2000.4,
}
SPARSE = {
    **DENSE,
    "eval_loss": 1.9,
    "perplexity": 6.686,
    "stored_params": 4_800_000,
    "linear_sparsity": 0.75,
    "forward_flops_per_token": 3_500_000,
    "train_flops": 6_000_000_000,
    "tokens_per_second": 500.1,
}


def write_run(folder: Path, summary: dict[str, Any], **data: Any) -> Path:
    folder.mkdir(parents=True)
    values = {"config": {"data": {**DATA, **data}}, **summary}
    (folder / "summary.json").write_text(json.dumps(values))
    return folder


def write_metrics(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": 1, "train_tokens": 128, "train_flops": 10**9, "loss": 3.0},
        {"step": 2, "train_tokens": 256, "train_flops": 2 * 10**9, "loss": 2.5},
        {"step": 2, "train_tokens": 256, "train_flops": 2 * 10**9, "eval_loss": 2.6},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rows(table: str) -> dict[str, list[str]]:
    """Title -> cells of the markdown table at the start of `table`."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in lines}


def test_two_runs_have_a_column_of_ratios(tmp_path: Path) -> None:
    table = comparison_table([write_run(tmp_path / "dense", DENSE), write_run(tmp_path / "sparse", SPARSE)])
    assert table.startswith("|  | dense | sparse | ratio |\n| --- | ---: | ---: | ---: |\n")
    cells = rows(table)
    assert cells["held-out loss (nats/token)"] == ["2.0000", "1.9000", "0.950"]
    assert cells["held-out perplexity"] == ["7.39", "6.69", "0.905"]
    assert cells["held-out bits per byte"] == ["1.5000", "1.5000", "1.000"]
    assert cells["active linear parameters"] == ["1,000,000", "1,000,000", "1.000"]
    assert cells["stored parameters"] == ["1,200,000", "4,800,000", "4.000"]
    assert cells["linear FLOPs/token (forward)"] == ["2,000,000", "2,000,000", "1.000"]
    assert cells["whole-model FLOPs/token (forward)"] == ["2,500,000", "3,500,000", "1.400"]
    assert cells["training FLOPs, whole model"] == ["4 GFLOP", "6 GFLOP", "1.500"]
    assert cells["training tokens"] == ["1,000", "1,000", "1.000"]
    assert cells["tokens/s"] == ["2,000", "500", "0.250"]
    assert cells["linear sparsity"][:2] == ["0.0000", "0.7500"]  # no ratio: a zero stands below
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert widths == {5}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_rates_are_those_of_the_settings(tmp_path: Path, number: int) -> None:
    settings = [{"learning_rate": 0.008, "embedding_lr_factor": 8.0}, {"learning_rate": 0.016}, {"max_steps": 4}]
    runs = [
        write_run(tmp_path / f"run{index}", {**DENSE, "config": {"data": DATA, "training": training}})
        for index, training in enumerate(settings[:number])
    ]
    cells = rows(comparison_table(runs))  # without empty cells at the end: the ratio, and the rate that is not known
    assert cells["learning rate"] == ["0.008", "0.016"][:number]
    assert cells["learning rate of embeddings"] == ["0.064", "0.016"][:number]
    assert "learning rate" not in rows(comparison_table([write_run(tmp_path / "unknown", DENSE)]))


@pytest.mark.parametrize("number", [1, 3])
def test_other_numbers_of_runs_have_no_ratios(tmp_path: Path, number: int) -> None:
    runs = [write_run(tmp_path / f"run{index}", SPARSE) for index in range(number)]
    table = comparison_table(runs)
    assert "ratio" not in table
    assert rows(table)["held-out loss (nats/token)"] == ["1.9000"] * number


def test_notes_say_what_flops_leave_out_and_when_masks_cost_time(tmp_path: Path) -> None:
    dense = write_run(tmp_path / "dense", DENSE)
    sparse, tiles = (
        write_run(tmp_path / structure, {**SPARSE, "config": {"data": DATA, "sparse_ift": {"structure": structure}}})
        for structure in ("unstructured", "block")
    )
    masked = "Unstructured masks are multiplied at the cost of the stored, dense matrix"
    assert masked in comparison_table([dense, sparse])
    assert masked not in comparison_table([dense, tiles])
    assert "norms and elementwise work are left out" in comparison_table([dense])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("corpus", "my text"),
        ("eval_corpus", "held_out.txt"),
        ("tokenizer", "openai-community/gpt2"),
        ("vocab_size", 1024),
        ("seq_len", 256),
        ("max_eval_sequences", None),
        ("eval_fraction", 0.5),
        ("corpus_config", "wikitext-103-raw-v1"),
        ("eval_split", "test"),
        ("text_field", "body"),
        ("rows_are_documents", False),
    ],
)
def test_runs_on_other_text_are_not_compared(tmp_path: Path, key: str, value: Any) -> None:
    common = {"eval_fraction": 0.05, "corpus_config": None, "eval_split": "validation", "text_field": "text"}
    common |= {"rows_are_documents": True}
    first = write_run(tmp_path / "first", DENSE, **common)
    second = write_run(tmp_path / "second", SPARSE, **{**common, key: value})
    with pytest.raises(ValueError, match=f"cannot be compared: data.{key} is ") as caught:
        comparison_table([first, second])
    assert repr(value) in str(caught.value)
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)


def test_where_tokens_are_cached_does_not_matter(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, DENSE, cache_dir=name) for name in ("first", "second")]
    assert "first" in comparison_table(runs)


# ---- runs that are not there


def test_a_missing_or_unfinished_run(tmp_path: Path) -> None:
    finished = write_run(tmp_path / "finished", DENSE)
    with pytest.raises(ValueError, match=r"is missing: .*nowhere is not a finished run"):
        comparison_table([finished, tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"is missing: .*unfinished is not a finished run"):
        read_summary(write_metrics(tmp_path / "unfinished"))


@pytest.mark.parametrize("text", ["", '{"eval_loss": 2.0', "null\n{}"])
def test_a_broken_summary(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", DENSE)
    (run / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json is not valid JSON"):
        read_summary(run)


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_a_summary_of_something_else(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", DENSE)
    (run / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json"):
        comparison_table([run])


# ---- folders of a plain Trainer


def write_trainer_run(folder: Path, max_steps: int = 2, **config: Any) -> Path:
    """What a Trainer leaves that was asked to save its state: its log, and a GPT-2 with its config."""
    GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=2)).save_pretrained(folder)
    history = [
        {"step": 1, "loss": 3.0, "tokens_per_second": 100.0, "train_flops": 5000},
        {"step": 2, "loss": 2.5, "tokens_per_second": 300.0, "train_flops": 10_000},
        {"step": 2, "eval_loss": 2.25},
        {"step": 2, "train_runtime": 9.0, "train_loss": 2.75},
    ]
    state = {"global_step": 2, "max_steps": max_steps, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_the_folder_of_a_trainer_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    own = write_run(tmp_path / "own", DENSE)
    table = comparison_table([own, write_trainer_run(tmp_path / "plain")])
    cells = rows(table)
    assert cells["held-out loss (nats/token)"] == ["2.0000", "2.2500", "1.125"]
    assert cells["held-out perplexity"][1] == f"{math.exp(2.25):.2f}"
    assert cells["held-out bits per byte"][0] == "1.5000"
    assert cells["active linear parameters"][1] == "768"  # 12 x 8 x 8
    # 10 x 8 tied embeddings, 8 x 8 positions; 768 weights, 72 biases and 32 of norms in the layer; 16 of the last norm
    assert cells["stored parameters"][1] == f"{80 + 64 + 768 + 72 + 32 + 16:,}"
    assert cells["linear sparsity"][:2] == ["0.0000", "0.0000"]
    assert cells["training FLOPs, whole model"][1] == "10 kFLOP"
    assert cells["tokens/s"] == ["2,000", "200", "0.100"]
    assert "| held-out bits per byte | 1.5000 |  |  |" in table
    assert "Of plain only what a Trainer writes is known" in table


def test_an_unfinished_trainer_run_is_refused(tmp_path: Path) -> None:
    run = write_trainer_run(tmp_path / "plain", max_steps=3)
    with pytest.raises(ValueError, match=r"plain is not a finished run: .* is of step 2 of 3"):
        comparison_table([run])


def test_runs_without_tokens_are_drawn_over_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    monkeypatch.setattr("sparseift_llm.reporting.loss_picture.written_whole", contextlib.nullcontext)
    runs = [write_metrics(tmp_path / "own"), write_trainer_run(tmp_path / "plain")]
    loss_picture(runs, tmp_path / "loss.png")
    loss_picture(runs[:1], tmp_path / "loss.png")
    flops = "training FLOPs, whole model (GFLOP)"
    assert [panel.get_xlabel() for panel in drawn[0].axes] == [flops]  # which both have
    assert [panel.get_xlabel() for panel in drawn[1].axes] == ["training tokens (tokens)", flops]
    assert drawn[0].get_suptitle() == "Training and held-out loss: own, plain"
    assert [text.get_text() for text in drawn[1].axes[0].texts] == ["own\n2.600"]  # the held-out loss at the end


# ---- the picture


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "loss.png"
    loss_picture([write_metrics(tmp_path / "dense"), write_metrics(tmp_path / "sparse")], path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    height, width = pixels.shape[:2]
    assert height >= 400
    assert width >= 1000
    assert pixels[..., :3].min() < 0.2  # something is drawn
    assert pixels[..., :3].max() == 1.0


def test_runs_without_evaluation_can_be_drawn(tmp_path: Path) -> None:
    run = write_metrics(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(text[:2]))
    loss_picture([run], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0


@pytest.mark.parametrize("is_there", [True, False])
def test_nothing_to_draw(is_there: bool, tmp_path: Path) -> None:
    if is_there:
        (tmp_path / "nowhere").mkdir()
    with pytest.raises(
        ValueError, match="nowhere has no metrics to draw" if is_there else "nowhere is missing: a run is"
    ):
        loss_picture([tmp_path / "nowhere"], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"drawing needs matplotlib: pip install 'sparseift_llm\[plot\]'"):
        loss_picture([write_metrics(tmp_path / "run")], tmp_path / "loss.png")
