"""Comparisons: differences and intervals against known answers, pairing, seeds, and refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sparseift_llm.evaluation.comparison import compare, read_arm
from sparseift_llm.evaluation.comparison_table import markdown
from sparseift_llm.evaluation.harness import TaskResult
from sparseift_llm.evaluation.result_file import ResultFile
from sparseift_llm.evaluation.suites import Headline, Score, Suite
from tests.helpers.scripts import load_script

SCORES = (Score("one", chance=0.25), Score("two", chance=0.5))
RATIO = Score("bits", "bits_per_byte")
SUITE = Suite(
    "made-up",
    (Headline("one", SCORES[:1]), Headline("both", SCORES), Headline("bits", (RATIO,))),
    {"average": ("one", "both")},
)


def write(path: Path, values: dict[str, Any], suite: Suite = SUITE, seed: int | None = None, **leaf: Any) -> Path:
    """A result file whose items have these values, one list per task; pairs for ratios."""
    file = ResultFile(path, {}, {task: {} for task in values}, resume=False)
    for task, entries in values.items():
        key = next(s.key for line in suite.headlines for s in line.scores if s.task == task)
        array = np.array([entry if isinstance(entry, list) else [entry, 1.0] for entry in entries])
        result = {
            "version": 1.0,
            "num_fewshot": 0,
            "num_items": len(entries),
            "task_hash": f"hash of {task}",
            "metrics": {key: float(array[:, 0].sum() / array[:, 1].sum())},
            **leaf,
        }
        items = [{"id": i, "values": {key: entry}} for i, entry in enumerate(entries)]
        file.add(task, TaskResult(result, items, [], {}))
    file.finish(suite, {"name": path.stem, "sha256": str(path), "run": {"seed": seed}})
    return path


def answers(rate: float, seed: int, number: int = 400) -> list[float]:
    return [float(x) for x in np.random.default_rng(seed).random(number) < rate]


def row(found: dict[str, Any], task: str) -> dict[str, Any]:
    return next(line for line in found["rows"] if line["task"] == task)


def values_of(first: float, second: float, seed: int = 0) -> dict[str, Any]:
    bits = [[2.0 * n * (1 + first), float(n)] for n in range(1, 51)]
    return {"one": answers(first, seed), "two": answers(second, seed + 1, 200), "bits": bits}


def arms(*paths: Path) -> list[Any]:
    return [read_arm(str(path)) for path in paths]


def test_values_and_differences_are_exact(tmp_path: Path) -> None:
    a, b = values_of(0.3, 0.5), values_of(0.5, 0.6, 10)
    found = compare(arms(write(tmp_path / "a.json", a), write(tmp_path / "b.json", b)))
    one = [np.mean(v["one"]) for v in (a, b)]
    both = [(np.mean(v["one"]) + np.mean(v["two"])) / 2 for v in (a, b)]
    assert row(found, "one")["values"] == pytest.approx(one)
    assert row(found, "both")["values"] == pytest.approx(both)
    assert row(found, "average")["values"] == pytest.approx([(x + y) / 2 for x, y in zip(one, both, strict=True)])
    assert row(found, "bits")["values"] == pytest.approx([2.6, 3.0])
    assert row(found, "both")["differences"][0]["difference"] == pytest.approx(both[1] - both[0])
    bits = row(found, "bits")["differences"][0]
    assert bits["low"] == pytest.approx(0.4)  # the same ratio for each item: nothing to be uncertain about
    assert bits["high"] == pytest.approx(0.4)


def test_intervals_have_the_width_of_the_normal_theory(tmp_path: Path) -> None:
    a, b = values_of(0.3, 0.5), values_of(0.5, 0.6, 10)
    found = compare(arms(write(tmp_path / "a.json", a), write(tmp_path / "b.json", b)), num_samples=4000)
    difference = np.array(b["one"]) - np.array(a["one"])
    entry = row(found, "one")["differences"][0]
    width = 2 * 1.96 * difference.std() / np.sqrt(400)
    assert entry["high"] - entry["low"] == pytest.approx(width, rel=0.06)
    assert entry["low"] < entry["difference"] < entry["high"]


def test_the_bootstrap_is_paired(tmp_path: Path) -> None:
    """Two models that agree on all items but three differ for sure; unpaired they would hardly."""
    a = values_of(0.5, 0.5)
    b = copy.deepcopy(a)
    wrong = [index for index, value in enumerate(b["one"]) if not value][:12]
    for index in wrong:
        b["one"][index] = 1.0
    found = compare(arms(write(tmp_path / "a.json", a), write(tmp_path / "b.json", b)))
    entry = row(found, "one")["differences"][0]
    assert entry["difference"] == pytest.approx(12 / 400)
    assert 0 < entry["low"] < entry["high"] < 0.05
    same = compare(arms(tmp_path / "a.json", tmp_path / "a.json"))
    assert all(e["low"] == e["high"] == 0 for line in same["rows"] for e in line["differences"])


def test_intervals_cover_the_truth(tmp_path: Path) -> None:
    """Over repeated draws of equal models, 90% intervals miss 0 about one time in ten."""
    suite = Suite("s", (Headline("one", SCORES[:1]),), {})
    misses = 0
    for trial in range(60):
        paths = [
            write(tmp_path / f"{trial}{name}.json", {"one": answers(0.4, 1000 + 2 * trial + number, 150)}, suite)
            for number, name in enumerate("ab")
        ]
        entry = compare(arms(*paths), num_samples=300, confidence=0.9)["rows"][0]["differences"][0]
        misses += not entry["low"] <= 0 <= entry["high"]
    assert 1 <= misses <= 14  # 6 expected, standard deviation 2.3


def seeds(folder: Path, name: str, rates: list[float], seed_of: list[int | None]) -> str:
    paths = [
        write(folder / f"{name}{index}.json", values_of(rate, rate, 50 * index), seed=seed)
        for index, (rate, seed) in enumerate(zip(rates, seed_of, strict=True))
    ]
    return f"{name}=" + ",".join(map(str, paths))


def test_seeds_widen_the_interval(tmp_path: Path) -> None:
    """Three seeds that scatter more than the items of each explain."""
    dense = read_arm(seeds(tmp_path, "dense", [0.4, 0.5, 0.6], [0, 1, 2]))
    sparse = read_arm(seeds(tmp_path, "sparse", [0.62, 0.42, 0.52], [3, 4, 5]))
    found = compare([dense, sparse])
    entry = row(found, "one")["differences"][0]
    single = row(compare(arms(dense.paths[0], sparse.paths[0])), "one")["differences"][0]
    assert found["over"] == "items and seeds"
    assert entry["high"] - entry["low"] > 1.5 * (single["high"] - single["low"])
    expected = np.mean([np.mean(values_of(r, r, 50 * i)["one"]) for i, r in enumerate([0.62, 0.42, 0.52])])
    assert row(found, "one")["values"][1] == pytest.approx(expected)


def test_equal_seeds_are_paired(tmp_path: Path) -> None:
    """Where each seed's pair differs by the same amount, the scatter between seeds cancels."""
    rates = [0.3, 0.5, 0.7]
    paired = [
        read_arm(seeds(tmp_path, "a", rates, [0, 1, 2])),
        read_arm(seeds(tmp_path, "b", [r + 0.1 for r in rates], [0, 1, 2])),
    ]
    unpaired = [paired[0], read_arm(seeds(tmp_path, "c", [r + 0.1 for r in rates], [5, 6, 7]))]
    widths = []
    for pair in (paired, unpaired):
        entry = row(compare(pair), "one")["differences"][0]
        widths.append(entry["high"] - entry["low"])
    assert widths[0] < 0.5 * widths[1]


