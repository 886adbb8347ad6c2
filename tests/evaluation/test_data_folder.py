"""Offline data folders: every kind of damage gives a named error, no cache leaks, and no network is said at once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet  # type: ignore[import-untyped, unused-ignore]

from sparseift_llm.evaluation import hub
from sparseift_llm.evaluation.data_files import DataError
from sparseift_llm.evaluation.data_folder import Requirement, check_folder, load_local, merge
from sparseift_llm.evaluation.suites import V1, select
from sparseift_llm.evaluation.task_loading import load_suite
from tests.helpers.evaluation import mmlu_rows, write_dataset, write_leaderboard_data
from tests.helpers.scripts import load_script

ANATOMY = Requirement("cais/mmlu", "anatomy", ("dev", "test"))
ARC = Requirement("allenai/ai2_arc", "ARC-Challenge", ("test", "train", "validation"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_leaderboard_data(tmp_path / "data", ["anatomy", "virology"])


def test_a_complete_folder_is_described(folder: Path) -> None:
    found = check_folder(folder, [ANATOMY, ARC])
    assert found["cais/mmlu (anatomy)"]["rows"] == {"dev": 5, "test": 3, "validation": 2}
    assert len(found["allenai/ai2_arc (ARC-Challenge)"]["sha256"]) == 64
    rows = load_local(folder, "cais/mmlu", "anatomy")
    assert rows["dev"][0] == json.loads((folder / "cais/mmlu/anatomy/dev.jsonl").read_text().splitlines()[0])
    assert set(load_local(folder, "Rowan/hellaswag")) == {"train", "validation"}


def cut_in_a_line(path: Path) -> None:
    path.write_text(path.read_text()[:-40])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, r"cais/mmlu \(anatomy\): the file .*anatomy/test.jsonl is missing"),
    "truncated": (cut_in_a_line, r"cais/mmlu \(anatomy\): .*test.jsonl, line 3 cannot be read .*truncated or damaged"),
    "empty": (lambda path: path.write_text(""), r"test.jsonl has no rows; the file is truncated or damaged"),
    "not objects": (lambda path: path.write_text("1\n2\n"), r"line 1 cannot be read \(it is a int, not an object\)"),
    "not text": (
        lambda path: path.write_bytes(b"\xff\xfe"),
        r"test.jsonl, line 1 cannot be read .*truncated or damaged",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_to_a_file_is_named(folder: Path, damage: str) -> None:
    check_folder(folder, [ANATOMY, ARC])
    change, message = DAMAGE[damage]
    change(folder / "cais/mmlu/anatomy/test.jsonl")
    with pytest.raises(DataError, match=message) as raised:
        check_folder(folder, [ANATOMY, ARC])
    assert f"sparseift fetch-data --data-dir {folder} --datasets cais/mmlu" in str(raised.value)
    assert "ai2_arc" not in str(raised.value)


def test_all_missing_pieces_are_named_at_once(folder: Path) -> None:
    shutil.rmtree(folder / "cais")
    (folder / "allenai/ai2_arc/README.md").unlink()
    (folder / "openai/gsm8k/main/test.jsonl").unlink()
    with pytest.raises(DataError) as raised:
        check_folder(folder, [ANATOMY, ARC, Requirement("openai/gsm8k", "main", ("test",))])
    message = str(raised.value)
    assert f"the folder {folder}/cais/mmlu is missing" in message
    assert "ai2_arc/README.md is missing or has no front matter" in message
    assert "gsm8k/main/test.jsonl is missing" in message
    assert "--datasets allenai/ai2_arc cais/mmlu openai/gsm8k" in message


def test_missing_configurations_and_splits_are_named(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"cais/mmlu \(physics\): the configuration is missing; .* \['anatomy', 'virology'\]"
    ):
        check_folder(folder, [Requirement("cais/mmlu", "physics", ("test",))])
    with pytest.raises(DataError, match=r"split 'auxiliary' is missing; .* names \['dev', 'test', 'validation'\]"):
        check_folder(folder, [Requirement("cais/mmlu", "anatomy", ("auxiliary",))])
    with pytest.raises(DataError, match="is not a folder"):
        check_folder(folder / "nothing", [ANATOMY])


def test_checksums_catch_a_file_cut_between_lines(folder: Path) -> None:
    path = folder / "cais/mmlu/anatomy/test.jsonl"
    sums = {"anatomy/test.jsonl": check_sum(path)}
    (folder / "cais/mmlu/checksums.json").write_text(json.dumps(sums))
    check_folder(folder, [ANATOMY])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(
        DataError, match=r"test.jsonl is not the file that checksums.json speaks of; it changed or was cut"
    ):
        check_folder(folder, [ANATOMY])


def check_sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_parquet_files_are_read_and_checked(tmp_path: Path) -> None:
    folder = tmp_path / "cais" / "mmlu"
    write_dataset(folder, {"anatomy": {"dev": mmlu_rows(random.Random(0), 4), "test": mmlu_rows(random.Random(1), 6)}})
    for split in ("dev", "test"):
        rows = [json.loads(line) for line in (folder / f"anatomy/{split}.jsonl").read_text().splitlines()]
        parquet.write_table(Table.from_pylist(rows), folder / f"anatomy/{split}.parquet")
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace(".jsonl", ".parquet"))
    assert check_folder(tmp_path, [ANATOMY])["cais/mmlu (anatomy)"]["rows"] == {"dev": 4, "test": 6}
    assert load_local(tmp_path, "cais/mmlu", "anatomy")["test"].num_rows == 6
    whole = (folder / "anatomy/test.parquet").read_bytes()
    (folder / "anatomy/test.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"test.parquet cannot be read .*truncated or damaged"):
        check_folder(tmp_path, [ANATOMY])


def test_no_cache_leaks(folder: Path) -> None:
    """A changed file is read anew even if its time and size are the same, and a data set that is gone is gone."""
    suite = select(V1, ["gsm8k"])
    path = folder / "openai/gsm8k/main/test.jsonl"
    before = load_suite(suite, folder)
    stat = path.stat()
    changed = path.read_text().translate(str.maketrans("0123456789", "1234567890"))
    path.write_text(changed)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = load_suite(suite, folder)
    assert before.tasks["gsm8k"].eval_docs[0]["answer"] != after.tasks["gsm8k"].eval_docs[0]["answer"]
    assert before.data != after.data
    shutil.rmtree(folder / "openai")
    with pytest.raises(DataError, match="openai/gsm8k is missing"):
        load_suite(suite, folder)


@pytest.mark.parametrize("splits", [("train",), ("test",), ("train", "test")])
def test_a_column_renamed_in_some_splits_is_named(folder: Path, splits: Sequence[str]) -> None:
    for split in splits:
        path = folder / f"openai/gsm8k/main/{split}.jsonl"
        path.write_text(path.read_text().replace('"question"', '"problem"'))
    with pytest.raises(
        DataError, match=r"\.jsonl, line 1: the task cannot use it .*'question' is undefined.*problem"
    ) as e:
        load_suite(select(V1, ["gsm8k"]), folder)
    assert all(f"main/{split}.jsonl" in str(e.value) for split in splits[-1:])


def test_no_folder_and_no_network_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.perf_counter()
    with pytest.raises(
        DataError, match=r"no --data-dir is given and .*is set; the suite reads Rowan/hellaswag allenai"
    ):
        load_suite(V1)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"no --data-dir is given and http://127.0.0.1:9 does not answer \(\w+Error"):
        load_suite(V1)
    assert time.perf_counter() - started < 60  # not after minutes of retries


def test_fetched_data_can_be_evaluated(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is stood in for by a folder; what is fetched has checksums and the same rows."""

    def from_folder(name: str, config: str | None = None, split: str | None = None) -> Any:
        return load_local(folder, name, config)[split]

    monkeypatch.setattr("datasets.load_dataset", _aside(from_folder))
    monkeypatch.setattr(hub, "hub_fault", lambda: None)
    target = tmp_path / "fetched"
    needed = [
        ANATOMY,
        Requirement("cais/mmlu", "virology", ("dev", "test")),
        Requirement("Rowan/hellaswag", "", ("train",)),
    ]
    written = hub.fetch(target, needed)
    assert len(written) == 5
    monkeypatch.undo()
    found = check_folder(target, needed)
    assert found["cais/mmlu (virology)"]["rows"] == {"dev": 5, "test": 4}
    assert (
        load_local(target, "cais/mmlu", "anatomy")["test"][:] == load_local(folder, "cais/mmlu", "anatomy")["test"][:]
    )
    assert (target / "Rowan/hellaswag/checksums.json").is_file()
    (target / "cais/mmlu/anatomy/dev.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"is not the file that checksums.json speaks of"):
        check_folder(target, needed)


def _aside(stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """Only hub names go to the stand-in; load_local itself reads with the stock function."""
    import datasets  # type: ignore[import-untyped, unused-ignore]

    stock = datasets.load_dataset
    return lambda name, *args, **kwargs: (stand_in if "/" in name else stock)(name, *args, **kwargs)


def test_fetching_without_a_network_or_from_a_closed_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SystemExit, match="fetch_data: nothing was fetched: HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    ):
        load_script("eval/fetch_data.py").main(["--data-dir", str(tmp_path), "--suite", "v1"])
    with pytest.raises(SystemExit, match="fetch_data: no task of the suite reads no/such"):
        load_script("eval/fetch_data.py").main(["--data-dir", str(tmp_path), "--suite", "v1", "--datasets", "no/such"])
    monkeypatch.setattr(hub, "hub_fault", lambda: None)

    def closed(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("403 gated")

    monkeypatch.setattr("datasets.load_dataset", closed)
    with pytest.raises(
        DataError, match=r"Idavidrein/gpqa \(gpqa_main\), split 'train', cannot be fetched .*hf auth login"
    ):
        hub.fetch(tmp_path, [Requirement("Idavidrein/gpqa", "gpqa_main", ("train",))])


def test_requirements_are_merged() -> None:
    parts = [
        Requirement("a/b", "x", ("dev",)),
        Requirement("a/b", "x", ("test", "dev")),
        Requirement("a/b", "", ("test",)),
    ]
    assert merge(parts) == [Requirement("a/b", "", ("test",)), Requirement("a/b", "x", ("dev", "test"))]
