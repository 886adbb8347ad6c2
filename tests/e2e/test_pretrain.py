"""recipes/pretrain.py on a tiny corpus: what it leaves behind, hand-counted FLOPs, refusals, and the plain loop."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from sparseift_llm import load_pretrained
from sparseift_llm.data.loading import load_data
from sparseift_llm.data.options import DataConfig
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.reporting.comparison import comparison_table
from sparseift_llm.reporting.loss_picture import loss_picture
from sparseift_llm.runs import pretrain
from sparseift_llm.runs.preparation import training_arguments
from sparseift_llm.runs.recipe import load_recipe
from sparseift_llm.runs.recipe_training import LearningRateFactors
from sparseift_llm.runs.resuming import IN_OPTIMIZER_STATE
from sparseift_llm.runs.trainer import Pretrainer
from tests.helpers.paths import ROOT
from tests.helpers.pretrain_runs import (
    ENVIRONMENT,
    RIGL,
    TOKENS_PER_STEP,
    VOCAB,
    curve,
    read_json,
    tiny_recipe,
    write_corpus,
)
from tests.helpers.scripts import load_script

ACTIVE = 2 * 12 * 16**2  # weights of the dense model's projections, and active ones of its twin
DENSE_FLOPS = 2 * ACTIVE + 4 * 16 * 16 * 2 + 2 * 16 * VOCAB  # linear + attention + logits, per token
WIDE_FLOPS = 2 * ACTIVE + 4 * 16 * 32 * 2 + 2 * 32 * VOCAB  # hidden 32
WIDE_LINEAR_PARAMS = 2 * 12 * 32**2


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A RigL run started as the README says, and what it printed."""
    folder = tmp_path_factory.mktemp("launched")
    recipe = tiny_recipe(folder, RIGL, max_steps=8)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "recipes/pretrain.py", str(recipe)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout + done.stderr


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe file of a finished dense run, beside its output folder `run`."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("dense"), max_steps=4)
    pretrain.main([str(recipe)])
    return recipe


# ---- what a run leaves behind


def test_summary_of_a_launched_run(launched: tuple[Path, str]) -> None:
    run, printed = launched
    summary = read_json(run / "summary.json")
    assert f"wrote {run / 'summary.json'}" in printed
    assert 0 < summary["eval_loss"] < math.log(VOCAB)  # better than chance
    assert summary["perplexity"] == pytest.approx(math.exp(summary["eval_loss"]))
    held_out = run.parent / "held_out.txt"
    assert summary["num_eval_tokens"] == 8 * 16
    tokens = len(AutoTokenizer.from_pretrained(run)(held_out.read_text())["input_ids"]) + 1  # end of text
    bits = summary["eval_loss"] / math.log(2) * tokens / held_out.stat().st_size
    assert summary["bits_per_byte"] == pytest.approx(bits)
    assert summary["step"] == 8
    assert summary["train_tokens"] == 8 * TOKENS_PER_STEP
    assert summary["linear_active_params"] == ACTIVE
    assert summary["linear_sparsity"] == 0.75
    assert summary["stored_params"] == WIDE_LINEAR_PARAMS + VOCAB * 32 + 16 * 32 + 2 * 32 * (4 + 9) + 2 * 32
    assert summary["num_ranks"] == 1
    assert 0 < summary["timed_seconds"] + summary["warm_up_seconds"] < summary["wall_seconds"] < 200
    assert summary["timed_steps"] == 7  # all but the first
    timed_tokens = summary["timed_steps"] * TOKENS_PER_STEP
    assert summary["tokens_per_second"] == pytest.approx(timed_tokens / summary["timed_seconds"])
    assert summary["config"]["training"]["max_steps"] == 8
    assert summary["config"]["sparse_ift"]["dst"]["algorithm"] == "rigl"
    assert {"python", "sparseift_llm", "torch", "transformers", "accelerate"} <= summary["versions"].keys()
    assert summary["versions"]["torch"] == torch.__version__