NAMES = {
    "{folder}/lr=1e-3/eval.json": "eval",
    "dense={folder}/lr=1e-3/eval.json": "dense",
    "lr=1e-3={folder}/lr=1e-3/eval.json": None,  # the name ends at the first sign
    "{folder}/lr=1e-3/eval.json,{folder}/lr=2e-3/eval.json": "eval",
    "two={folder}/lr=1e-3/eval.json,{folder}/lr=2e-3/eval.json": "two",
    "{folder}/a,b.json": "a,b",
}


@pytest.mark.parametrize("text", list(NAMES))
def test_paths_may_have_equals_signs_and_commas(tmp_path: Path, text: str) -> None:
    for number, rate in enumerate(("1e-3", "2e-3")):
        (tmp_path / f"lr={rate}").mkdir()
        write(tmp_path / f"lr={rate}" / "eval.json", values_of(0.3, 0.5), seed=number)
    write(tmp_path / "a,b.json", values_of(0.3, 0.5))
    filled = text.format(folder=tmp_path)
    if NAMES[text] is None:
        with pytest.raises(ValueError, match=r"1e-3=.*eval.json is missing"):
            read_arm(filled)
        return
    arm = read_arm(filled)
    assert arm.name == NAMES[text]
    assert len(arm.results) == text.count("{folder}")


