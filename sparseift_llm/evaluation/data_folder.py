"""A folder of data sets under their hub names: which pieces are missing or damaged, and reading it without a cache.

Each data set has a README.md whose front matter names its configurations and files, as on the hub. Whether the rows
mean what a task takes them for is checked in item_checks.py.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparseift_llm.evaluation.data_files import DataError, count_rows, is_parquet

CHECKSUMS_NAME = "checksums.json"


@dataclass(frozen=True, order=True)
class Requirement:
    """Splits of one configuration of one data set that tasks need.

    Args:
        dataset: hub name.
        config: configuration, "" for the default one.
        splits: names, sorted.
    """

    dataset: str
    config: str
    splits: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.dataset}{f' ({self.config})' if self.config else ''}"


def merge(requirements: Iterable[Requirement]) -> list[Requirement]:
    """One requirement per data set and configuration, with all splits asked for."""
    splits: dict[tuple[str, str], set[str]] = {}
    for item in requirements:
        splits.setdefault((item.dataset, item.config), set()).update(item.splits)
    return [Requirement(dataset, config, tuple(sorted(names))) for (dataset, config), names in sorted(splits.items())]


def check_folder(data_dir: str | Path, requirements: Iterable[Requirement]) -> dict[str, dict[str, Any]]:
    """Read every file that is needed, once.

    Args:
        data_dir: the folder.
        requirements: what tasks need.

    Returns:
        `{"cais/mmlu (anatomy)": {"sha256": ..., "rows": {split: number}}, ...}`, what the scores belong to.

    Raises:
        DataError: the folder, a data set, a split or a file is missing, a file is truncated or damaged, or is not
            what `checksums.json` says; all such pieces are named, with what to fetch.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"--data-dir {root} is not a folder")
    found, faults, broken = {}, [], set()
    for item in merge(requirements):
        try:
            found[str(item)] = _describe(root, item)
        except DataError as error:
            faults.append(str(error))
            broken.add(item.dataset)
    if faults:
        names = " ".join(sorted(broken))
        raise DataError(
            "the data folder is not complete:\n  " + "\n  ".join(faults) + "\n"
            f"fetch anew, where there is a network: sparseift fetch-data --data-dir {root} --datasets {names}"
        )
    return found


def load_local(data_dir: str | Path, dataset: str, config: str | None = None) -> Any:
    """The `datasets.DatasetDict` of a data set, built in memory from the folder's files and nothing else.

    Args:
        data_dir: the folder.
        dataset: hub name.
        config: configuration, None or "" for the default one.

    Raises:
        DataError: files that README.md names are missing; `check_folder` finds whatever else may be wrong.
    """
    return load_files(split_files(data_dir, dataset, config))


def load_files(by_split: Mapping[str, Sequence[Path]]) -> Any:
    """The `datasets.DatasetDict` of the splits' files, built in memory without a cache.

    Splits whose columns differ are allowed: a task may well read only those that they share.

    Raises:
        DataError: `datasets` cannot read the files.
    """
    import datasets  # type: ignore[import-untyped, unused-ignore]

    def load(files: Mapping[str, Sequence[Path]]) -> Any:
        kind = "parquet" if all(is_parquet(path) for paths in files.values() for path in paths) else "json"
        names = {split: [str(path) for path in paths] for split, paths in files.items()}
        with tempfile.TemporaryDirectory() as cache_dir:  # nothing of an earlier run can turn up
            # not datasets.load_dataset, in whose place task_loading.py puts a function that comes here
            return datasets.load.load_dataset(kind, data_files=names, cache_dir=cache_dir, keep_in_memory=True)

    try:
        return load(by_split)
    except datasets.exceptions.DatasetGenerationError:
        pass  # the columns of the splits may differ
    splits = {}
    for split, paths in by_split.items():
        try:
            splits.update(load({split: paths}))
        except datasets.exceptions.DatasetGenerationError as error:
            raise DataError(
                f"{', '.join(map(str, paths))} cannot be read by datasets ({error.__cause__ or error}); are all rows "
                "of one kind?"
            ) from error
    return datasets.DatasetDict(splits)


def split_files(data_dir: str | Path, dataset: str, config: str | None = None) -> dict[str, list[Path]]:
    """The files of every split, as the front matter of the data set's README.md names them.

    Raises:
        DataError: the data set, its README.md, the configuration or a file is missing.
    """
    return _files(Path(data_dir) / dataset, dataset, config or "")


def _describe(root: Path, item: Requirement) -> dict[str, Any]:
    """Check one configuration's files, see `check_folder`."""
    folder = root / item.dataset
    by_split = _files(folder, item.dataset, item.config)
    lacking = [split for split in item.splits if split not in by_split]
    if lacking:
        raise DataError(f"{item}: split {lacking[0]!r} is missing; {folder}/README.md names {sorted(by_split)}")
    digest, rows = hashlib.sha256(), {}
    checksums = _read_checksums(folder)
    for split, paths in sorted(by_split.items()):
        rows[split] = 0
        for path in paths:
            content_hash = hashlib.sha256(path.read_bytes()).hexdigest()
            recorded = checksums.get(path.relative_to(folder).as_posix())
            if recorded is not None and recorded != content_hash:
                raise DataError(
                    f"{item}: {path} is not the file that {CHECKSUMS_NAME} speaks of; it changed or was cut"
                )
            try:
                rows[split] += count_rows(path)
            except DataError as error:
                raise DataError(f"{item}: {error}") from error
            digest.update(f"{split}\0{content_hash}\0".encode())
    return {"sha256": digest.hexdigest(), "rows": rows}


def _files(folder: Path, dataset: str, config: str) -> dict[str, list[Path]]:
    """split -> files, as the README's front matter says; every one exists."""
    name = f"{dataset}{f' ({config})' if config else ''}"
    if not folder.is_dir():
        raise DataError(f"{name}: the folder {folder} is missing")
    chosen = _configuration(folder, name, config)
    found: dict[str, list[Path]] = {}
    for entry in chosen["data_files"]:
        patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        for pattern in patterns:
            paths = sorted(folder.glob(pattern))
            if not paths:
                raise DataError(f"{name}: the file {folder / pattern} is missing")
            found.setdefault(entry["split"], []).extend(paths)
    return found


def _configuration(folder: Path, name: str, config: str) -> Mapping[str, Any]:
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        configs = yaml.safe_load(text.split("---")[1])["configs"]
        by_name = {entry["config_name"]: entry for entry in configs}
        default = next((entry for entry in configs if entry.get("default")), configs[0])
        for entry in by_name.values():
            [(item["split"], item["path"]) for item in entry["data_files"]]
    except (OSError, UnicodeDecodeError, IndexError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(
            f"{name}: {folder}/README.md is missing or has no front matter with configs "
            f"({type(error).__name__}: {error})"
        ) from error
    if config and config not in by_name:
        raise DataError(f"{name}: the configuration is missing; {folder}/README.md names {sorted(by_name)}")
    chosen: Mapping[str, Any] = by_name[config] if config else default
    return chosen


def _read_checksums(folder: Path) -> dict[str, str]:
    """File -> SHA-256 as fetch_data.py wrote it down; nothing for a folder from elsewhere."""
    path = folder / CHECKSUMS_NAME
    if not path.is_file():
        return {}
    try:
        values: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    return values
