"""The report page: valid and self-contained HTML whose numbers and curves are those of the runs' files."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sparseift_llm.checkpoints.mask_file import read_masks
from sparseift_llm.cli import main
from sparseift_llm.reporting.comparison import HEADLINES
from sparseift_llm.reporting.page import page as page_module
from sparseift_llm.reporting.page.page import write_report
from tests.helpers.html_pages import (
    LAYERS,
    Node,
    drawn_points,
    evaluation,
    log_lines,
    parse,
    table_rows,
    variables,
    write_full_run,
    write_lines,
    write_masks,
)
from tests.helpers.pretrain_runs import RIGL, read_json, tiny_recipe
from tests.helpers.scripts import load_script
from tests.reporting.test_comparison import DENSE, write_run

HOSTILE = "<img src=x onerror=alert(1)>\"'&amp;</script></style></title><svg onload=alert(2)>"
TEMPLATES = Path(page_module.__file__).parent / "templates"


def report(*runs: Path) -> tuple[Node, str]:
    output = runs[0].parent / "report.html"
    write_report(runs, output)
    text = output.read_text(encoding="utf-8")
    return parse(text), text


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense and a sparse run of recipes/pretrain.py."""
    folder = tmp_path_factory.mktemp("real")
    pretrain = load_script("recipes/pretrain.py")
    for name, sparse in (("dense", None), ("sparse", RIGL)):
        (folder / name).mkdir()
        recipe = tiny_recipe(folder / name, sparse, max_steps=8, output_dir=str(folder / name / "run"))
        pretrain.main([str(recipe)])
        (folder / name / "run").rename(folder / f"{name}-run")
    return folder / "dense-run", folder / "sparse-run"


@pytest.fixture(scope="module")
def real_page(real_runs: tuple[Path, Path]) -> tuple[Node, str]:
    return report(*real_runs)


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    return write_full_run(tmp_path / "full")


# ---- the page