def test_metrics_of_a_launched_run(launched: tuple[Path, str]) -> None:
    lines = curve(launched[0])
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert {line["step"] for line in lines if "eval_loss" in line} == {4, 8}
    assert [line["train_tokens"] for line in lines if "loss" in line] == [n * TOKENS_PER_STEP for n in (2, 4, 6, 8)]
    for line in lines:
        assert line.keys() >= ({"eval_loss"} if "eval_loss" in line else {"loss", "grad_norm", "learning_rate"})
    # linear warmup to 0.01 in two steps, then a cosine to 0.001 at step 8; the rate logged is the last step's
    cosine = [0.001 + 0.009 * (1 + math.cos(math.pi * done / 6)) / 2 for done in (1, 3, 5)]
    assert [line["learning_rate"] for line in lines if "loss" in line] == pytest.approx([0.005, *cosine])
    summary = read_json(launched[0] / "summary.json")
    assert lines[-1]["eval_loss"] == summary["eval_loss"]
    assert lines[-1]["train_flops"] == summary["train_flops"]


def test_the_model_of_a_launched_run_loads_as_stock_and_as_sparse(launched: tuple[Path, str]) -> None:
    run = launched[0]
    stock, sparse = AutoModelForCausalLM.from_pretrained(run), load_pretrained(run)
    assert type(stock) is GPT2LMHeadModel
    assert not sparse_layers(stock)
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert len(tokenizer) == VOCAB == stock.config.vocab_size
    assert stock.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("the sparse weight", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(stock(ids).logits, sparse(ids).logits, rtol=0, atol=0)
    layers = sparse_layers(sparse)
    assert len(layers) == 8
    for name, layer in layers.items():
        assert int(layer.current_mask().sum()) == layer.current_mask().numel() // 4, name
        assert not layer.weight[~layer.current_mask()].any(), name
    assert tokenizer.decode(tokenizer("a sparse weight grows")["input_ids"]) == "a sparse weight grows"


def test_training_flops_of_a_rigl_run(launched: tuple[Path, str]) -> None:
    # masks change at steps 2 and 4 (stop: 0.75 x 8 = 6); each adds 2 x all weights of the widened projections
    by_hand = TOKENS_PER_STEP * (8 * 3 * WIDE_FLOPS + 2 * 2 * WIDE_LINEAR_PARAMS)
    assert by_hand == 114_032_640
    assert read_json(launched[0] / "summary.json")["train_flops"] == by_hand
    first = curve(launched[0])[0]
    assert first["train_flops"] == TOKENS_PER_STEP * (2 * 3 * WIDE_FLOPS + 2 * WIDE_LINEAR_PARAMS)


def test_training_flops_of_a_dense_run(dense_run: Path) -> None:
    summary = read_json(dense_run.parent / "run" / "summary.json")
    assert summary["train_flops"] == TOKENS_PER_STEP * 4 * 3 * DENSE_FLOPS == 34_799_616
    assert summary["linear_sparsity"] == 0
    assert summary["linear_active_params"] == ACTIVE
    assert not list((dense_run.parent / "run").glob("**/sparse_masks*"))


def test_training_tokens_are_those_the_model_has_seen(tmp_path: Path, monkeypatch: Any) -> None:
    """Epochs are cut to whole steps, so that no batch at their end is smaller and none is counted twice."""
    seen = []

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["input_ids"].numel())
        return original(self, model, inputs, *args, **kwargs)

    original = Pretrainer.training_step
    monkeypatch.setattr(Pretrainer, "training_step", training_step)
    pretrain.main([str(tiny_recipe(tmp_path, num_train_epochs=1, max_steps=12, save_strategy="no"))])
    assert len(set(seen)) == 1, "every step is of the same size, also across epochs"
    assert read_json(tmp_path / "run" / "summary.json")["train_tokens"] == sum(seen)