def test_a_file_here_with_an_equals_sign_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "lr=1.json", values_of(0.3, 0.5))
    monkeypatch.chdir(tmp_path)
    assert read_arm("lr=1.json").paths == (Path("lr=1.json"),)
    assert read_arm("dense=lr=1.json").name == "dense"


def test_one_run_named_several_times_is_not_several_seeds(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{name}.json", values_of(0.3, 0.5), seed=7) for name in "ab")
    c = write(tmp_path / "c.json", values_of(0.3, 0.5), seed=8)
    with pytest.raises(ValueError, match=r"a.json and .*a.json are the same file, and not two seeds of x; name every"):
        read_arm(f"x={a},{c},{a}")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="are the same file"):
        read_arm(f"x={a},{tmp_path}/folder/../a.json")
    with pytest.raises(ValueError, match=r"a.json and .*b.json are of the same training seed, and not two seeds of x"):
        read_arm(f"x={a},{b}")
    values = json.loads(c.read_text())
    values["model"]["sha256"] = json.loads(a.read_text())["model"]["sha256"]
    c.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"a.json and .*c.json are evaluations of the same model, and not two seeds"):
        read_arm(f"x={a},{c}")
    assert len(compare(arms(a, a))["rows"]) == 4  # two arms may be the same


@pytest.mark.parametrize(("number", "has_warning"), [(2, True), (3, False)])
def test_too_few_seeds_are_said(tmp_path: Path, number: int, has_warning: bool) -> None:
    rates = [0.4, 0.5, 0.6][:number]
    found = [read_arm(seeds(tmp_path, name, rates, list(range(number)))) for name in "ab"]
    text = markdown(compare(found, 100))
    assert ("2 training seeds are too few to tell much" in text) == has_warning
    assert (
        "reaches 12.7 standard errors to either side, against 4.3 with 3 seeds and 2.8 with 5" in text
    ) == has_warning
    assert "Differences of b are taken seed by seed, as a has the same seeds." in text
    assert f"| training seeds |  | {number} | {number} |" in text


def test_a_single_run_among_seeds_is_said(tmp_path: Path) -> None:
    several = read_arm(seeds(tmp_path, "many", [0.4, 0.5, 0.6], [0, 1, 2]))
    single = arms(write(tmp_path / "one.json", values_of(0.5, 0.5, 7), seed=9))[0]
    assert "Of one there is one training run; seeds are taken to spread as those of many." in markdown(
        compare([several, single], 100)
    )
    assert "one has one training run; its seeds are taken to spread as those of many." in markdown(
        compare([single, several], 100)
    )