def check_page(root: Node, text: str) -> None:
    """Valid where it matters, needs nothing from elsewhere, and can be used without eyes or a mouse."""
    ids = [node.attributes["id"] for node in root.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in root.all():
        for name, value in node.attributes.items():
            assert not name.startswith("on"), (node.tag, name)
            assert name not in ("style", "srcset", "xlink:href"), (node.tag, name)
            if name in ("src", "href", "action", "data", "poster"):
                assert value.startswith("#") or value == "data:,", (node.tag, value)
                assert value == "data:," or value[1:] in ids, value
            if name in ("aria-labelledby", "data-table"):
                assert set(value.split()) <= set(ids)
        assert node.attributes.get("tabindex", "0") in ("0", "-1")
    (style,), (script,) = root.all("style"), root.all("script")
    assert style.text == (TEMPLATES / "style.css").read_text(encoding="utf-8")
    assert script.text == (TEMPLATES / "script.js").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|https?:", style.text)
    assert not re.search(r"\b(fetch|import|XMLHttpRequest|innerHTML|eval)\b", script.text)
    assert not re.search(r"(https?:)?//(?!www\.w3\.org/2000/svg)\w+\.\w", script.text)
    levels = [int(node.tag[1]) for node in root.all() if re.fullmatch(r"h[1-6]", node.tag)]
    assert levels[0] == 1 == levels.count(1)
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert [len(root.all(tag)) for tag in ("header", "nav", "main", "title")] == [1, 1, 1, 1 + len(root.all("desc"))]
    for table in root.all("table"):
        assert table.all("caption")[0].text
        heads = table.all("th")
        assert all(head.attributes["scope"] in ("col", "row", "rowgroup") for head in heads)
        width = len(table.all("thead")[0].all("th")) + len(table.all("thead")[0].all("td"))
        for row in table.all("tbody")[0].all("tr"):
            assert len([n for n in row.children if isinstance(n, Node)]) in (1, width)
    for drawing in [node for node in root.all("svg") if node.attributes.get("role") == "img"]:
        assert drawing.all("title")[0].text
        assert drawing.all("desc")[0].text
    assert all(node.attributes.get("id") for node in root.all("input"))


def test_the_page_of_real_runs(real_page: tuple[Node, str]) -> None:
    check_page(*real_page)
    root, _ = real_page
    assert [node.text for node in root.all("span", "state")] == ["finished", "finished"]
    assert len(root.all("fieldset")) == 2
    assert {"dense-run", "sparse-run"} <= {node.text for node in root.all("strong")}


def test_the_page_of_a_run_with_everything(full_run: Path) -> None:
    check_page(*report(full_run))


def test_the_checks_would_notice(full_run: Path) -> None:
    _, text = report(full_run)
    for before, after in (
        ('<link rel="icon" href="data:,">', '<link rel="stylesheet" href="https://example.org/a.css">'),
        ('id="loss-h"', 'id="runs-h"'),
        ("</section>", "</div>"),
        ('scope="row"', 'scope="rows"'),
        ("<h2 ", "<h4 "),
        ("<header>", '<header onclick="x()">'),
    ):
        assert before in text
        with pytest.raises((AssertionError, ValueError)):
            check_page(parse(text.replace(before, after)), text)


def test_the_policy_allows_nothing_but_the_page_itself(full_run: Path) -> None:
    root, _ = report(full_run)
    (policy,) = [n.attributes["content"] for n in root.all("meta") if "http-equiv" in n.attributes]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_what_users_name_is_escaped(tmp_path: Path) -> None:
    run = write_full_run(tmp_path / HOSTILE.replace("/", "_"), command=HOSTILE)
    plain, _ = report(write_full_run(tmp_path / "plain", command="x"))
    for name in ("recipe.json", "summary.json", "metrics.jsonl", "layers.jsonl", "spectral.json", "eval_tiny.json"):
        text = (run / name).read_text()
        for word in ("gpt3-small", "exploration/qkv", "transformer.h", '"qkv"', '"tiny"', "pick", "delta_r_imdb: no"):
            replaced = json.dumps(f"exploration/{HOSTILE}" if word.startswith("explo") else HOSTILE)
            text = text.replace(word, f'"{replaced[1:-1]}"' if word.startswith('"') else replaced[1:-1])
        (run / name).write_text(text)
    write_masks(run, names={name.replace("transformer.h", HOSTILE): value for name, value in LAYERS.items()})
    root, text = report(run)
    check_page(root, text)
    assert root.all("strong")[0].text == HOSTILE.replace("/", "_")
    assert root.all("title")[0].text.endswith(HOSTILE.replace("/", "_"))
    assert root.text.count("onerror") >= 50
    assert {node.tag for node in root.all()} == {node.tag for node in plain.all()}
    assert len(root.all("svg")) == len(plain.all("svg"))


def test_characters_that_html_and_utf8_lack(full_run: Path) -> None:
    summary = read_json(full_run / "summary.json")
    (full_run / "summary.json").write_text(json.dumps({**summary, "command": "a\x00b\x1bc\ud800d"}))
    _, text = report(full_run)
    assert "a\ufffdb\ufffdc?d" in text


# ---- its numbers


def test_headline_numbers_are_those_of_the_summaries(real_runs: tuple[Path, Path], real_page: tuple[Node, str]) -> None:
    dense, sparse = (read_json(run / "summary.json") for run in real_runs)
    rows = {row[0]: row[1:] for row in table_rows(real_page[0], "Ratio: sparse-run / dense-run")[""]}
    same = real_page[0].by_id("runs").all("p", "note")[0].text.removeprefix("The same in both: ").removesuffix(".")
    assert "optimizer steps 8" in same.split("; ")
    for title, key, words in HEADLINES:
        if words(dense[key]) == words(sparse[key]):
            assert f"{title} {words(dense[key])}" in same.split("; ")
            assert title not in rows
        else:
            assert rows[title][1:] == [words(dense[key]), words(sparse[key])]
    assert f"training tokens {dense['train_tokens']:,}" in same.split("; ")
    assert rows["held-out loss (nats/token)"][0] == f"{sparse['eval_loss'] / dense['eval_loss']:.3f}"
    assert rows["linear sparsity"][0] == ""


def test_ends_of_lines_have_names_and_values(
    real_runs: tuple[Path, Path], real_page: tuple[Node, str], tmp_path: Path
) -> None:
    (figure,) = real_page[0].all("figure", "flops-whole")
    expected = [f"{read_json(run / 'summary.json')['eval_loss']:.4g}" for run in real_runs]
    ends = [[part.text for part in end.all("tspan")] for end in figure.all("text", "end")]
    assert ends == [[run.name, value] for run, value in zip(real_runs, expected, strict=True)]
    training = write_full_run(tmp_path / "training-alone")
    lines = [line for line in log_lines() if "eval_loss" not in line]
    write_lines(training / "metrics.jsonl", lines)
    (figure,) = report(training)[0].all("figure", "flops-whole")
    assert [part.text for part in figure.all("text", "end")[0].all("tspan")] == ["train\u2026-alone", "1.123"]


def test_units_of_axes_are_those_that_people_say(real_page: tuple[Node, str]) -> None:
    labels = [figure.all("p", "x-label")[0].text for figure in real_page[0].all("figure", "panel")]
    assert "training FLOPs, whole model (MFLOP)" in labels
    assert "training tokens (k tokens)" in labels


def test_curves_are_those_of_the_logs(real_runs: tuple[Path, Path], real_page: tuple[Node, str]) -> None:
    root = real_page[0]
    units = {"flops": ("train_flops", 1e6), "tokens": ("train_tokens", 1e3), "time": ("wall_seconds", 1)}
    for index, run in enumerate(real_runs):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for name, (key, unit) in units.items():
            (figure,) = root.all("figure", f"{name}-whole")
            (chart,) = figure.all("svg", "chart")
            for loss, width in (("loss", "thin"), ("eval_loss", "main")):
                expected = [(line[key] / unit, line[loss]) for line in lines if loss in line]
                assert len(expected) >= 3
                found = drawn_points(chart, {f"s{index}", width})
                np.testing.assert_allclose(found, expected, rtol=2e-3)
        rows = table_rows(root, "Loss (nats per token) over training")[run.name]
        keys = ("step", "train_flops", "train_tokens", "wall_seconds", "loss", "eval_loss")
        drawn = [line for line in lines if "loss" in line or "eval_loss" in line]
        assert rows == [[printed(line.get(key)) for key in keys] for line in drawn]


def printed(value: Any) -> str:
    return "\u2013" if value is None else str(value) if isinstance(value, int) else f"{value:.6g}"


def test_degrees_are_those_of_the_masks(real_runs: tuple[Path, Path], real_page: tuple[Node, str]) -> None:
    masks = read_masks(real_runs[1])
    rows = table_rows(real_page[0], "Sparsity and degrees by layer, counted in weights")[""]
    assert [row[0] for row in rows] == list(masks)
    assert [row[1] for row in rows] == ["qkv", "o", "mlp_in", "mlp_out"] * 2
    for name, _, shape, sparsity, *degrees in rows:
        mask = masks[name].numpy().T  # GPT-2 keeps matrices as (in, out)
        assert shape == f"{mask.shape[0]} x {mask.shape[1]}"
        assert float(sparsity) == 0.75
        expected = []
        for side in (mask.sum(1), mask.sum(0)):
            expected += [side.min(), side.mean(), side.max(), (side == 0).sum()]
        assert [float(value) for value in degrees] == pytest.approx([float(value) for value in expected], rel=1e-5)


def test_tiles_and_empty_columns_are_counted(full_run: Path) -> None:
    rows = table_rows(report(full_run)[0], "Sparsity and degrees by layer, counted in tiles of 16x16")[""]
    assert [row[1] for row in rows] == ["qkv", "mlp_in"] * 2
    for row in rows:
        assert (row[6], row[8], row[11]) == ("3", "0", "1")  # the fullest row, the emptiest column, empty columns


def test_masks_along_training(full_run: Path) -> None:
    root, _ = report(full_run)
    lines = [line for line in log_lines() if "loss" in line]
    keys = ("step", "exploration", "mask_churn", "mask_survival")
    assert "The same at every step, so not drawn: sparsity 0.75." in root.by_id("masks").text
    rows = table_rows(root, "Masks along training")["full"]
    assert rows == [[printed(line.get(key)) for key in keys] for line in lines]
    chart = root.by_id("masks-exploration-t")
    (drawing,) = [svg for svg in root.all("svg", "chart") if chart in svg.all("title")]
    expected = [(line["step"], line["exploration"]) for line in lines]
    np.testing.assert_allclose(drawn_points(drawing, {"s0"}), expected, rtol=2e-3)
    assert table_rows(root, "Kinds of projections, as last logged") == {"full": [["qkv", "6", "0.75", "0.32"]]}
    by_layer = table_rows(root, "Layers at step 6, the last logged")[""]
    assert by_layer[0] == ["transformer.h.0.attn.c_attn", "qkv", "0.75", "0.37", printed(0.1 / 6), printed(1 - 0.1 / 6)]
    assert len(by_layer) == 4
    speed = table_rows(root, "Speed and gradients")["full"]
    assert speed == [[printed(x[key]) for key in ("step", "tokens_per_second", "grad_norm")] for x in lines]
    assert "The same at every step, so not drawn: dead units 0." in root.by_id("training").text


def test_constants_that_differ_between_runs(tmp_path: Path) -> None:
    runs = [write_full_run(tmp_path / name) for name in ("first", "second")]
    write_lines(runs[1] / "metrics.jsonl", [{**line, "sparsity": 0.5} for line in log_lines()])
    root, _ = report(*runs)
    assert "not drawn: sparsity 0.75 in first, 0.5 in second." in root.by_id("masks").text
    lines = [{**line, "sparsity": 0.5 + line["step"] / 100} for line in log_lines()]
    write_lines(runs[1] / "metrics.jsonl", lines)  # drawn for both, if it changes in one
    masks = report(*runs)[0].by_id("masks")
    assert "The same at every step" not in masks.text
    assert masks.by_id("masks-sparsity-t").text == "Sparsity"
    only = [{key: line[key] for key in ("step", "loss", "dead_units") if key in line} for line in log_lines()]
    write_lines(runs[0] / "metrics.jsonl", only)
    assert "The same at every step, so not drawn: dead units 0." in report(runs[0])[0].by_id("training").text


def test_spectral_curves(full_run: Path) -> None:
    root, _ = report(full_run)
    rows = table_rows(root, "Spectral quantities of the whole model")["full"]
    assert rows == [[str(step), printed(step / 7)] for step in (2, 4, 6)]
    assert "not drawn: weighted spectral gap 1.75; weighted spectral gap over subgraphs 0.625." in root.text
    by_layer = table_rows(root, "Spectral quantities by layer at step 6, the last analysed")[""]
    assert by_layer[1] == [
        "transformer.h.0.mlp.c_fc", "mlp_in", "16 x 4", "0.75", "3.5", "1.25", "-0.512346", "\u2013", "1.75", "0.625",
        "delta_r_imdb: no subgraph",
    ]  # fmt: skip


def test_evaluations(tmp_path: Path) -> None:
    runs = [write_full_run(tmp_path / name) for name in ("first", "second")]
    result = evaluation(0.5)
    result["results"]["pick"]["truncated_items"] = 78
    result["model"]["run"] = {"seed": 3}
    result["left_out"] = {"long": "answers do not fit"}
    (runs[1] / "eval_tiny.json").write_text(json.dumps(result))
    tables = table_rows(report(*runs)[0], "eval_tiny.json: suite tiny")
    first = "31.25% ± 4.32% (22.78% to 39.72%), 1,200 items"
    second = "50.00% ± 4.32% (41.53% to 58.47%), 1,200 items, 78 truncated"
    assert tables["tasks"] == [
        ["pick", "acc", "5", "25.00%", first, second],
        ["bytes", "bits_per_byte", "5", "\u2013", "2.3457, 1,200 items", "2.3457, 1,200 items"],
    ]
    assert tables["averages"] == [["average", "mean", "", "", "31.25%", "50.00%"]]
    assert tables["models"] == [["training seed", "", "", "", "\u2013", "3"]]
    assert tables["left out"] == [["long", "", "", "", "\u2013", "answers do not fit"]]


def test_settings_that_differ(tmp_path: Path) -> None:
    first, second = (write_full_run(tmp_path / name) for name in ("first", "second"))
    assert "No setting that is known differs." in report(first, second)[0].text
    summary = read_json(second / "summary.json")
    summary["config"] |= {"sparse_ift": None, "lr_decay_steps": 5}
    summary["versions"]["torch"] = "2.11.0"
    (second / "summary.json").write_text(json.dumps(summary))
    rows = table_rows(report(first, second)[0], "Settings that differ")[""]
    assert rows == [
        ["sparse_ift.sparsity", "0.75", "\u2013"],
        ["sparse_ift.structure", "block", "\u2013"],
        ["sparse_ift.block_size", "16", "\u2013"],
        ["sparse_ift", "options below", "null"],
        ["versions.torch", "2.13.0", "2.11.0"],
        ["lr_decay_steps", "\u2013", "5"],
    ]


def test_settings_at_their_defaults_are_left_out(real_page: tuple[Node, str], tmp_path: Path) -> None:
    root = real_page[0]
    (caption,) = [t.all("caption")[0].text for t in root.all("table") if "Settings of sparse-run" in t.text]
    left_out = re.fullmatch(r"Settings of sparse-run, without (\d+) defaults", caption)
    assert left_out
    assert int(left_out[1]) >= 20
    shown = {row[0]: row[1] for row in table_rows(root, caption)[""]}
    assert shown["sparse_ift.sparsity"] == "0.75"  # a default that names the model
    assert shown["sparse_ift.dst.update_every_steps"] == str(RIGL["dst"]["update_every_steps"])
    assert not {"sparse_ift.width_multiple", "sparse_ift.family.reserve", "data.text_field"} & shown.keys()
    assert not {"sparse_ift.seed", "sparse_ift.seq_len", "sparse_ift.init"} & shown.keys()  # of other sections
    differing = {row[0] for row in table_rows(root, "Settings that differ")[""]}
    assert "sparse_ift.dst.update_every_steps" in differing
    assert "sparse_ift.width_multiple" not in differing

    run = write_full_run(tmp_path / "run")
    summary = read_json(run / "summary.json")
    summary["config"]["sparse_ift"] |= {"width_multiple": 8, "seed": 3, "accounting": "linears"}
    summary["config"]["training"] |= {"logging_steps": 500.0, "seed": 4}
    (run / "summary.json").write_text(json.dumps(summary))
    (rows,) = [
        table_rows(root, t.all("caption")[0].text)[""]
        for root in [report(run)[0]]
        for t in root.all("table")
        if "Settings of run" in t.text
    ]
    assert ["sparse_ift.width_multiple", "8"] in rows
    assert ["sparse_ift.seed", "3"] in rows  # not what the training section says
    assert not {"sparse_ift.accounting", "training.logging_steps"} & {row[0] for row in rows}  # 500, an int or not


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    first, second = (write_full_run(tmp_path / name) for name in ("first", "second"))
    assert not report(first, second)[0].all("ul", "warnings")
    summary = read_json(second / "summary.json")
    summary["config"]["data"]["seq_len"] = 256
    (second / "summary.json").write_text(json.dumps(summary))
    result = evaluation()
    result["subtasks"]["pick"]["num_fewshot"] = 0
    (second / "eval_tiny.json").write_text(json.dumps(result))
    (warnings,) = report(first, second)[0].all("ul", "warnings")
    (notice,) = warnings.all("li")
    assert notice.text.startswith("second cannot be compared with first: data.seq_len is 128 and 256; ")
    assert "pick: the number of shots is 5 and 0" in notice.text


def test_two_runs_are_compared_at_a_glance(real_runs: tuple[Path, Path], real_page: tuple[Node, str]) -> None:
    dense, sparse = (read_json(run / "summary.json") for run in real_runs)
    (cards,) = real_page[0].all("ul", "cards")
    assert len(cards.all("li")) == 4
    for title, key in (("Held-out loss", "eval_loss"), ("Weights, gradients", "train_state_bytes")):
        (card,) = (item for item in cards.all("li") if title in item.text)
        assert f"{sparse[key] / dense[key]:.3f}x" in card.text
    assert f"{sparse['eval_loss']:.4f} instead of {dense['eval_loss']:.4f}" in cards.text
    header = real_page[0].all("header")[0].text
    assert "(wide, scope model, 75% sparse, rigl), compared with " in header
    assert "(dense)." in header


def test_a_single_run_has_no_cards_and_empty_sections_name_a_command(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", DENSE)
    root, _ = report(run)
    assert not root.all("ul", "cards")
    assert "run: dense." in root.all("header")[0].text
    assert "sparseift evaluate --model RUN --suite builtin" in root.by_id("evaluation").text
    assert "sparseift analyze RUN" in root.by_id("spectral").text
    assert "sparseift report RUN OTHER_RUN" in root.by_id("settings").text
    for section in ("loss", "degrees", "masks", "training"):
        assert "sparseift pretrain" in root.by_id(section).text, section


def test_a_run_on_other_text_has_one_notice(tmp_path: Path) -> None:
    first, second = (write_full_run(tmp_path / name) for name in ("first", "second"))
    summary = read_json(second / "summary.json")
    summary["config"]["data"] |= {"seq_len": 256, "tokenizer": "mine"}
    (second / "summary.json").write_text(json.dumps(summary))
    (warnings,) = report(first, second)[0].all("ul", "warnings")
    assert warnings.text.count("second cannot be compared with first") == 1
    assert "data.seq_len is 128 and 256; data.tokenizer is bpe and mine." in warnings.text


def test_notes(full_run: Path) -> None:
    notes = report(full_run)[0].by_id("notes").text
    assert "norms and elementwise work are left out" in notes
    assert "One seed each" in notes
    assert "Unstructured masks" not in notes
    (full_run / "spectral.json").unlink()
    assert "full lacks: spectral.json (spectral curves)." in report(full_run)[0].by_id("notes").text


def test_a_run_with_a_wider_residual_stream(tmp_path: Path) -> None:
    sparse = {"family": {"name": "wide", "scope": "residual"}, "sparsity": 0.5, "dst": {"algorithm": "static"}}
    recipe = tiny_recipe(tmp_path, sparse, max_steps=4)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16, **heads}
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**values, "model": {"name": "llama-gpt3-small", "config": sizes}}))
    load_script("recipes/pretrain.py").main([str(recipe)])
    run = tmp_path / "run"
    main(["analyze", str(run), "--output", str(tmp_path / "analysis")])
    root, text = report(run)
    check_page(root, text)
    assert "run: wide, scope residual, 50% sparse, static." in root.all("header")[0].text
    masks = read_masks(run)
    rows = table_rows(root, "Sparsity and degrees by layer, counted in weights")[""]
    assert [row[0] for row in rows] == list(masks)
    assert [row[1] for row in rows if row[0] == "model.embed_tokens"] == ["embedding"]
    (caption,) = [
        found
        for table in root.all("table")
        if (found := table.all("caption")[0].text).startswith("Spectral quantities by")
    ]
    assert {row[1] for row in table_rows(root, caption)[""]} >= {"embedding", "q", "mlp_out"}


