"""eval/leaderboard.py: result files, sparse checkpoints, resuming, two processes, and errors for the user."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RwkvConfig, RwkvForCausalLM

from sparseift_llm.evaluation import builtin, command
from sparseift_llm.evaluation.language_model import SplitLM, load_model
from sparseift_llm.evaluation.model_facts import check_held_out, describe_model, weights_digest
from sparseift_llm.evaluation.task_loading import named_suite
from tests.helpers.evaluation import save_model, tiny_gpt2, tokenizer, write_leaderboard_data
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_within

SPARSE: dict[str, Any] = {"sparsity": 0.75, "init": "paper"}
BLOCK: dict[str, Any] = {**SPARSE, "structure": "block", "block_size": 16}
SECONDS = 240  # a hang is a failure
BUILTIN = ["--suite", "builtin", "--limit", "12", "--batch-size", "12"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_leaderboard_data(tmp_path_factory.mktemp("data"), ["anatomy"], num_items=20)


def leaderboard(*words: str | Path) -> None:
    command.main([str(word) for word in words])


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def test_a_result_file_says_what_was_evaluated(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "b.json"
    output.parent.mkdir()
    leaderboard("--model", model, *BUILTIN, "--output", output)
    found = read(output)
    assert found["suite"] == "builtin"
    for line in found["results"].values():
        assert {"metric", "value", "stderr", "num_fewshot", "num_items", "task_hash", "version"} <= line.keys()
        assert line["num_items"] == 12
    lines = [found["results"][name]["value"] for name in ("builtin_continuation", "builtin_identifier")]
    assert found["average"] == pytest.approx(sum(lines) / 2)
    assert found["model"]["sha256"] == weights_digest(tiny_gpt2())
    assert found["model"]["linear_sparsity"] == 0
    assert found["model"]["forward_flops_per_token"] > 0
    assert {"lm_eval", "torch", "transformers", "sparseift_llm", "python"} <= found["versions"].keys()
    assert found["command"].startswith("eval/leaderboard.py --model ")
    assert found["limit"] == 12
    assert "commit" in found
    for task in found["subtasks"]:
        items = [json.loads(text) for text in (output.parent / "b.items" / f"{task}.jsonl").read_text().splitlines()]
        assert [item["id"] for item in items] == list(range(12))
    assert not (output.parent / "b.progress.json").exists()


@pytest.mark.parametrize("structure", ["unstructured", "block"])
def test_sparse_checkpoints_load_directly(tmp_path: Path, structure: str) -> None:
    options = BLOCK if structure == "block" else SPARSE
    folder = save_model(tmp_path / "sparse", sparse_ift=options)
    leaderboard("--model", folder, "--suite", "builtin", "--only", "builtin_bits_per_byte", "--limit", "5")
    found = read(folder / "eval_builtin.json")
    assert found["model"]["linear_sparsity"] == pytest.approx(0.75, abs=0.01)
    assert set(found["results"]) == {"builtin_bits_per_byte"}
    assert "average" not in found
    loaded, _ = load_model(str(folder))
    torch.manual_seed(0)
    tokens = torch.randint(len(tokenizer()), (2, 20))
    expected = tiny_gpt2(sparse_ift=options).eval()(tokens).logits
    torch.testing.assert_close(loaded.eval()(tokens).logits, expected)


def test_sparsity_is_measured_in_stock_models_too() -> None:
    stock = tiny_gpt2()
    with torch.no_grad():
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            weight = stock.get_submodule(f"transformer.h.0.{name}").weight
            weight[: weight.shape[0] // 2] = 0
    found = describe_model(stock, "some/model", 64)
    assert found["linear_sparsity"] == 0.5
    assert found["linear_active_params"] * 2 == found["stored_params"] * 0 + 12 * 32 * 32


def test_what_the_training_run_left_behind_is_recorded(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "run")
    summary = {
        "train_flops": 10,
        "train_tokens": 5,
        "eval_loss": 1.5,
        "commit": "abc",
        "config": {"training": {"seed": 3}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    run = describe_model(tiny_gpt2(), str(folder), 64)["run"]
    assert run == {"train_flops": 10, "train_tokens": 5, "eval_loss": 1.5, "commit": "abc", "seed": 3}


class Killed(Exception):  # noqa: N818 - stands for a kill
    pass


def test_an_interrupted_evaluation_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole.json"
    leaderboard("--model", model, *BUILTIN, "--output", whole)
    output = tmp_path / "f.json"
    asked: list[str] = []
    stock = command.evaluate_task

    def until(stop: str | None) -> Any:
        def evaluate(lm: Any, name: str, *rest: Any, **options: Any) -> Any:
            if name == stop:
                raise Killed
            asked.append(name)
            return stock(lm, name, *rest, **options)

        return evaluate

    words = ["--model", str(model), *BUILTIN, "--output", str(output)]
    monkeypatch.setattr(command, "evaluate_task", until("builtin_bits_per_byte"))
    with pytest.raises(Killed):
        command.main(words)
    assert not output.exists()
    with pytest.raises(SystemExit, match=r"f.progress.json is there already; go on with --resume"):
        command.main(words)
    monkeypatch.setattr(command, "evaluate_task", until(None))
    command.main([*words, "--resume"])
    assert asked == ["builtin_continuation", "builtin_identifier", "builtin_bits_per_byte"]  # none twice
    for key in ("results", "subtasks", "average", "settings"):
        assert read(output)[key] == read(whole)[key], key
    for path in (tmp_path / "whole.items").iterdir():
        assert path.read_text() == (tmp_path / "f.items" / path.name).read_text()
    command.main([*words, "--resume"])  # nothing is left to do
    assert len(asked) == 3
    with pytest.raises(SystemExit, match=r"f.json is there already; go on with --resume, or give another --output"):
        command.main(words)
    with pytest.raises(SystemExit, match=r"f.json was begun with another limit: 12, now 13; give another --output"):
        command.main([*words, "--limit", "13", "--resume"])


def test_another_model_is_not_gone_on_with(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "f.json"
    only = ["--suite", "builtin", "--only", "builtin_bits_per_byte", "--limit", "3", "--output", str(output)]
    leaderboard("--model", model, *only)
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit, match="was begun with another model"):
        leaderboard("--model", other, *only, "--resume")


def test_two_processes_give_the_same_scores(model: Path, data: Path, tmp_path: Path) -> None:
    """accelerate launch against this process: every score and every item's record, to the bit."""
    tasks = "arc_challenge,gsm8k,truthfulqa_mc2,winogrande"
    shared = ["--model", str(model), "--data-dir", str(data), "--limit", "13", "--batch-size", "4"]
    # truthfulqa's prompts are longest, gsm8k generates, few-shot examples are drawn at random
    names = ["--suite", "v1", "--only", tasks]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
        "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "eval/leaderboard.py",
        *shared, *names, "--output", str(tmp_path / "two.json"),
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = run_within(SECONDS, command, environment)
    assert done.returncode == 0, done.stdout[-3000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        leaderboard(*shared, *names, "--output", tmp_path / "one.json")
    finally:
        torch.set_num_threads(threads)
    one, two = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert one["subtasks"] == two["subtasks"]
    assert one["results"] == two["results"]
    assert len(one["subtasks"]) == 4
    for task in one["subtasks"]:
        assert (tmp_path / f"one.items/{task}.jsonl").read_text() == (tmp_path / f"two.items/{task}.jsonl").read_text()


def test_batches_are_dealt_whole_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dealing itself, without processes: whoever runs a batch, each request is answered once, in order."""
    lm = SplitLM(tiny_gpt2(), tokenizer(), 3)
    lm._num_processes = 2
    own: dict[int, list[int]] = {}
    for rank in range(2):
        lm._process_index = rank
        monkeypatch.setattr(lm, "_gather", lambda value, rank=rank: own.setdefault(rank, value) and [value])
        with pytest.raises(KeyError):  # the other process's answers are missing
            lm._deal(list(range(10)), lambda part: part, lambda i: i // 2, lambda members: -members[0])
    dealt = {rank: [index for index, _ in pairs] for rank, pairs in own.items()}  # type: ignore[misc, has-type]
    assert dealt == {0: [4, 5, 6, 7, 8, 9], 1: [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "no/such/folder"], "--model no/such/folder is not a folder"),
        (["--model", "owner/name", "--output", "x.json"], "owner/name is not a folder, and cannot be had from the hub"),
        (["--model", "{empty}"], "holds no model .no config.json.; in it: checkpoint-5"),
        (["--model", "{model}", "--limit", "0"], "--limit must be a whole number of at least 1, .*, got 0"),
        (["--model", "{model}", "--batch-size", "many"], "--batch-size must be a whole number .*got 'many'"),
        (["--model", "{model}", "--dtype", "float99"], "--dtype='float99' is not one of .*; did you mean 'float"),
        (["--model", "{model}", "--dtype", "int8"], "--dtype='int8' is not one of 'auto', 'float64'"),
        (["--model", "{model}", "--only", "arc"], "suite builtin has no task 'arc'"),
        (["--model", "{model}", "--output", "x.txt"], "--output must end in .json, got x.txt"),
        (["--model", "{model}", "--limit", "1", "--output", "{empty}/a/x.json"], "cannot read or write .*/a/x.lm_eval"),
        (["--model", "{model}", "--suite", "v1"], "no --data-dir is given and HF_HUB_OFFLINE"),
        (["--model", "{model}", "--suite", "v1", "--data-dir", "{empty}"], "gsm8k .main.: the folder .* is missing"),
    ],
)  # fmt: skip
def test_mistakes_are_named(model: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "a").write_text("")
    filled = [word.format(model=model, empty=tmp_path) for word in words]
    suite = [] if "--suite" in filled else ["--suite", "builtin"]
    with pytest.raises(SystemExit, match=f"leaderboard: (?s:.*){message}"):
        leaderboard(*filled, *suite)


def test_a_run_that_trained_on_the_items_is_refused(model: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "run")
    for fraction in (0.01, builtin.EVAL_FRACTION):
        (folder / "recipe.json").write_text(json.dumps({"data": {"corpus": "builtin", "eval_fraction": fraction}}))
        if fraction < builtin.EVAL_FRACTION:
            with pytest.raises(
                SystemExit, match=r"trained with data.eval_fraction=0.01, so on some of the suite's items"
            ):
                leaderboard("--model", folder, *BUILTIN)
    check_held_out(str(folder), named_suite("builtin"))


def test_an_answer_longer_than_the_context_is_named() -> None:
    lm = SplitLM(tiny_gpt2(), tokenizer(), 1)
    fits = [(("a", "b"), [1], [2] * lm.max_length)]
    assert len(lm._loglikelihood_tokens(fits)) == 1
    with pytest.raises(
        ValueError, match=f"an answer of {lm.max_length + 1} tokens, more than .* context of {lm.max_length}"
    ):
        lm._loglikelihood_tokens([*fits, (("a", "b"), [1], [2] * (lm.max_length + 1))])


def test_automatic_batch_size_on_a_cpu_keeps_logits_small() -> None:
    lm = SplitLM(tiny_gpt2(), tokenizer(), "auto")
    assert lm.batch_size == 64
    lm.model.config.vocab_size = 100_000
    assert lm._fitting_batch_size() == 2**28 // (384 * 100_000 * 4) == 1


@pytest.mark.skipif("SPARSEIFT_DATA" not in os.environ, reason="needs real evaluation sets in SPARSEIFT_DATA")
def test_the_whole_of_v1_on_real_data(tmp_path: Path) -> None:
    folder = Path(os.environ["SPARSEIFT_DATA"]) / "leaderboard"
    model = save_model(tmp_path / "model", num_positions=512)
    leaderboard(
        "--model", model, "--suite", "v1", "--data-dir", folder, "--limit", "2", "--output", tmp_path / "v1.json"
    )
    found = read(tmp_path / "v1.json")
    assert len(found["subtasks"]) == 62
    assert found["results"]["mmlu"]["num_items"] == 114
    values = {name: line["value"] for name, line in found["results"].items()}
    assert found["average"] == pytest.approx(sum(values.values()) / 6)
    assert found["average_5"] == pytest.approx((sum(values.values()) - values["gsm8k"]) / 5)
    with pytest.raises(SystemExit, match=r"TIGER-Lab/MMLU-Pro: the folder .* is missing"):
        leaderboard("--model", model, "--suite", "v2", "--data-dir", folder, "--output", tmp_path / "v2.json")


def test_a_hub_model_of_another_kind_has_no_known_cost() -> None:
    other = RwkvForCausalLM(RwkvConfig(vocab_size=50, hidden_size=8, num_hidden_layers=2))
    found = describe_model(other, "some/model", 64)
    assert found["linear_sparsity"] is None
    assert found["forward_flops_per_token"] is None
    assert "rwkv" in found["cost_unknown"]