def test_activation_checkpointing_and_bf16(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = tiny_recipe(tmp_path, RIGL, bf16=True, activation_checkpointing=True, save_strategy="no")
    pretrain.main([str(recipe), "--max_steps", "3", "--logging_steps", "1", "--stop_fraction", "1.0"])
    losses = [line["loss"] for line in curve(run) if "loss" in line]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    # one update, at step 2
    by_hand = TOKENS_PER_STEP * (3 * 3 * WIDE_FLOPS + 2 * WIDE_LINEAR_PARAMS)
    assert read_json(run / "summary.json")["train_flops"] == by_hand


# ---- refusals


def refusal(*words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        pretrain.main(list(words))
    assert isinstance(caught.value.code, str)
    assert caught.value.code.startswith("pretrain: ")
    return caught.value.code


def test_an_existing_run_is_not_overwritten(dense_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (dense_run.parent / "run").rglob("*")}
    message = refusal(str(dense_run))
    assert f"{dense_run.parent / 'run'} already holds a run; continue it with --resume_from_checkpoint true" in message
    assert {path: path.stat().st_mtime_ns for path in (dense_run.parent / "run").rglob("*")} == before
    assert "delete" not in message


def test_a_run_that_ended_before_its_first_checkpoint_may_be_deleted(tmp_path: Path) -> None:
    """It may have ended because its model cannot be trained; then it cannot be resumed with another one either."""
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert "holds a run (it has no checkpoint, so you may also delete it, and start anew); continue" in refusal(
        str(recipe)
    )


@pytest.mark.parametrize(
    ("section", "override", "change"),
    [
        ("model", ["--model.config.n_layer", "1"], "model.config.n_layer was 2, now 1;"),
        ("model", ["--init_truncation", "2.0"], "model.init_truncation was None, now 2.0;"),
        ("data", ["--max_eval_sequences", "4"], "data.max_eval_sequences was 8, now 4;"),
        ("sparse_ift", ["--sparse_ift", "{sparsity: 0.5}"], "sparse_ift was None, now a section;"),
    ],
)
def test_another_model_data_or_sparsity_is_not_resumed(
    dense_run: Path, section: str, override: list[str], change: str
) -> None:
    record = (dense_run.parent / "run" / "recipe.json").read_text()
    message = refusal(str(dense_run), "--resume_from_checkpoint", "true", *override)
    assert f"was begun with another {section}: {change}" in message
    assert (dense_run.parent / "run" / "recipe.json").read_text() == record


@pytest.mark.parametrize("key", [key for key in IN_OPTIMIZER_STATE if key not in ("head_lr_factor", "optim_args")])
def test_a_setting_in_the_optimizer_state_cannot_change_on_resume(dense_run: Path, key: str) -> None:
    """The optimizer's state would win, while recipe.json and summary.json recorded the new value."""
    other = "adafactor" if key == "optim" else "0.5"
    run = dense_run.parent / "run"
    record = (run / "recipe.json").read_text()
    resume = (str(dense_run), "--resume_from_checkpoint", "true")
    message = refusal(*resume, f"--training.{key}", other)
    defaults = {**vars(LearningRateFactors()), **vars(TrainingArguments("x", use_cpu=True))}
    was = json.loads(record)["training"].get(key, defaults[key])
    assert f"training.{key} was {was!r} when {run} was begun, and is now " in message or key == "optim"
    assert f"the new value would be ignored. Resume with {key}=" in message
    assert (run / "recipe.json").read_text() == record
    pretrain.prepare_run([*resume, *(["--learning_rate", "0.01"] if key == "learning_rate" else [])])  # the same again


@pytest.mark.parametrize("key", ["seed", "data_seed"])
def test_text_keeps_its_order_on_resume(key: str, dense_run: Path, tmp_path: Path) -> None:
    """Text that was seen before would come again, and other text never. Another text has another order anyhow."""
    run = dense_run.parent / "run"
    resume = [str(dense_run), "--resume_from_checkpoint", "true"]
    was = read_json(run / "recipe.json")["training"].get("seed", 42)
    assert f"training.{key} was {was} when {run} was begun, and is now 7" in refusal(*resume, f"--{key}", "7")
    pretrain.prepare_run([*resume, f"--{key}", str(was)])  # the same seed, named for what it was
    checkpoint = next(run.glob("checkpoint-*"))
    new = [str(dense_run), "--output_dir", str(tmp_path / "new"), "--resume_from_checkpoint", str(checkpoint)]
    assert f"training.{key} was {was} when" in refusal(*new, f"--{key}", "7")
    pretrain.prepare_run([*new, f"--{key}", "7", "--max_eval_sequences", "4"])


def test_an_optimizer_s_own_options_cannot_change_on_resume(dense_run: Path, tmp_path: Path) -> None:
    """Of AdamW there are none, so the run says that it was trained by another optimizer."""
    shutil.copytree(dense_run.parent / "run", tmp_path / "run")
    record = read_json(tmp_path / "run" / "recipe.json")
    record["training"] |= {"optim": "sgd", "optim_args": "momentum=0.9"}
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(record))
    words = [
        str(dense_run),
        "--output_dir",
        str(tmp_path / "run"),
        "--resume_from_checkpoint",
        "true",
        "--optim",
        "sgd",
    ]
    message = refusal(*words, "--optim_args", "momentum=0.5")
    assert "training.optim_args was 'momentum=0.9' when" in message
    pretrain.prepare_run([*words, "--optim_args", "momentum=0.9"])


def test_a_rate_for_a_tied_head_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    message = refusal(str(tiny_recipe(tmp_path)), "--head_lr_factor", "2")
    assert "head_lr_factor=2.0 is given, but GPT2LMHeadModel has an output head tied to its embedding" in message
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_embeddings_are_trained_at_their_own_rate(tmp_path: Path) -> None:
    """Adam's first steps go as far as the rate says, and only embeddings and positions have another rate."""
    moved = {}
    words = [str(tiny_recipe(tmp_path)), "--max_steps", "4", "--eval_strategy", "no"]
    for factor in ("1", "3"):
        output = tmp_path / factor
        run = pretrain.prepare_run([*words, "--output_dir", str(output), "--embedding_lr_factor", factor])
        before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
        pretrain.finish(run, ["test"])
        moved[factor] = {
            name: (value - before[name]).abs().max().item() for name, value in run.model.named_parameters()
        }
        record = read_json(output / "recipe.json")
        assert record["training"]["embedding_lr_factor"] == float(factor)
        log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        rates = [(line["learning_rate"], line.get("embedding_learning_rate")) for line in log if "loss" in line]
        assert all(rate <= 0.01 for rate, _ in rates)
        assert [own for _, own in rates] == [3 * rate if factor == "3" else None for rate, _ in rates]
        assert not any("head_learning_rate" in line for line in log)
    ratios = {name: moved["3"][name] / moved["1"][name] for name in moved["1"]}
    for name, ratio in ratios.items():
        is_embedding = name in ("transformer.wte.weight", "transformer.wpe.weight")
        assert (2.5 < ratio < 3.5) if is_embedding else (0.7 < ratio < 1.4), (name, ratio)


def test_settings_of_another_folder_s_checkpoint_count_too(dense_run: Path, tmp_path: Path) -> None:
    checkpoint = next((dense_run.parent / "run").glob("checkpoint-*"))
    words = [str(dense_run), "--output_dir", str(tmp_path / "new"), "--resume_from_checkpoint", str(checkpoint)]
    assert "training.weight_decay was 0.0 when" in refusal(*words, "--weight_decay", "0.1")


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_with_a_state_cannot_be_changed_to(schedule: str, dense_run: Path) -> None:
    words = ["--resume_from_checkpoint", "true", "--lr_scheduler_type", schedule, "--lr_scheduler_kwargs", "{}"]
    assert "training.lr_scheduler_type was 'cosine_with_min_lr' when" in refusal(str(dense_run), *words)


# ---- resuming with steps of another size, or from another run's checkpoint

BATCH, ACCUMULATION = "--per_device_train_batch_size", "--gradient_accumulation_steps"


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("words", [[BATCH, "2"], [ACCUMULATION, "4"], [BATCH, "1", ACCUMULATION, "4"]])
def test_steps_keep_their_size_on_resume(words: list[str], is_old: bool, dense_run: Path, tmp_path: Path) -> None:
    """Otherwise `train_tokens` would count the earlier steps by the size of the later ones."""
    run = tmp_path / "run"
    shutil.copytree(dense_run.parent / "run", run)
    record = read_json(run / "recipe.json")
    assert record.pop("sequences_per_step") == 8
    if is_old:  # version 0.1 did not write it down, but the tokens so far
        (run / "recipe.json").write_text(json.dumps(record))
    resume = [str(dense_run), "--output_dir", str(run), "--resume_from_checkpoint", "true"]
    message = refusal(*resume, *words)
    assert f"an optimizer step of {run} had 8 sequences, and would now have " in message
    pretrain.prepare_run([*resume, BATCH, "2", ACCUMULATION, "4"])  # as many in all


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--auto_find_batch_size", "true"], "training.auto_find_batch_size=True changes the batch"),
        (["--accelerator_config", "{split_batches: true}"], "split_batches=True makes per_device_train_batch_size"),
    ],
)
def test_steps_of_no_fixed_size_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    assert message in refusal(str(tiny_recipe(tmp_path)), *words)


