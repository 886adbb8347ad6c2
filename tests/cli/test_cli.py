"""The `sparseift` command: printed figures, exit codes, and messages instead of tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm.cli import main
from sparseift_llm.models.presets import PRESETS, load_config
from tests.evaluation.test_comparison import values_of, write
from tests.helpers.pretrain_runs import ENVIRONMENT
from tests.reporting.test_comparison import DENSE, SPARSE, write_metrics, write_run

SMALL = ["plan", "--model", "gpt3-small", "--family", "wide", "--sparsity", "0.75", "--seq-len", "1024"]


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(output(capsys, *words, "--json"))
    return values


# ---- figures of GPT-3 Small


def test_wide_75_percent_of_gpt3_small(capsys: pytest.CaptureFixture[str]) -> None:
    values = plan(capsys, *SMALL, "--scope", "model")
    assert values.keys() >= {"dense", "sparse", "ratio_linear", "ratio_whole_model", "layers", "config", "seq_len"}
    costs = {
        "linear_active_params",
        "stored_params",
        "linear_flops_per_token",
        "attention_flops_per_token",
        "logit_flops_per_token",
        "forward_flops_per_token",
        "train_state_bytes",
    }
    assert values["dense"].keys() == values["sparse"].keys() == costs
    assert round(values["dense"]["forward_flops_per_token"] / 1e6, 1) == 284.8
    assert round(values["sparse"]["forward_flops_per_token"] / 1e6, 1) == 399.8
    assert round(values["ratio_whole_model"], 2) == 1.40
    assert values["ratio_linear"] == 1.0
    assert values["dense"]["linear_active_params"] == values["sparse"]["linear_active_params"] == 84_934_656
    assert values["dense"]["attention_flops_per_token"] == 4 * 1024 * 768 * 12
    assert values["sparse"]["logit_flops_per_token"] == 2 * 1536 * 50257
    assert len(values["layers"]) == 48
    first = values["layers"][0]
    assert (first["kind"], first["dense_shape"], first["sparse_shape"]) == ("qkv", [2304, 768], [4608, 1536])
    assert (first["num_active"], first["sparsity"]) == (2304 * 768, 0.75)


def test_wide_50_percent_of_gpt3_small(capsys: pytest.CaptureFixture[str]) -> None:
    values = plan(capsys, *SMALL, "--sparsity", "0.5")
    assert {tuple(layer["sparse_shape"]) for layer in values["layers"]} == {
        (3276, 1092), (1092, 1092), (4368, 1092), (1092, 4368)
    }  # fmt: skip
    # 169.87 (projections, as dense) + 53.67 (attention) + 109.76 (logits) MFLOP over 284.81
    assert round(values["ratio_whole_model"], 4) == 1.1703
    assert values["ratio_linear"] == 1.0
    assert round(values["layers"][0]["sparsity"], 5) == 0.50537


def test_scope_ffn_is_iso_flop_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    values = plan(capsys, *SMALL, "--scope", "ffn")
    assert values["ratio_linear"] == values["ratio_whole_model"] == 1.0


def test_whole_model_accounting(capsys: pytest.CaptureFixture[str]) -> None:
    values = plan(capsys, *SMALL, "--accounting", "whole_model")
    assert values["ratio_whole_model"] == pytest.approx(1.0, abs=0.001)
    assert values["sparse"]["forward_flops_per_token"] <= values["dense"]["forward_flops_per_token"]
    assert 1 - values["layers"][0]["sparsity"] == pytest.approx(0.081, abs=0.0005)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(capsys: pytest.CaptureFixture[str], preset: str) -> None:
    values = plan(capsys, "plan", "--model", preset, "--sparsity", "0.75", "--seq-len", "512")
    assert values["ratio_linear"] == 1.0
    assert values["seq_len"] == 512
    assert values["model_type"] == load_config(preset).model_type


def test_all_options_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--targets", "q", "k", "mlp_in", "mlp_out", "--exclude", "q", "--accounting", "whole_model"]
    words += ["--width-multiple", "64", "--distribution"]
    values = plan(capsys, "plan", "--model", "llama-160m", "--sparsity", "0.6", "--seq-len", "64", *words, "erk")
    config = values["config"]
    assert config["targets"] == ["q", "k", "mlp_in", "mlp_out"]
    assert config["exclude"] == ["q"]
    assert (config["width_multiple"], config["distribution"], config["sparsity"]) == (64, "erk", 0.6)
    assert {layer["kind"] for layer in values["layers"] if layer["sparsity"] > 0} == {"k", "mlp_in", "mlp_out"}
    assert all(size % 64 == 0 for layer in values["layers"] for size in layer["sparse_shape"])


def test_a_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 100}))
    for model in (path, tmp_path):
        values = plan(capsys, "plan", "--model", str(model), "--sparsity", "0.75", "--seq-len", "16")
        assert values["dense"]["linear_active_params"] == 12 * 32**2


def test_the_table_has_every_kind_and_the_totals(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split() for line in output(capsys, *SMALL, "--scope", "ffn").splitlines()]
    rows = {line[0]: line[1:] for line in lines if line}
    assert rows["qkv"] == ["12", "2304", "x", "768", "2304", "x", "768", "dense", "1.0000"]
    assert rows["o"] == ["12", "768", "x", "768", "768", "x", "768", "dense", "1.0000"]
    assert rows["mlp_in"] == ["12", "3072", "x", "768", "12288", "x", "768", "0.75000", "1.0000"]
    assert rows["mlp_out"] == ["12", "768", "x", "3072", "768", "x", "12288", "0.75000", "1.0000"]
    assert rows["attention_flops_per_token"] == ["37.7MFLOP", "37.7MFLOP", "1.0000"]
    assert rows["stored_params"][0] == "125M"  # 124 million of GPT-2 Small, and positions up to 2048
    assert rows["train_state_bytes"][:2] == ["2.00", "GB"]


def test_the_table_of_the_whole_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output(capsys, *SMALL)
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert rows["forward_flops_per_token"] == ["285MFLOP", "400MFLOP", "1.4036"]
    assert rows["linear_flops_per_token"] == ["170MFLOP", "170MFLOP", "1.0000"]
    assert "per token, T=1024" in printed
    assert "norms and elementwise work are left out" in printed


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsity", "1.0"], "sparsity must be in [0, 1), got 1.0"),
        (["--family", "serial"], "family='serial' is not one of 'wide'"),
        (["--scope", "modle"], "scope='modle' is not one of 'model', 'ffn', 'residual'; did you mean 'model'?"),
        (
            ["--structure", "blok"],
            "structure='blok' is not one of 'unstructured', 'block', 'n:m (e.g. 2:4)'; did you mean 'block'?",
        ),
        (["--structure", "block", "--block-size", "7"], "block_size must be one of 4, 8, 16, 32, 64, 128, 256, got 7"),
        (["--targets", "qq"], "sparse_ift.targets[0]='qq' is not one of 'q', 'k', 'v', 'o'"),
        (["--targets", "q"], "holds q, k, v in one matrix"),
        (["--exclude", "q", "k", "v", "o", "mlp_in", "mlp_out"], "no projection of gpt2 is of the kinds ()"),
        (["--accounting", "whole_model", "--sparsity", "0.95"], "accounting='whole_model' cannot be met"),
        (["--seq-len", "0"], "seq_len must be at least 1, got 0"),
        (["--seq-len", "-5"], "seq_len must be at least 1, got -5"),
        (["--seq-len", "4096"], "seq_len=4096 is above the model's 2048 positions"),
        (["--sparsity", "much"], "sparsity must be float, got str: 'much'"),
        (["--utilization", "1.5"], "utilization must be in (0, 1], got 1.5"),
        (["--tokens", "-1"], "tokens must be above 0, got -1"),
        (["--compare", "scope"], "--compare 'scope': 'scope' is not of the form option=value"),
        (["--compare", "scpe=ffn"], "did you mean 'scope'?"),
        (["--width-multiple", "0"], "width_multiple must be at least 1, got 0"),
        (
            ["--model", "gpt3-smal"],
            "'gpt3-smal' is not a preset; did you mean 'gpt3-small'? (presets: gpt3-small, ",
        ),
        (["--model", "{folder}"], "is a folder without config.json"),
        (["--model", "{folder}/broken.json"], "broken.json is not valid JSON"),
        (["--model", "{folder}/empty.json"], "empty.json is not a transformers config: it has no model_type"),
        (["--model", "{folder}/bert.json"], "bert"),
        (["--model", "{folder}/unheard_of.json"], "unheard_of"),
    ],
)
def test_mistakes_are_one_message_and_exit_status_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", _offline)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "bert.json").write_text('{"model_type": "bert"}')
    (tmp_path / "unheard_of.json").write_text('{"model_type": "unheard_of"}')
    assert main([*SMALL, *(word.replace("{folder}", str(tmp_path)) for word in words)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sparseift: ")
    assert message in printed.err


def _offline(name: str, **_: Any) -> Any:
    raise OSError(f"{name} cannot be reached")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["paln"],
        ["compare"],
        ["compare", "a", "--outptu", "b"],
    ],
)
def test_argparse_refuses_the_rest(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: sparseift" in capsys.readouterr().err


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line printed by a command that fails."""
    assert main(list(map(str, words))) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line.removeprefix("sparseift: ")


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (["compare", "{run}", "--output"], "afile"),
        (["compare", "{run}", "--output"], "afile/x"),
        (["report", "{run}", "-o"], "afile/report.html"),
        (["analyze", "{run}", "--output"], "afile"),
    ],
)
def test_outputs_that_cannot_be_written_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str], output: str
) -> None:
    run = write_metrics(write_run(tmp_path / "run", DENSE))
    (tmp_path / "afile").write_text("mine")
    said = refusal(capsys, *(word.format(run=run) for word in command), tmp_path / output)
    assert said.startswith(f"cannot read or write {tmp_path / 'afile'}")
    assert said.endswith((": File exists", ": Not a directory"))
    assert (tmp_path / "afile").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no folder that nobody can write to")
