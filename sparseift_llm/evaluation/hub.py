"""The network: is the hub there, and fetching data sets into a folder that data_folder.py reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import yaml
from huggingface_hub import constants, get_session

from sparseift_llm.evaluation.data_files import DataError
from sparseift_llm.evaluation.data_folder import CHECKSUMS_NAME, Requirement, merge
from sparseift_llm.utils.files import write_text, written_whole

_SECONDS = 5
_NLTK_FOLDER = "nltk_data"
_SENTENCE_SPLITTER = "punkt_tab"


def hub_fault() -> str | None:
    """Why the hub cannot be asked, found out by one request without retries; None if it can."""
    import datasets  # type: ignore[import-untyped, unused-ignore]

    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # the HTTP client's kinds differ between versions of huggingface_hub
        return f"{constants.ENDPOINT} does not answer ({type(error).__name__}: {error})"
    return None


def fetch(data_dir: str | Path, requirements: Iterable[Requirement]) -> list[Path]:
    """Download data sets from the hub into `data_dir` as JSON lines, with README.md and checksums.json.

    Args:
        data_dir: made if need be; configurations that are there already and not asked for are kept.
        requirements: what to fetch.

    Returns:
        The files written.

    Raises:
        DataError: no network, or the hub refuses a data set (some ask you to accept terms and log in).
    """
    fault = hub_fault()
    if fault:
        raise DataError(f"nothing was fetched: {fault}")
    return [path for item in merge(requirements) for path in _fetch_one(Path(data_dir), item)]


def use_sentence_splitter(data_dir: str | Path | None) -> None:
    """Let nltk find the model that IFEval's tasks split sentences with: in the data folder or where nltk looks.

    Raises:
        DataError: it is in neither.
    """
    import nltk

    if data_dir is not None:
        nltk.data.path.insert(0, str(Path(data_dir) / _NLTK_FOLDER))
    try:
        nltk.data.find(f"tokenizers/{_SENTENCE_SPLITTER}")
    except LookupError as error:
        raise DataError(
            f"IFEval needs nltk's {_SENTENCE_SPLITTER}; where there is a network: "
            f"sparseift fetch-data --data-dir {data_dir or 'DIR'} --suite v2"
        ) from error


def fetch_sentence_splitter(data_dir: str | Path) -> None:
    """Download nltk's sentence splitter into the data folder.

    Raises:
        DataError: it cannot be had.
    """
    import nltk

    if not nltk.download(_SENTENCE_SPLITTER, download_dir=str(Path(data_dir) / _NLTK_FOLDER), quiet=True):
        raise DataError(f"nltk's {_SENTENCE_SPLITTER} cannot be fetched")


def _fetch_one(data_dir: Path, item: Requirement) -> list[Path]:
    import datasets

    folder = data_dir / item.dataset
    written = []
    for split in item.splits:
        try:
            rows = datasets.load_dataset(item.dataset, item.config or None, split=split)
        except Exception as error:  # gated, moved, no such split: each its own kind
            raise DataError(
                f"{item}, split {split!r}, cannot be fetched ({type(error).__name__}: {error}); if it asks for a "
                "login, accept its terms on the hub and run `hf auth login`"
            ) from error
        path = folder / item.config / f"{split}.jsonl"
        with written_whole(path) as temporary:
            rows.to_json(str(temporary), force_ascii=False)
        written.append(path)
    _note(folder, item, written)
    return written


def _note(folder: Path, item: Requirement, written: list[Path]) -> None:
    """Enter the configuration into README.md and its files into checksums.json."""
    readme, checksums = folder / "README.md", folder / CHECKSUMS_NAME
    configs = yaml.safe_load(readme.read_text(encoding="utf-8").split("---")[1])["configs"] if readme.is_file() else []
    name = item.config or "default"
    names = [path.relative_to(folder).as_posix() for path in written]
    files = [{"split": split, "path": path} for split, path in zip(item.splits, names, strict=True)]
    configs = [entry for entry in configs if entry["config_name"] != name]
    configs.append({"config_name": name, **({} if item.config else {"default": True}), "data_files": files})
    write_text(readme, f"---\n{yaml.safe_dump({'configs': configs}, sort_keys=False)}---\n")
    sums = json.loads(checksums.read_text(encoding="utf-8")) if checksums.is_file() else {}
    sums.update({name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names})
    write_text(checksums, json.dumps(sums, indent=1, sort_keys=True) + "\n")