def test_differences_are_judged_together(tmp_path: Path) -> None:
    """A difference that just clears 0 alone does not among many; a large one does."""
    draw = np.random.default_rng(3)
    scores = tuple(Score(f"task{number}") for number in range(20))
    suite = Suite("many", tuple(Headline(score.task, (score,)) for score in scores), {})
    first = {score.task: [float(x) for x in draw.random(400) < 0.5] for score in scores}
    second = {task: [float(x) for x in draw.random(400) < 0.5] for task in first}
    second["task7"] = [float(x) for x in draw.random(400) < 0.75]
    found = compare(arms(write(tmp_path / "a.json", first, suite), write(tmp_path / "b.json", second, suite)), 300)
    alone = [line["task"] for line in found["rows"] for e in line["differences"] if not e["low"] <= 0 <= e["high"]]
    clear = [line["task"] for line in found["rows"] for e in line["differences"] if e["is_clear"]]
    assert clear == ["task7"]
    assert len(alone) > 1  # chance alone gives one of 20
    entry = row(found, "task7")["differences"][0]
    width, joint = entry["high"] - entry["low"], entry["joint_high"] - entry["joint_low"]
    assert joint / width == pytest.approx(stats.t.ppf(1 - 0.025 / 20, 399) / stats.t.ppf(0.975, 399))
    assert "* marks the 1 of 20 differences that are clear of 0 even when all are looked at together" in markdown(found)
    second["task7"] = first["task7"]
    (tmp_path / "b.json").unlink()
    found = compare(arms(tmp_path / "a.json", write(tmp_path / "c.json", second, suite)), 300)
    assert "Looked at together, none of the 20 differences is clear of 0 at 95% (Bonferroni)" in markdown(found)


def test_further_metrics_are_compared_where_they_are_means(tmp_path: Path) -> None:
    further = Headline("one/f1", (Score("one", "f1"),), is_further=True)
    suite = Suite("s", (Headline("one", (Score("one", "acc"),)), further), {"average": ("one",)})
    paths = []
    for name in "ab":
        file = ResultFile(tmp_path / f"{name}.json", {}, {"one": {}}, resume=False)
        items = [{"id": i, "values": {"acc,none": float(i % 2), "f1,none": float(i % 3)}} for i in range(12)]
        leaf = {"version": 1, "num_fewshot": 0, "num_items": 12, "task_hash": "x"}
        file.add("one", TaskResult({**leaf, "metrics": {"acc,none": 0.5, "f1,none": 1.0}}, items, [], {}))
        file.finish(suite, {"name": name})
        paths.append(file.path)
    assert [line["task"] for line in compare(arms(*paths), 100)["rows"]] == ["one", "one/f1", "average"]
    for name in "ab":
        items_path = tmp_path / f"{name}.items" / "one.jsonl"
        items_path.write_text(items_path.read_text().replace('"f1,none"', '"other,none"'))
    found = compare(arms(*paths), 100)
    assert [line["task"] for line in found["rows"]] == ["one", "average"]
    assert "Not compared, as they are not means over items: one/f1." in markdown(found)


