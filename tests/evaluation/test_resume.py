"""Going on with an evaluation: what decides scores must be the same, everything else is kept for each task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sparseift_llm.evaluation import command, result_file
from tests.helpers.evaluation import own_tasks_only, quiz_rows, quiz_words_of, save_model, tokenizer, write_quiz

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "named_suite", own_tasks_only)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = save_model(tmp_path / "model")
    loaded: Any = AutoTokenizer.from_pretrained(model)
    loaded.chat_template = TEMPLATE
    loaded.save_pretrained(model)
    return write_quiz(tmp_path)


def words_of(folder: Path, tasks: str = "quiz_choice,quiz_words", *more: str) -> list[str]:
    return ["--model", str(folder / "model"), *quiz_words_of(folder, tasks), "--output", str(folder / "f.json"), *more]


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def change_json(name: str, **values: Any) -> Callable[[Path], list[str]]:
    def change(folder: Path) -> list[str]:
        path = folder / "model" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return []

    return change


def other_weights(folder: Path) -> list[str]:
    save_model(folder / "model", seed=1)
    return keep_template(folder)


def keep_template(folder: Path) -> list[str]:
    loaded: Any = AutoTokenizer.from_pretrained(folder / "model")
    loaded.chat_template = TEMPLATE
    loaded.save_pretrained(folder / "model")
    return []


def other_vocabulary(folder: Path) -> list[str]:
    path = folder / "model" / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(values))
    return []


def other_template(folder: Path) -> list[str]:
    loaded: Any = AutoTokenizer.from_pretrained(folder / "model")
    loaded.chat_template = TEMPLATE.upper()
    loaded.save_pretrained(folder / "model")
    return []


def other_data(folder: Path) -> list[str]:
    write_quiz(folder, "jsonl", {"train": quiz_rows(8), "test": quiz_rows(12, 2)})
    return []


def other_version(folder: Path) -> list[str]:
    path = folder / "tasks" / "quiz_choice.yaml"
    path.write_text(path.read_text().replace("version: 1.0", "version: 2.0"))
    return []


def option(*words: str) -> Callable[[Path], list[str]]:
    return lambda folder: list(words)


# what is changed -> (how, the setting that is named)
CHANGES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "weights": (other_weights, "model"),
    "configuration": (change_json("config.json", layer_norm_epsilon=0.1), "config"),
    "generation": (change_json("generation_config.json", repetition_penalty=1.5), "config"),
    "vocabulary": (other_vocabulary, "tokenizer"),
    "chat template of the tokenizer": (other_template, "tokenizer"),
    "type": (option("--dtype", "bfloat16"), "model"),
    "limit": (option("--limit", "4"), "limit"),
    "share": (option("--limit", "0.5"), "limit"),
    "items": (option("--samples", '{"quiz_choice": [1, 2]}'), "samples"),
    "seeds": (option("--seed", "0,1234,1234,7"), "seeds"),
    "chat": (option("--apply-chat-template"), "apply_chat_template"),
    "instruction": (option("--system-instruction", "Be brief."), "system_instruction"),
    "generated": (option("--gen-kwargs", "max_gen_toks=4"), "gen_kwargs"),
    "data": (other_data, "data of quiz_choice"),
    "version of the task": (other_version, "version of quiz_choice"),
    "shots": (option("--num-fewshot", "2"), "num_fewshot of quiz_choice"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_setting_that_decides_scores_cannot_change(folder: Path, name: str) -> None:
    command.main(words_of(folder, "quiz_choice"))
    before = (folder / "f.json").read_text()
    change, setting = CHANGES[name]
    more = change(folder)
    with pytest.raises(
        SystemExit, match=rf"f.json was begun with another {setting}: .*, now .*; give another --output"
    ):
        command.main(words_of(folder, "quiz_choice,quiz_words", "--resume", *more))
    assert (folder / "f.json").read_text() == before


def test_another_lm_eval_cannot_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command.main(words_of(folder, "quiz_choice"))
    monkeypatch.setattr(command, "version", lambda package: "0.4.99")
    with pytest.raises(
        SystemExit, match=r"was begun with another lm_eval: 0\.4\.\d+, now 0.4.99; give another --output"
    ):
        command.main(words_of(folder, "quiz_choice,quiz_words", "--resume"))


def test_a_file_that_does_not_say_is_not_gone_on_with(folder: Path) -> None:
    """As files of version 0.1 are."""
    command.main(words_of(folder, "quiz_choice"))
    values = read(folder / "f.json")
    del values["settings"]["tokenizer"]
    (folder / "f.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit, match="does not say which tokenizer it was begun with; give another --output"):
        command.main(words_of(folder, "quiz_choice", "--resume"))


def test_provenance_is_kept_for_each_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command.main(words_of(folder, "quiz_choice", "--batch-size", "3"))
    before = read(folder / "f.json")
    stock = result_file.versions
    monkeypatch.setattr(result_file, "versions", lambda: {**stock(), "torch": "9.9"})
    command.main(words_of(folder, "quiz_choice,quiz_words", "--batch-size", "2", "--resume"))
    after = read(folder / "f.json")
    assert after["provenance"]["quiz_choice"] == before["provenance"]["quiz_choice"]
    kept, new = after["provenance"]["quiz_choice"], after["provenance"]["quiz_words"]
    assert (kept["batch_size"], new["batch_size"]) == (3, 2)
    assert (kept["versions"]["torch"], new["versions"]["torch"]) == (stock()["torch"], "9.9")
    assert "--batch-size 3" in kept["command"]
    assert "--batch-size 2" in new["command"]
    assert after["seconds"] == pytest.approx(kept["seconds"] + new["seconds"])
    assert after["versions"]["torch"] == [stock()["torch"], "9.9"]  # which compare notes
    assert after["batch_size"] == [3, 2]
    assert after["versions"]["transformers"] == stock()["transformers"]
    command.main(words_of(folder, "quiz_choice,quiz_words", "--batch-size", "1", "--resume"))  # nothing is left to do
    again = read(folder / "f.json")
    assert {key: again[key] for key in ("provenance", "seconds", "versions", "batch_size", "results")} == {
        key: after[key] for key in ("provenance", "seconds", "versions", "batch_size", "results")
    }


def test_the_tokenizers_digest_is_the_same_every_time(folder: Path) -> None:
    from sparseift_llm.evaluation.model_facts import tokenizer_digest

    digests = {tokenizer_digest(AutoTokenizer.from_pretrained(folder / "model")) for _ in range(2)}
    assert len(digests) == 1
    assert digests != {tokenizer_digest(tokenizer())}  # which has no template


def test_prompts_go_into_the_chat_template(folder: Path) -> None:
    """Examples are turns of the chat, or with --no-fewshot-as-multiturn a part of the one question."""
    prompts = {}
    for name, more in (("turns", []), ("one", ["--no-fewshot-as-multiturn"])):
        output = folder / f"{name}.json"
        words = ["--model", str(folder / "model"), *quiz_words_of(folder, "quiz_words"), "--output", str(output)]
        command.main([*words, "--limit", "1", "--num-fewshot", "2", "--apply-chat-template", *more])
        (path,) = output.with_suffix(".lm_eval").rglob("samples_*.jsonl")
        prompts[name] = json.loads(path.read_text())["arguments"]["gen_args_0"]["arg_0"]
        (path,) = output.with_suffix(".lm_eval").rglob("results_*.json")
        assert json.loads(path.read_text())["chat_template"] == TEMPLATE
    assert (prompts["turns"].count("user: "), prompts["turns"].count("assistant: ")) == (3, 2)
    assert (prompts["one"].count("user: "), prompts["one"].count("assistant: ")) == (1, 0)