def test_errors_name_the_output_that_was_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = write_metrics(write_run(tmp_path / "run", DENSE))
    assert refusal(capsys, "report", run, "-o", "/proc/page.html").startswith("cannot read or write /proc/page.html: ")


# ---- compare


def test_compare_writes_a_table_and_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = [str(write_metrics(write_run(tmp_path / name, of))) for name, of in (("dense", DENSE), ("sparse", SPARSE))]
    folder = tmp_path / "new" / "comparison"
    printed = output(capsys, "compare", *runs, "--output", str(folder))
    table = (folder / "comparison.md").read_text()
    assert table in printed
    assert "| held-out loss (nats/token) | 2.0000 | 1.9000 | 0.950 |" in table
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {folder / 'comparison.md'} and {folder / 'loss.png'}" in printed


@pytest.mark.parametrize("name", ["comparison.md", "loss.png"])
def test_compare_overwrites_its_own_files_only(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    run = write_metrics(write_run(tmp_path / "run", DENSE))
    folder = tmp_path / "comparison"
    words = ("compare", run, "--output", folder)
    folder.mkdir()
    (folder / name).write_text("mine")
    assert refusal(capsys, *words).startswith(f"{folder / name} is there already, and not from sparseift compare; ")
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_text() == "mine"
    (folder / name).unlink()
    for _ in range(2):
        output(capsys, *map(str, words))
    output(capsys, "compare", *map(str, [run, run, run]), "--output", str(folder))
    assert (folder / "comparison.md").read_text().startswith("|  | run | run | run |\n")


def test_compare_of_a_missing_run_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "dense", DENSE))
    assert main(["compare", run, str(tmp_path / "nowhere"), "--output", str(tmp_path / "comparison")]) == 2
    assert "nowhere is not a finished run of `sparseift pretrain`" in capsys.readouterr().err
    assert not (tmp_path / "comparison").exists()


