"""The Trainer callback: when it runs, what it logs, and that training does not notice."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from sparseift_llm import DSTConfig, SparseTrainingCallback
from sparseift_llm.evaluation import harness, task_loading
from sparseift_llm.evaluation.callback import EvaluationCallback
from sparseift_llm.evaluation.harness import evaluate_task
from sparseift_llm.evaluation.language_model import SplitLM
from sparseift_llm.evaluation.options import EvaluationOptions
from sparseift_llm.evaluation.task_loading import load_suite, named_suite
from tests.helpers.evaluation import tiny_gpt2, tokenizer

OPTIONS: dict[str, Any] = {"suite": "builtin", "every_steps": 2, "limit": 4, "batch_size": 4}
SPARSE: dict[str, Any] = {"sparsity": 0.75, "dst": DSTConfig("rigl", update_every_steps=2, drop_fraction=0.3)}


class Seen(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """What a tracker is told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({"step": state.global_step, **logs})


def make_trainer(folder: Path, seen: Seen, steps: int = 5, with_tokenizer: bool = True) -> Trainer:
    torch.manual_seed(0)
    rows = torch.randint(len(tokenizer()), (20, 16))
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, learning_rate=0.01,
    )  # fmt: skip
    model: PreTrainedModel = tiny_gpt2(64, sparse_ift=SPARSE)
    return Trainer(
        model=model,
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        data_collator=default_data_collator,
        processing_class=tokenizer() if with_tokenizer else None,
        callbacks=[SparseTrainingCallback(), seen],
    )


def test_scores_are_logged_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    seen = Seen()
    trainer = make_trainer(tmp_path, seen)
    trainer.add_callback(EvaluationCallback(trainer, **OPTIONS))
    trainer.train()
    scored = [log for log in seen.logs if "builtin/average" in log]
    assert [log["step"] for log in scored] == [2, 4, 5]
    assert {"builtin/builtin_continuation", "builtin/builtin_identifier", "builtin/builtin_bits_per_byte"} <= scored[
        0
    ].keys()
    assert scored[0]["builtin/builtin_bits_per_byte"] != scored[1]["builtin/builtin_bits_per_byte"]
    assert [entry["step"] for entry in trainer.state.log_history if "builtin/average" in entry] == [2, 4, 5]
    model: Any = trainer.model
    task = load_suite(named_suite("builtin")).tasks["builtin_bits_per_byte"]
    lm = SplitLM(model.eval(), tokenizer(), 4)
    result = evaluate_task(lm, "builtin_bits_per_byte", task, EvaluationOptions(4)).result
    assert scored[-1]["builtin/builtin_bits_per_byte"] == result["metrics"]["bits_per_byte,none"]


def test_training_does_not_notice(tmp_path: Path) -> None:
    """Dropout draws, masks and weights are those of a run without the callback, to the bit."""
    states = []
    for with_callback in (False, True):
        seen = Seen()
        trainer = make_trainer(tmp_path / str(with_callback), seen)
        if with_callback:
            trainer.add_callback(EvaluationCallback(trainer, **OPTIONS))
        trainer.train()
        model: Any = trainer.model
        assert model.training
        states.append(
            ({k: v.clone() for k, v in model.state_dict().items()}, [e["loss"] for e in seen.logs if "loss" in e])
        )
    assert states[0][1] == states[1][1]
    assert all(torch.equal(states[0][0][name], value) for name, value in states[1][0].items())


def test_mistakes_are_named_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Seen())
    for change, message in (
        ({"every_steps": 0}, "every_steps must be at least 1, got 0"),
        ({"limit": 0}, "limit must be a whole number of at least 1, or a share between 0 and 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluationCallback(trainer, **{**OPTIONS, **change})
    with pytest.raises(ValueError, match="no --data-dir is given and HF_HUB_OFFLINE"):
        EvaluationCallback(trainer, "v1", 2)
    bare = make_trainer(tmp_path, Seen(), with_tokenizer=False)
    with pytest.raises(ValueError, match="give it processing_class=tokenizer"):
        EvaluationCallback(bare, **OPTIONS)


def log_of_training(folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> str:
    """What a training run with the callback prints and logs."""
    caplog.clear()
    capfd.readouterr()
    trainer = make_trainer(folder, Seen(), 2)
    with caplog.at_level("WARNING"):
        trainer.add_callback(EvaluationCallback(trainer, **OPTIONS))
        trainer.train()
    records = [
        f"{record.name}: {record.getMessage()}" for record in caplog.records if record.name.startswith("lm_eval")
    ]
    return "\n".join([capfd.readouterr().err, *records])


def test_nothing_of_lm_eval_gets_into_the_training_log(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = log_of_training(tmp_path / "quiet", capfd, caplog)
    assert "lm_eval" not in text
    assert "it/s" not in text
    for module in (harness, task_loading):
        monkeypatch.setattr(module, "quiet", lambda *_: contextlib.nullcontext())
    text = log_of_training(tmp_path / "loud", capfd, caplog)  # what it is kept from
    assert "lm_eval.api.task: " in text
    assert "it/s" in text


def test_truncation_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Contexts of 64 tokens are too short for the items of 240 characters."""
    trainer = make_trainer(tmp_path, Seen(), 4)
    with caplog.at_level("WARNING"):
        trainer.add_callback(EvaluationCallback(trainer, **OPTIONS))
        trainer.train()
    warned = [record.getMessage() for record in caplog.records if "lose their beginning" in record.getMessage()]
    assert len(warned) == 1
    assert "the prompts of 4 items of builtin_continuation, 4 items of builtin_identifier are longer" in warned[0]


def test_a_suite_that_does_not_fit_is_said_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Seen())
    trainer.model = tiny_gpt2(8)
    with pytest.raises(ValueError, match=r"does not fit the model: builtin_continuation: item 0 has an answer of"):
        EvaluationCallback(trainer, **OPTIONS)
