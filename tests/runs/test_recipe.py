"""Recipe files and overrides: what they become, and what each mistake is told. No model or data is touched."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseift_llm import DSTConfig, SparseIFTConfig
from sparseift_llm.config import Doped, Wide
from sparseift_llm.config.as_begun import BEFORE, BEFORE_IN_DST
from sparseift_llm.data.options import DataConfig
from sparseift_llm.runs.preparation import as_it_was_begun
from sparseift_llm.runs.recipe import ModelConfig, Recipe, load_recipe, recipe_options, recorded_recipe

MINIMAL = "training: {output_dir: out}\n"
DECAYING = (
    "training: {output_dir: out, lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 0.1}, "
    "max_steps: 100, logging_steps: 10, save_steps: 50}\n"
)
NO_SCHEDULE = "lr_decay_steps needs lr_scheduler_type: cosine_with_min_lr and min_lr_rate in lr_scheduler_kwargs"


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def test_the_smallest_recipe_has_the_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert recipe == Recipe(ModelConfig(), DataConfig(), None, {"output_dir": "out"}, None)


def test_every_section(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        f"""
model: {{name: llama-160m, config: {{num_hidden_layers: 2}}, init_truncation: 2}}
data: {{corpus: text/, vocab_size: 300, seq_len: 64}}
sparse_ift: {{sparsity: 0.5, exclude: [q], seed: 3, dst: {{algorithm: gmp}}}}
{DECAYING}
lr_decay_steps: 90
""",
    )
    assert recipe.model == ModelConfig("llama-160m", {"num_hidden_layers": 2}, 2.0)
    assert recipe.data == DataConfig("text/", vocab_size=300, seq_len=64)
    assert recipe.sparse_ift == SparseIFTConfig(
        sparsity=0.5, exclude=("q",), seed=3, seq_len=64, dst=DSTConfig(algorithm="gmp"), init="preserve"
    )
    assert recipe.training["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert recipe.training["save_steps"] == 50
    assert recipe.lr_decay_steps == 90


def test_to_dict_is_a_recipe_again(tmp_path: Path) -> None:
    text = f"sparse_ift: {{targets: [mlp_in, mlp_out]}}\n{DECAYING}lr_decay_steps: 90\n"
    recipe = load(tmp_path, text)
    written = json.loads(json.dumps(recipe.to_dict()))
    assert load(tmp_path, yaml.safe_dump(written)) == recipe
    assert load(tmp_path, yaml.safe_dump(load(tmp_path, MINIMAL).to_dict())) == load(tmp_path, MINIMAL)


def test_a_recipe_file_is_not_changed(tmp_path: Path) -> None:
    load(tmp_path, MINIMAL, "--seed", "5")
    assert (tmp_path / "recipe.yaml").read_text() == MINIMAL


# ---- what sparse_ift takes from the other sections


def test_sparse_ift_takes_seed_and_length_from_the_run(tmp_path: Path) -> None:
    text = "data: {seq_len: 64}\nsparse_ift: {}\ntraining: {output_dir: out, seed: 7}\n"
    config = load(tmp_path, text).sparse_ift
    assert config is not None
    assert (config.seed, config.seq_len) == (7, 64)


def test_sparse_ift_without_a_training_seed_has_that_of_the_trainer(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL + "sparse_ift: {}\n").sparse_ift
    assert config is not None
    assert (config.seed, config.seq_len) == (42, DataConfig().seq_len)


def test_sparse_ift_may_say_otherwise(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL + "sparse_ift: {seed: 3, seq_len: 32}\n", "--seed", "9").sparse_ift
    assert config is not None
    assert (config.seed, config.seq_len) == (3, 32)


def test_overriding_the_seed_moves_the_masks_too(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL + "sparse_ift: {}\n", "--seed", "9")
    assert recipe.sparse_ift is not None
    assert recipe.sparse_ift.seed == recipe.training["seed"] == 9


# ---- overrides


@pytest.mark.parametrize(
    ("words", "training"),
    [
        (["--training.learning_rate", "2e-3"], {"learning_rate": 0.002}),
        (["--learning_rate", "2e-3"], {"learning_rate": 0.002}),
        (["--learning_rate=2e-3"], {"learning_rate": 0.002}),
        (["--learning_rate", "1"], {"learning_rate": 1.0}),
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--max_steps=-1"], {"max_steps": -1}),
        (["--seed", "3"], {"seed": 3}),
        (["--bf16", "true"], {"bf16": True}),
        (["--bf16=false", "--seed=4"], {"bf16": False, "seed": 4}),
        (["--eval_strategy", "no"], {"eval_strategy": "no"}),
        (["--report_to", "[tensorboard, wandb]"], {"report_to": ["tensorboard", "wandb"]}),
        (["--lr_scheduler_kwargs", "{min_lr_rate: 0.2}"], {"lr_scheduler_kwargs": {"min_lr_rate": 0.2}}),
        (["--run_name", "a=b"], {"run_name": "a=b"}),
        (["--run_name=a=b"], {"run_name": "a=b"}),
        (["--run_name", "'12'"], {"run_name": "12"}),
        (["--run_name", "null"], {"run_name": None}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
        (["--resume_from_checkpoint", "true"], {"resume_from_checkpoint": True}),
        (["--resume_from_checkpoint", "runs/a/checkpoint-5"], {"resume_from_checkpoint": "runs/a/checkpoint-5"}),
        (["--resume_from_checkpoint", "null"], {"resume_from_checkpoint": None}),
        (["--output_dir", "elsewhere"], {"output_dir": "elsewhere"}),
    ],
)
def test_training_overrides(tmp_path: Path, words: list[str], training: dict[str, Any]) -> None:
    found = load(tmp_path, MINIMAL, *words).training
    assert found == {"output_dir": "out", **training}
    assert {key: type(found[key]) for key in training} == {key: type(value) for key, value in training.items()}


@pytest.mark.parametrize(
    ("words", "section", "changes"),
    [
        (["--vocab_size", "300"], "data", {"vocab_size": 300}),
        (["--data.seq_len", "64"], "data", {"seq_len": 64}),
        (["--max_eval_sequences", "null"], "data", {"max_eval_sequences": None}),
        (["--eval_fraction", "5e-2"], "data", {"eval_fraction": 0.05}),
        (["--data", "{corpus: a, seq_len: 8}"], "data", {"corpus": "a", "seq_len": 8}),
        (["--data", "{seq_len: 8}", "--data.corpus", "a"], "data", {"corpus": "a", "seq_len": 8}),
        (["--model.name", "gpt3-xl"], "model", {"name": "gpt3-xl"}),
        (["--model.config.n_layer", "2"], "model", {"config": {"n_layer": 2}}),
        (
            ["--model.config", "{n_layer: 2}", "--model.config.n_head=4"],
            "model",
            {"config": {"n_layer": 2, "n_head": 4}},
        ),
        (["--init_truncation", "2"], "model", {"init_truncation": 2.0}),
    ],
)
def test_section_overrides(tmp_path: Path, words: list[str], section: str, changes: dict[str, Any]) -> None:
    before, after = load(tmp_path, MINIMAL), load(tmp_path, MINIMAL, *words)
    assert getattr(after, section) == dataclasses.replace(getattr(before, section), **changes)
    assert after.training == before.training


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sparse_ift", "null"], None),
        (["--sparse_ift={}"], SparseIFTConfig(seed=42, seq_len=256)),
        (["--sparsity", "0.9"], SparseIFTConfig(sparsity=0.9, seed=1, seq_len=256)),
        (["--sparse_ift.seed", "5"], SparseIFTConfig(sparsity=0.5, seed=5, seq_len=256)),
        (["--targets", "[q, k, v]"], SparseIFTConfig(sparsity=0.5, seed=1, seq_len=256, targets=("q", "k", "v"))),
        (["--exclude=[]"], SparseIFTConfig(sparsity=0.5, seed=1, seq_len=256)),
        (["--algorithm", "set"], SparseIFTConfig(sparsity=0.5, seed=1, seq_len=256, dst=DSTConfig("set"))),
        (
            ["--sparse_ift.dst.drop_fraction", "0.1"],
            SparseIFTConfig(sparsity=0.5, seed=1, seq_len=256, dst=DSTConfig(drop_fraction=0.1)),
        ),
        (["--dst", "{algorithm: gmp}"], SparseIFTConfig(sparsity=0.5, seed=1, seq_len=256, dst=DSTConfig("gmp"))),
    ],
)
def test_sparse_overrides(tmp_path: Path, words: list[str], expected: SparseIFTConfig | None) -> None:
    expected = expected and dataclasses.replace(expected, init="preserve")
    assert load(tmp_path, MINIMAL + "sparse_ift: {sparsity: 0.5, seed: 1}\n", *words).sparse_ift == expected


def test_a_tokenizer_given_on_the_command_line_replaces_the_one_to_be_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = MINIMAL + "data: {vocab_size: 300}\n"
    with caplog.at_level("INFO"):
        data = load(tmp_path, text, "--tokenizer", "a/b").data
    assert (data.tokenizer, data.vocab_size) == ("a/b", None)
    assert "data.tokenizer='a/b' has its own entries: the recipe's data.vocab_size is left out" in caplog.text
    assert load(tmp_path, text, "--tokenizer", "bpe").data.vocab_size == 300
    with pytest.raises(ValueError, match="data: vocab_size=300 is for tokenizer='bpe'"):
        load(tmp_path, MINIMAL + "data: {vocab_size: 300, tokenizer: a/b}\n")


@pytest.mark.parametrize(
    "family", ["family: wide", "family: {name: wide}", "family: {name: wide, scope: model}", "seed: 1"]
)
@pytest.mark.parametrize("word", ["--scope", "--sparse_ift.scope", "--sparse_ift.family.scope"])
def test_options_of_the_family_are_overridden_in_either_form(tmp_path: Path, family: str, word: str) -> None:
    config = load(tmp_path, MINIMAL + f"sparse_ift: {{{family}}}\n", word, "ffn").sparse_ift
    assert config is not None
    assert config.family == Wide("ffn")


@pytest.mark.parametrize("family", ["family: wide", "family: {name: parallel, nonlinearity: none}"])
@pytest.mark.parametrize("words", [["--family", "doped"], ["--sparse_ift.family", "{name: doped}"]])
def test_the_family_is_overridden_with_its_options(tmp_path: Path, family: str, words: list[str]) -> None:
    config = load(tmp_path, MINIMAL + f"sparse_ift: {{{family}}}\n", *words).sparse_ift
    assert config is not None
    assert config.family == Doped()


def test_every_option_has_a_name_a_type_and_a_meaning() -> None:
    options = {option.name: option for option in recipe_options()}
    assert len(options) == len(recipe_options())
    assert all(option.type and option.meaning for option in options.values())
    assert options["training.per_device_train_batch_size"].type == "int, at least 1"
    assert options["training.learning_rate"].default == "5e-05"
    assert options["model.init_truncation"].type == "float, above 0, or null"
    assert options["sparse_ift.dst.stop_fraction"].type == "float in (0, 1]"


def test_a_recorded_recipe_of_an_older_version_equals_that_of_today(tmp_path: Path) -> None:
    """Flat options of the family, and the size of a tokenizer to train beside one that was given."""
    today = load(tmp_path, MINIMAL + "data: {tokenizer: a/b}\nsparse_ift: {scope: ffn, seed: 1}\n").to_dict()
    old = json.loads(json.dumps(today))
    del old["sparse_ift"]["family"]
    old["sparse_ift"] |= {"family": "wide", "scope": "ffn", "nonlinearity": None, "sparse_u_only": False}
    old["data"]["vocab_size"] = 4096
    (tmp_path / "recipe.json").write_text(json.dumps(old))
    assert recorded_recipe(tmp_path / "recipe.json") == today


def test_a_run_goes_on_as_it_was_begun_before_an_option_existed(tmp_path: Path) -> None:
    """Also when it is resumed a second time, after what was meant has been written down."""
    recipe = load(tmp_path, MINIMAL + "sparse_ift: {seed: 1}\n")
    assert recipe.sparse_ift is not None
    old = recipe.to_dict()
    for key in BEFORE:
        del old["sparse_ift"][key]
    for key in BEFORE_IN_DST:
        del old["sparse_ift"]["dst"][key]
    for _ in range(2):
        (tmp_path / "recipe.json").write_text(json.dumps(old))
        begun = as_it_was_begun(recipe, tmp_path)
        assert begun.sparse_ift is not None
        assert all(getattr(begun.sparse_ift, key) == value for key, value in BEFORE.items())
        assert all(getattr(begun.sparse_ift.dst, key) == value for key, value in BEFORE_IN_DST.items())
        assert begun.to_dict()["sparse_ift"] == recorded_recipe(tmp_path / "recipe.json")["sparse_ift"]
        old = begun.to_dict()
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))  # begun with today's version
    assert as_it_was_begun(recipe, tmp_path) == recipe


def test_a_bare_name_that_training_has_too_means_training(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL + "sparse_ift: {seed: 1}\n", "--seed", "5")
    assert recipe.training["seed"] == 5
    assert recipe.sparse_ift is not None
    assert recipe.sparse_ift.seed == 1


def test_lr_decay_steps_can_be_taken_away(tmp_path: Path) -> None:
    assert load(tmp_path, DECAYING + "lr_decay_steps: 90\n", "--lr_decay_steps", "null").lr_decay_steps is None


@pytest.mark.parametrize(("logging", "saving"), [("0.1", "0.3"), ("5", "5"), ("5", "500"), ("1", "7")])
def test_steps_between_logs_and_checkpoints_that_fit(tmp_path: Path, logging: str, saving: str) -> None:
    training = load(tmp_path, MINIMAL, "--logging_steps", logging, "--save_steps", saving).training
    assert (training["logging_steps"], training["save_steps"]) == (float(logging), float(saving))


def test_save_steps_do_not_matter_where_nothing_is_saved(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "--save_strategy", "no", "--logging_steps", "7").training["logging_steps"] == 7


# ---- mistakes

FILES = [
    ("", "must hold a mapping with the keys model, data, sparse_ift, training, lr_decay_steps"),
    ("# nothing\n", "must hold a mapping with the keys"),
    ("- training\n", "must hold a mapping with the keys"),
    ("training: {output_dir: a\n", "recipe.yaml is not valid YAML: while parsing a flow mapping"),
    ("training:\n\toutput_dir: a\n", "recipe.yaml is not valid YAML: "),
    ("training: {output_dir: a}\n---\nmodel: {}\n", "recipe.yaml is not valid YAML: expected a single document"),
    ("training:\n  output_dir: a\n  output_dir: b\n", "recipe.yaml: key 'output_dir' stands twice (line 3)"),
    (MINIMAL + MINIMAL, "recipe.yaml: key 'training' stands twice (line 2)"),
    (MINIMAL + "model: !!python/object/apply:os.getcwd []\n", "recipe.yaml is not valid YAML: could not determine a"),
    ("1: 2\n", "recipe.yaml: unknown key 1"),
    # unknown keys, level by level
    (MINIMAL + "modle: {}\n", "recipe.yaml: unknown key 'modle'; did you mean 'model'?"),
    (MINIMAL + "model: {nam: a}\n", "model: unknown key 'nam'; did you mean 'name'?"),
    (MINIMAL + "data: {seq_lne: 3}\n", "data: unknown key 'seq_lne'; did you mean 'seq_len'?"),
    (MINIMAL + "sparse_ift: {spasity: 0.5}\n", "sparse_ift: unknown key 'spasity'; did you mean 'sparsity'?"),
    (
        MINIMAL + "sparse_ift: {dst: {algoritm: set}}\n",
        "sparse_ift.dst: unknown key 'algoritm'; did you mean 'algorithm'?",
    ),
    (
        "training: {output_dir: a, learning_rte: 1}\n",
        "training: unknown key 'learning_rte'; did you mean 'learning_rate'?",
    ),
    ("training: {output_dir: a, sparsity: 1}\n", "training: unknown key 'sparsity'"),
    # sections of the wrong kind
    ("training: [a]\n", "training must be a mapping of TrainingArguments fields, got ['a']"),
    (MINIMAL + "model: gpt2\n", "model must be a mapping of options, got str: 'gpt2'"),
    (MINIMAL + "data: text.txt\n", "data must be a mapping of options, got str: 'text.txt'"),
    (MINIMAL + "data: 0\n", "data must be a mapping of options, got int: 0"),
    (MINIMAL + "model: []\n", "model must be a mapping of options, got list: []"),
    (MINIMAL + "sparse_ift: true\n", "sparse_ift must be a mapping or null, got True"),
    (MINIMAL + "sparse_ift: {dst: rigl}\n", "sparse_ift.dst must be a mapping of options, got str: 'rigl'"),
    (MINIMAL + "model: {config: [n_layer]}\n", "model.config must be a mapping, got ['n_layer']"),
    # values
    (MINIMAL + "data: {seq_len: 64.5}\n", "data.seq_len must be int, got float: 64.5"),
    (MINIMAL + "data: {streaming: yes}\n", "data.streaming must be bool, got str: 'yes'"),
    (MINIMAL + "sparse_ift: {sparsity: '0.5'}\n", "sparse_ift.sparsity must be float, got str: '0.5'"),
    (MINIMAL + "sparse_ift: {sparsity: 1.0}\n", "sparsity must be in [0, 1), got 1.0"),
    (MINIMAL + "sparse_ift: {targets: q}\n", "sparse_ift.targets must be a list of strings, got 'q'"),
    (
        MINIMAL + "sparse_ift: {dst: {algorithm: rgl}}\n",
        "algorithm='rgl' is not one of 'static', 'set', 'rigl', 'gmp', 'granet'",
    ),
    (MINIMAL + "model: {init_truncation: 0}\n", "init_truncation must be above 0, got 0"),
    ("training: {output_dir: a, learning_rate: fast}\n", "training.learning_rate must be float, got str: 'fast'"),
    ("training: {output_dir: a, max_steps: 1.5}\n", "training.max_steps must be int, got float: 1.5"),
    ("training: {output_dir: a, max_steps: true}\n", "training.max_steps must be int, got bool: True"),
    ("training: {output_dir: a, bf16: yes}\n", "training.bf16 must be bool, got str: 'yes'"),
    # an output folder is a must
    ("{}", "training.output_dir is missing"),
    ("training: {seed: 1}\n", "training.output_dir is missing"),
    ("training: {output_dir: null}\n", "training.output_dir"),
    ("training: {output_dir: ''}\n", "training.output_dir"),
    ("training: {output_dir: 3}\n", "training.output_dir must be str, got int: 3"),
    # steps and schedules
    ("training: {output_dir: a, logging_steps: 20, save_steps: 50}\n", "must be a multiple of logging_steps=20"),
    (
        "training: {output_dir: a, logging_steps: 30}\n",
        "training.save_steps=500 must be a multiple of logging_steps=30",
    ),
    (MINIMAL + "lr_decay_steps: 5\n", NO_SCHEDULE),
    (DECAYING.replace("cosine_with_min_lr", "cosine") + "lr_decay_steps: 5\n", NO_SCHEDULE),
    (DECAYING.replace("min_lr_rate", "num_cycles") + "lr_decay_steps: 5\n", NO_SCHEDULE),
    (DECAYING.replace("{min_lr_rate: 0.1}", "3") + "lr_decay_steps: 5\n", "lr_scheduler_kwargs"),
    (DECAYING + "lr_decay_steps: 0\n", "lr_decay_steps must be at least 1, got 0"),
    (DECAYING + "lr_decay_steps: -5\n", "lr_decay_steps must be at least 1, got -5"),
    (DECAYING + "lr_decay_steps: 1.5\n", "lr_decay_steps must be int, got float: 1.5"),
    (DECAYING + "lr_decay_steps: soon\n", "lr_decay_steps must be int, got str: 'soon'"),
    (DECAYING + "lr_decay_steps: true\n", "lr_decay_steps must be int, got bool: True"),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, text)


OVERRIDES = [
    (["--learning_rate"], "--learning_rate needs a value"),
    (["--bf16", "--seed", "1"], "--bf16 needs a value"),
    (["--seed", "1", "--bf16"], "--bf16 needs a value"),
    (["--learning_rate="], "training.learning_rate must be float, got NoneType: None"),
    (["junk"], "expected --field value, got 'junk'"),
    (["--seed", "1", "2"], "expected --field value, got '2'"),
    (["-seed", "1"], "expected --field value, got '-seed'"),
    (["--"], "expected --field value, got '--'"),
    (["--=3"], "unknown option --"),
    (["--learning-rate", "1"], "unknown option --learning-rate; did you mean 'learning_rate'?"),
    (["--learning_rat", "1"], "unknown option --learning_rat; did you mean 'learning_rate'?"),
    (["--data.corpsu", "a"], "unknown option --data.corpsu; did you mean 'data.corpus'?"),
    (["--model.confg.n_layer", "1"], "unknown option --model.confg.n_layer; did you mean 'model.config'?"),
    (["--training.seed.x", "1"], "unknown option --training.seed.x"),
    (["--seq_len", "64"], "--seq_len could mean --data.seq_len or --sparse_ift.seq_len; write one of them"),
    (["--learning_rate", "{a"], "--learning_rate is not valid YAML"),
    (["--corpus", "a: b: c"], "--corpus is not valid YAML"),
    (["--lr_scheduler_kwargs", "{a: 1, a: 2}"], "--lr_scheduler_kwargs: key 'a' stands twice"),
    (["--learning_rate", "null"], "training.learning_rate must be float, got NoneType: None"),
    (["--learning_rate", "1e-3x"], "training.learning_rate must be float, got str: '1e-3x'"),
    (["--output_dir", "null"], "training.output_dir"),
    (["--dst", "null"], "sparse_ift.dst must be a mapping of options, got NoneType: None"),
    (["--sparse_ift", "0.5"], "sparse_ift must be a mapping or null, got 0.5"),
    (["--sparse_ift", "false"], "sparse_ift must be a mapping or null, got False"),
    (["--data", "text.txt"], "data must be a mapping of options, got str: 'text.txt'"),
    (["--data", "text.txt", "--data.seq_len", "8"], "data must be a mapping of options, got str: 'text.txt'"),
    (["--training", "null"], "training.output_dir is missing"),
    (["--resume_from_checkpoint", "5"], "training.resume_from_checkpoint must be true, false or a folder, got 5"),
    (["--resume_from_checkpoint", "[a]"], "training.resume_from_checkpoint must be true, false or a folder, got ['a']"),
    (["--save_steps", "7", "--logging_steps", "5"], "must be a multiple of logging_steps=5"),
    (["--save_steps", "0.5"], "training.save_steps=0.5 must be a multiple of logging_steps=500"),
    (["--lr_decay_steps", "5"], "lr_decay_steps needs lr_scheduler_type: cosine_with_min_lr"),
    # values that transformers takes and cannot train with
    (["--max_steps", "-3"], "training.max_steps must be at least 1, or -1 to train for num_train_epochs, got -3"),
    (["--max_steps", "0"], "training.max_steps must be at least 1, or -1 to train for num_train_epochs, got 0"),
    (["--per_device_train_batch_size", "0"], "training.per_device_train_batch_size must be at least 1, got 0"),
    (["--per_device_eval_batch_size", "-1"], "training.per_device_eval_batch_size must be at least 1, got -1"),
    (["--gradient_accumulation_steps", "0"], "training.gradient_accumulation_steps must be at least 1, got 0"),
    (["--learning_rate", ".nan"], "training.learning_rate must be at least 0, got nan"),
    (["--learning_rate", ".inf"], "training.learning_rate must be at least 0, got inf"),
    (["--learning_rate", "-1e-3"], "training.learning_rate must be at least 0, got -0.001"),
    (["--weight_decay", "-0.5"], "training.weight_decay must be at least 0, got -0.5"),
    (["--warmup_steps", "-1"], "training.warmup_steps must be at least 0, got -1.0"),
    (["--num_train_epochs", "0"], "training.num_train_epochs must be above 0, got 0.0"),
    (["--num_train_epochs", ".inf"], "training.num_train_epochs must be above 0, got inf"),
    (["--adam_beta2", "1.0"], "training.adam_beta2 must be in [0, 1), got 1.0"),
    (["--adam_epsilon", ".nan"], "training.adam_epsilon must be at least 0, got nan"),
    (["--max_grad_norm", "-1"], "training.max_grad_norm must be at least 0, got -1.0"),
    (["--logging_steps", "0"], "training.logging_steps must be above 0, got 0.0"),
    (["--save_steps", "-500"], "training.save_steps must be above 0, got -500.0"),
    (["--eval_steps", "0"], "training.eval_steps must be above 0, got 0.0"),
    (["--seed", "-1"], "training.seed must be in [0, 4294967295], got -1"),
    (["--dataloader_num_workers", "-1"], "training.dataloader_num_workers must be at least 0, got -1"),
    (["--lr_scheduler_kwargs", "{min_lr_rate: 2}"], "training.lr_scheduler_kwargs.min_lr_rate must be in [0, 1], got"),
    (["--lr_scheduler_kwargs", "{min_lr: -1e-5}"], "training.lr_scheduler_kwargs.min_lr must be in [0, 5e-05], got"),
    (["--lr_scheduler_kwargs", "{num_cycles: .nan}"], "training.lr_scheduler_kwargs.num_cycles must be a finite"),
    (["--model.config", "{embd_pdrop: .inf}"], "model: config.embd_pdrop must be a finite number, got inf"),
    (["--init_truncation", ".inf"], "model.init_truncation must be above 0, got inf"),
    (["--eval_fraction", ".nan"], "data.eval_fraction must be in (0, 1), got nan"),
    (["--max_eval_sequences", "-2"], "data.max_eval_sequences must be at least 1, got -2"),
    (["--drop_fraction", ".nan"], "sparse_ift.dst.drop_fraction must be in (0, 1), got nan"),
    # values that would be ignored, or end training in the middle
    (["--do_train", "false"], "training.do_train=False would be ignored"),
    (["--do_eval", "false"], "training.do_eval=False would be ignored"),
    (["--do_predict", "true"], "training.do_predict=True would be ignored"),
    (["--label_names", "foo"], "training.label_names must be a list of strings, got 'foo'"),
    (["--metric_for_best_model", "acc"], "training.metric_for_best_model='acc' is not one of 'loss', 'eval_loss'"),
    # a vocabulary of one's own is for a tokenizer of one's own
    (["--tokenizer", "a/b", "--data.vocab_size", "4096"], "data: vocab_size=4096 is for tokenizer='bpe', which is"),
]


@pytest.mark.parametrize(("words", "message"), OVERRIDES)
def test_wrong_overrides(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, MINIMAL, *words)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_recipe(tmp_path / "none.yaml")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"weights\.bin"):
        load_recipe(tmp_path / "weights.bin")