def test_compare_takes_results_of_evaluations(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{name}.json", values_of(0.5, 0.5, seed)) for name, seed in (("a", 1), ("b", 2)))
    words = [f"dense={first}", f"sparse={second}", "--samples", "100", "--confidence", "0.9"]
    printed = output(capsys, "compare", *words, "--output", str(tmp_path / "out" / "c"))
    assert (tmp_path / "out" / "c.md").read_text() in printed
    found = json.loads((tmp_path / "out" / "c.json").read_text())
    assert (found["num_samples"], found["confidence"]) == (100, 0.9)
    assert output(capsys, "compare", str(first), str(second), "--samples", "100").startswith("|")  # without an output
    assert refusal(capsys, "compare", first, tmp_path / "none.json").startswith("compare: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "--output is missing: say in which folder comparison.md and loss.png are written"),
        (["run", "--samples", "9", "--output", "o"], "--samples is for results of evaluations"),
        (["run", "--confidence", "0.9", "--output", "o"], "--confidence is for results of evaluations"),
        (["run", "a.json", "--output", "o"], "run is taken for a run and a.json for the result of an evaluation"),
    ],
)
def test_what_compare_refuses(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_metrics(write_run(tmp_path / "run", DENSE))
    assert refusal(capsys, "compare", *words).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---- as a program


def test_the_console_script() -> None:
    program = str(Path(sys.executable).with_name("sparseift"))
    words = ["plan", "--model", "nobody/nothing", "--sparsity", "0.75", "--seq-len", "8"]
    done = subprocess.run([program, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "sparseift: 'nobody/nothing' is not a preset" in done.stderr
    assert "Traceback" not in done.stderr