@pytest.mark.parametrize("has_record", [True, False])
def test_a_checkpoint_of_another_model_is_refused(
    has_record: bool, dense_run: Path, launched: tuple[Path, str], tmp_path: Path
) -> None:
    sparse_recipe = str(launched[0].parent / dense_run.name)
    checkpoints = {}
    for name, run in (("dense", dense_run.parent / "run"), ("sparse", launched[0])):
        shutil.copytree(run, tmp_path / name)
        checkpoints[name] = str(next((tmp_path / name).glob("checkpoint-*")))
        if not has_record:
            (tmp_path / name / "recipe.json").unlink()
    new = ["--output_dir", str(tmp_path / "new"), "--resume_from_checkpoint"]
    sparse = [sparse_recipe, *new, checkpoints["sparse"]]
    dense = [sparse_recipe, *new, checkpoints["dense"]]
    for words in (dense, [*sparse, "--sparse_ift.sparsity", "0.5"], [*sparse, "--sparse_ift", "null"]):
        assert re.search("is a checkpoint of another (sparse_ift|model)", refusal(*words)), words
    assert not (tmp_path / "new" / "recipe.json").exists()
    pretrain.prepare_run(sparse)


def test_a_tracker_that_is_not_installed_is_refused_before_text_is_read(tmp_path: Path) -> None:
    missing = next(iter(INTEGRATION_TO_CALLBACK.keys() - {*get_available_reporting_integrations(), "flyte"}))
    message = refusal(str(tiny_recipe(tmp_path)), "--report_to", f"[tensorboard, {missing}]")
    assert f"training.report_to={missing!r} needs a package that is not installed" in message
    assert "training.report_to='wandbe' is not one of" in refusal(str(tiny_recipe(tmp_path)), "--report_to", "wandbe")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--lr_scheduler_type=linear", "--lr_scheduler_kwargs={num_cycles: 2}"),
            "{'num_cycles': 2} is not for .*linear",
        ),
        (("--lr_scheduler_type=cosine_with_min_lr", "--lr_scheduler_kwargs={}"), "{} is not for .*cosine_with_min_lr"),
        (("--optim=adamw_bnb_8bit",), "training.optim='adamw_bnb_8bit' needs a package"),
        (("--optim=grokadamw",), "training.optim='grokadamw' with .*install grokadamw"),
        (("--optim_args=foo=1",), "the Trainer reads no 'foo' for training.optim='adamw_torch_fused'"),
        (("--optim=sgd", "--optim_args=momentum=0.9,foo=1"), "reads no 'foo' for training.optim='sgd'"),
        (("--optim=sgd", "--optim_args=momentum"), "optim='sgd' with training.optim_args='momentum': not enough"),
        (("--optim=sgd", "--optim_args=momentum=much"), "could not convert string to float: 'much'"),
        (("--deepspeed=x.json",), "training.deepspeed needs a package"),
        (("--use_liger_kernel=true",), "training.use_liger_kernel needs a package"),
        (("--model.config.activation_function=nope",), "model.config: gpt2 knows no .*nope"),
    ],
)
def test_what_the_trainer_would_find_out_late_is_refused_in_words(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    assert re.search(message, refusal(str(tiny_recipe(tmp_path)), *words))


def test_options_that_an_optimizer_takes_are_no_mistake(tmp_path: Path) -> None:
    words = ("--optim=sgd", "--optim_args=momentum=0.9, nesterov=true, dampening=0")
    args = training_arguments(load_recipe(str(tiny_recipe(tmp_path)), words))
    kwargs = Pretrainer.get_optimizer_cls_and_kwargs(args)[1]
    assert (kwargs["momentum"], kwargs["nesterov"], kwargs["dampening"]) == (0.9, True, 0)


def test_a_run_without_a_checkpoint_may_change_its_optimizer(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    pretrain.prepare_run([str(recipe)])  # killed before its first checkpoint
    again = pretrain.prepare_run([str(recipe), "--resume_from_checkpoint", "true", "--learning_rate", "0.5"])
    assert again.resume_from is None
    assert read_json(tmp_path / "run" / "recipe.json")["training"]["learning_rate"] == 0.5


def test_a_tilde_in_the_output_folder_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints, log and records stand in the same folder, and a resume finds them."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    words = [str(tiny_recipe(tmp_path)), "--output_dir", "~/run", "--max_steps", "4", "--eval_steps", "4"]
    pretrain.main(words)
    run = tmp_path / "home" / "run"
    names = {path.name for path in run.iterdir()}
    assert {"checkpoint-4", "metrics.jsonl", "recipe.json", "summary.json", "model.safetensors"} <= names
    assert not (tmp_path / "~").exists()
    assert read_json(run / "recipe.json")["training"]["output_dir"] == str(run)
    _, _, resume_from, _ = pretrain.prepare([*words, "--resume_from_checkpoint", "true"])
    assert resume_from == run / "checkpoint-4"
    _, _, resume_from, _ = pretrain.prepare([*words, "--resume_from_checkpoint", "~/run/checkpoint-4"])
    assert resume_from == run / "checkpoint-4"


@pytest.mark.parametrize("corpus", ["{folder}", "{folder}/**/*.json*"])
def test_a_corpus_that_holds_the_output_folder_is_refused(corpus: str, tmp_path: Path) -> None:
    """A resumed run would read its own records as text."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    words = ["--corpus", corpus.replace("{folder}", str(tmp_path)), "--eval_corpus", "null"]
    message = refusal(str(tiny_recipe(tmp_path)), *words)
    assert f"covers training.output_dir='{tmp_path / 'run'}', so that a resumed run would read" in message
    assert not (tmp_path / "run").exists()


def check_record(recipe: Path, record: dict[str, Any] | str) -> None:
    """What pretrain.py does about the record of a run that is to go on."""
    path = recipe.parent / "run" / "recipe.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    loaded = load_recipe(recipe)
    pretrain.check_recipe(loaded, SimpleNamespace(fingerprint="f00"), training_arguments(loaded))


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, RIGL)
    record = {**load_recipe(recipe).to_dict(), "data_fingerprint": "f00"}
    for section, option in (("model", "from_pretrained"), ("sparse_ift", "balance_heads")):
        del record[section][option]  # which it did not have
    check_record(recipe, record)
    assert read_json(tmp_path / "run" / "recipe.json")["sparse_ift"]["balance_heads"] is False
    record["training"] = {"an_argument_that_transformers_dropped": 1}
    check_record(recipe, record)
    record["sparse_ift"]["sparsity"] = 0.5
    with pytest.raises(ValueError, match="begun with another sparse_ift"):
        check_record(recipe, record)


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        "{}",
        '{"model": 1, "data": {}, "sparse_ift": null}',
        '{"model": {"nme": "a"}, "data": {}, "sparse_ift": null}',
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, damage: str) -> None:
    with pytest.raises(ValueError, match=r"recipe\.json is damaged, or of another version"):
        check_record(tiny_recipe(tmp_path), damage)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.config.n_lyer", "1"], "gpt2 has no field 'n_lyer'"),
        (["--data.seq_len", "17"], "data.seq_len=17 is above the model's 16 positions"),
        (["--model.name", "gpt3-smal"], "'gpt3-smal' is not a preset"),
        (["--lr_scheduler_type", "cosin"], "cosin"),
        (["--eval_strategy", "sometimes"], "sometimes"),
        (["--learning_rte", "1"], "unknown option --learning_rte; did you mean 'learning_rate'?"),
        (["--data.eval_corpus", "{folder}/train.txt"], "train.txt is in both corpus and eval_corpus"),
        (["--sparse_ift", "{scope: ffn, targets: [q]}"], "widens only mlp_in and mlp_out"),
        (["--resume_from_checkpoint", "{folder}/checkpoint-3"], "checkpoint-3"),
        (["--output_dir", "null"], "output_dir"),
    ],
)
def test_mistakes_end_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", _offline)
    recipe = tiny_recipe(tmp_path)
    assert message in refusal(str(recipe), *(word.replace("{folder}", str(tmp_path)) for word in words))


def _offline(name: str, **_: Any) -> Any:
    raise OSError(f"{name} cannot be reached")


@pytest.mark.parametrize("words", [[], ["--learning_rate", "1"]])
def test_a_recipe_must_come_first(words: list[str]) -> None:
    assert "usage: sparseift pretrain RECIPE.yaml" in refusal(*words)


def test_a_missing_recipe_file(tmp_path: Path) -> None:
    assert "none.yaml" in refusal(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("resume", ["null", "true"])
@pytest.mark.parametrize("mistake", [["--corpus", "{folder}/short.txt"], ["--model.config.n_lyer", "2"]])
def test_a_start_that_failed_is_not_a_run(tmp_path: Path, mistake: list[str], resume: str) -> None:
    """A typing error in a first command must not stand in the way of the corrected one."""
    words = [str(tiny_recipe(tmp_path)), "--resume_from_checkpoint", resume]
    (tmp_path / "short.txt").write_text("a")
    refusal(*words, *(word.replace("{folder}", str(tmp_path)) for word in mistake))
    _, _, resume_from, _ = pretrain.prepare(words)
    assert resume_from is None


def test_a_run_is_not_resumed_on_other_text_of_the_same_name(tmp_path: Path) -> None:
    words = [str(tiny_recipe(tmp_path)), "--resume_from_checkpoint", "true"]
    pretrain.main([*words, "--max_steps", "4"])
    with (tmp_path / "train.txt").open("a") as file:
        file.write(" and more")
    assert "resume with the same recipe and text" in refusal(*words)


# ---- without the Trainer


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps mixed precision and accumulation of the process's first Accelerator."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.mark.usefixtures("_fresh_accelerate")
def test_the_plain_accelerate_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    loop = load_script("recipes/accelerate_loop.py")
    train_file, held_out = write_corpus(tmp_path)
    tiny = DataConfig(str(train_file), eval_corpus=str(held_out), vocab_size=VOCAB, seq_len=16)
    monkeypatch.setattr(loop, "load_data", lambda _, folder: load_data(tiny, folder))
    monkeypatch.setattr(loop, "BATCH", 4)
    loss = loop.main(str(tmp_path / "out"), steps=20)
    assert 0 < loss < math.log(VOCAB)
    assert "step 20: loss" in capsys.readouterr().out
    model = load_pretrained(tmp_path / "out")
    layers = sparse_layers(model)
    assert layers
    for name, layer in layers.items():
        assert int(layer.current_mask().sum()) == layer.num_active, name
        assert not layer.weight[~layer.current_mask()].any(), name
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["sparse_ift"]["transformation"]["sparsity"] == 0.75
    )


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning")
def test_the_plain_trainer_script_and_its_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("recipes/trainer_script.py")
    train_file, held_out = write_corpus(tmp_path)
    tiny = DataConfig(str(train_file), eval_corpus=str(held_out), vocab_size=VOCAB, seq_len=16)
    monkeypatch.setattr(script, "load_data", lambda _, folder: load_data(tiny, folder))
    loss = script.main(str(tmp_path / "run"), steps=20)
    assert 0 < loss < math.log(VOCAB)
    assert "wide, scope model: hidden 64->128, FFN 256->512; 75% of" in capsys.readouterr().out
    table = comparison_table([tmp_path / "run"])
    assert f"| held-out loss (nats/token) | {loss:.4f} |" in table
    assert "| linear sparsity | 0.7500 |" in table
    assert "| active linear parameters | 98,304 |" in table  # 2 layers of 12 x 64 x 64, as in the dense model
    loss_picture([tmp_path / "run"], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0