# ---- colours


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """Contrast ratio of WCAG 2, 1 to 21."""
    dark, light = sorted([luminance(first), luminance(second)])
    return (light + 0.05) / (dark + 0.05)


def test_contrast_in_both_schemes() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    schemes = variables((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    assert schemes[0].keys() == schemes[1].keys()
    for scheme in schemes:
        for ground in ("--page", "--panel"):
            for name in ("--text", "--soft", "--link", "--good", "--open", "--bad"):
                assert contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground)
        for index in range(6):  # names at the ends of lines are text, too
            assert contrast(scheme[f"--run-{index}"], scheme["--page"]) >= 4.5, index
        for name in ("--edge", *(f"--run-{index}" for index in range(6))):
            assert contrast(scheme[name], scheme["--page"]) >= 3, name
        shades = [contrast(scheme[f"--h{index}"], scheme["--page"]) for index in range(9)]
        assert shades[0] > 1.15  # told from a blank cell
        assert all(second > 1.1 * first for first, second in pairwise(shades))


# ---- the command


def test_the_command(full_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = full_run.parent / "new" / "report.html"
    assert main(["report", str(full_run), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"full: finished\nwrote {output}\n"
    check_page(parse(output.read_text()), output.read_text())
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


def test_paths_that_are_no_runs(full_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(full_run.parent / "report.html")
    for words, message in (
        (["nowhere"], "nowhere is missing: a run is an output folder"),
        ([str(full_run / "summary.json")], "summary.json is a file: a run is an output folder"),
        ([str(full_run), f"{full_run}/../full"], "is given twice"),
    ):
        assert main(["report", *words, "-o", output]) == 2
        assert message in capsys.readouterr().err
    assert main(["report", str(full_run), "-o", str(full_run)]) == 2
    assert "--output must be a file such as report.html, got the folder" in capsys.readouterr().err
    assert not Path(output).exists()


FOREIGN = {
    "model.safetensors": b"\x10\0\0\0\0\0\0\0{}\xff",
    "notes.html": b"<!DOCTYPE html>\n<html><head><title>Mine</title></head><body>Training runs: </body></html>",
    "empty.html": b"",
}


@pytest.mark.parametrize("name", ["summary.json", *FOREIGN])
def test_a_file_that_is_no_report_is_kept(full_run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = full_run / name
    if name in FOREIGN:
        path.write_bytes(FOREIGN[name])
    before = path.read_bytes()
    assert main(["report", str(full_run), "-o", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"sparseift: {path} is there already, and not from sparseift report")
    assert path.read_bytes() == before


def test_a_page_takes_the_place_of_an_older_one(full_run: Path) -> None:
    _, first = report(full_run)
    (full_run / "spectral.json").unlink()
    _, second = report(full_run)
    assert "spectral.json (spectral curves)" in second
    assert "spectral.json (spectral curves)" not in first


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_full_run(tmp_path / seed / "run") for seed in ("a", "b")]
    write_lines(runs[1] / "metrics.jsonl", [])
    root, _ = report(*runs)
    assert [node.text for node in root.all("strong")] == ["a/run", "b/run"]