def test_other_versions_are_noted(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{name}.json", values_of(0.3, 0.5)) for name in "ab")
    assert "different versions" not in markdown(compare(arms(a, b), 100))
    values = json.loads(b.read_text())
    values["versions"]["torch"] = ["2.11.0", "2.13.0"]
    b.write_text(json.dumps(values))
    assert "The files were made with different versions of torch, which can" in markdown(compare(arms(a, b), 100))


def test_normalised_suites_are_compared_normalised(tmp_path: Path) -> None:
    suite = Suite("v", (Headline("both", SCORES),), {"average": ("both",)}, normalized=True)
    values = {"one": [1.0, 0.0, 1.0, 1.0], "two": [1.0, 1.0, 1.0, 0.0]}
    found = compare(arms(write(tmp_path / "a.json", values, suite), write(tmp_path / "b.json", values, suite)))
    expected = (100 * (0.75 - 0.25) / 0.75 + 100 * (0.75 - 0.5) / 0.5) / 2
    assert row(found, "both")["values"][0] == pytest.approx(expected)
    assert json.loads((tmp_path / "a.json").read_text())["results"]["both"]["normalized"] == pytest.approx(expected)
    assert json.loads((tmp_path / "a.json").read_text())["average"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "v1"}, "the suite is 'made-up' and 'v1'"),
        ({"subtasks": {"one": {"num_fewshot": 5}}}, "one: the number of shots is 0 and 5"),
        ({"subtasks": {"one": {"version": 2.0}}}, "one: the version is 1.0 and 2.0"),
        ({"subtasks": {"one": {"num_items": 7}}}, "one: the number of items is 400 and 7"),
        ({"subtasks": {"two": {"task_hash": "x"}}}, "two: the hash of items and prompts is 'hash of two' and 'x'"),
        ({"subtasks": {"three": {}}}, r"the list of tasks is \['bits', 'one', 'two'\] and \['bits', 'one', 't"),
        ({"versions": {"lm_eval": "0.4.1"}}, "lm_eval's version is '[0-9.]+' and '0.4.1'"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    a, b = (write(tmp_path / f"{name}.json", values_of(0.3, 0.5)) for name in "ab")
    values = json.loads(b.read_text())
    for key, entry in change.items():
        if isinstance(entry, dict):
            for inner, new in entry.items():
                values[key][inner] = {**values[key].get(inner, {}), **new} if isinstance(new, dict) else new
        else:
            values[key] = entry
    b.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"a.json and .*b.json cannot be compared: {message}"):
        compare(arms(a, b))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", values_of(0.3, 0.5))
    with pytest.raises(ValueError, match=r"none.json is missing: the evaluation has not finished"):
        read_arm(str(tmp_path / "none.json"))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x.json is not a result file of `sparseift evaluate`"):
        read_arm(str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match="names no result file"):
        read_arm("name=")
    with pytest.raises(ValueError, match="at least two"):
        compare(arms(a))
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\)"):
        compare(arms(a, a), confidence=95)
    items = tmp_path / "a.items" / "one.jsonl"
    items.write_text("".join(items.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="one has 399 item records, not as many as its result says"):
        compare(arms(a, a))
    items.unlink()
    with pytest.raises(ValueError, match=r"item records .*one.jsonl are missing or damaged"):
        compare(arms(a, a))


def test_metrics_that_are_no_means_are_refused(tmp_path: Path) -> None:
    suite = Suite("s", (Headline("one", (Score("one", "f1"),)),), {})
    a = write(tmp_path / "a.json", {"one": [1.0, 0.0]}, suite)
    items = tmp_path / "a.items" / "one.jsonl"
    items.write_text(items.read_text().replace('"f1,none": 1.0', '"f1,none": null'))
    with pytest.raises(ValueError, match="f1 of one is not a mean over items"):
        compare(arms(a, a))


@pytest.mark.parametrize("name", ["a.json", "notes.md"])
def test_the_script_keeps_files_of_others(name: str, tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", values_of(0.3, 0.5))
    (tmp_path / "notes.md").write_text("| task | metric |")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(SystemExit, match=rf"compare: .*{name} is there already, and not from sparseift compare; "):
        load_script("eval/compare.py").main([str(a), str(a), "--output", str(tmp_path / name)])
    assert (tmp_path / name).read_bytes() == before
    assert not (tmp_path / "a.md").exists()
    assert not (tmp_path / "notes.json").exists()


def test_the_script_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write(tmp_path / f"{name}.json", values_of(rate, 0.5)) for name, rate in (("a", 0.3), ("b", 0.5)))
    load_script("eval/compare.py").main([f"dense={a}", f"sparse={b}", "--output", str(tmp_path / "out" / "c")])
    text = capsys.readouterr().out
    assert "| task | metric | dense | sparse | sparse - dense | 95% interval |" in text
    assert "One training run each" in text
    assert (tmp_path / "out" / "c.md").read_text() in text
    assert json.loads((tmp_path / "out" / "c.json").read_text())["rows"][0]["task"] == "one"
    with pytest.raises(SystemExit, match=r"compare: .*missing"):
        load_script("eval/compare.py").main([str(a), str(tmp_path / "none.json")])
    load_script("eval/compare.py").main([str(b), str(a), "--output", str(tmp_path / "out" / "c.json")])
    assert "| task | metric | b | a | a - b |" in (tmp_path / "out" / "c.md").read_text()  # its own files
    with pytest.raises(SystemExit, match=r"compare: cannot read or write .*a.json: File exists"):
        load_script("eval/compare.py").main([str(a), str(b), "--output", str(a / "c")])
    assert markdown(compare(arms(a, b))).count("\n| bits | bits_per_byte | 2.6000 | 3.0000 | +0.4000 |") == 1
