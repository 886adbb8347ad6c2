"""Reading text documents: the built-in corpus, local files and hub data sets, and the held-out share of each.

Knows neither tokenizers nor sequences; those are in data.py.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import json
import lzma
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

_SUFFIX = re.compile(r"\.(?:(txt|jsonl|json)(?:\.(gz|xz|zst))?|(parquet))$", re.IGNORECASE)
KNOWN_SUFFIXES = ".txt, .jsonl, .json (each also with .gz, .xz or .zst after it), .parquet"
_STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Source:
    """Documents that can be read again and again, always in the same order.

    Args:
        name: how error messages call the text.
        fingerprint: JSON-ready value that changes whenever the documents may have changed.
        read: gives (key, text) pairs; the key is all that decides whether a document is held out.
        joined: the texts are no documents but, one after the other, the pieces of a single one.
    """

    name: str
    fingerprint: dict[str, Any]
    read: Callable[[], Iterable[tuple[str, str]]]
    joined: bool = False

    def documents(self) -> Iterator[str]:
        """The texts, those that are empty or only white space left out; if `joined`, only the empty ones."""
        return (text for _, text in self.read() if (text if self.joined else not _blank(text)))


def join_rows(source: Source) -> Source:
    """The same rows as the pieces of one running text, as they are; white space in between counts."""
    return replace(source, fingerprint={"joined": source.fingerprint}, joined=True)


def hold_out(source: Source, fraction: float) -> tuple[Source, Source]:
    """Split `source` into training and held-out documents, each by a hash of its own key alone.

    Adding or removing a document therefore moves no other one, and documents with equal keys
    (equal texts, except in the built-in corpus, whose keys are paths) stay on one side.

    Args:
        source: what to split.
        fraction: expected share of the documents, not of the text, that is held out, in (0, 1).

    Returns:
        The training and the held-out source; disjoint, together all of `source`.
    """
    train, held_out = (
        Source(
            f"the {label} part of {source.name}",
            {"of": source.fingerprint, "held_out": wanted, "fraction": fraction},
            partial(_read_side, source, fraction, wanted),
        )
        for label, wanted in (("training", False), ("held-out", True))
    )
    return train, held_out


def _read_side(source: Source, fraction: float, wanted: bool) -> Iterator[tuple[str, str]]:
    for key, text in source.read():
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        if (int.from_bytes(digest[:8], "big") < fraction * 2**64) == wanted:
            yield key, text


def builtin_source() -> Source:
    """The running Python's own standard library: one document per `.py` file, tests left out.

    Files come in the order of their relative posix paths, which are also the keys; files whose
    declared encoding does not decode are left out.

    Raises:
        ValueError: this Python has no library source files (a zipped or stripped installation).
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = sorted(name for name in paths if not _STDLIB_LEFT_OUT.intersection(name.split("/")))
    if not names:
        raise ValueError(f"corpus='builtin': no Python source files in {root}; set corpus to a text file or folder")
    digest = hashlib.sha256()
    for name in names:
        content = paths[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    fingerprint = {"builtin": sys.version, "sha256": digest.hexdigest()}
    return Source("the built-in corpus", fingerprint, partial(_read_stdlib, root, names))


def _read_stdlib(root: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        # tokenize.open follows the file's coding line; SyntaxError is its word for an unknown coding.
        with contextlib.suppress(UnicodeDecodeError, SyntaxError), tokenize.open(root / name) as file:
            text = file.read()
            yield name, text


def is_local(corpus: str) -> bool:
    """Whether `corpus` means local files: it exists, or cannot be a hub id `name` or `owner/name`."""
    looks_like_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", corpus) and not _SUFFIX.search(corpus)
    return not looks_like_hub_id or Path(corpus).exists()


def local_files(option: str, pattern: str) -> list[Path]:
    """The files that a path, folder or glob means, sorted, as absolute paths.

    A folder gives every file of a known suffix below it, hidden ones left out.

    Args:
        option: name of the config field, for error messages.
        pattern: a file, a folder or a glob (`**` crosses folders); `~` is the home folder.

    Raises:
        ValueError: nothing matched, or a file named or matched by a glob has an unknown suffix.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        below = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
        files = [file for file in below if file.is_file() and _SUFFIX.search(file.name)]
    elif path.is_file():
        files = [path]
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    if not files:
        raise ValueError(
            f"{option}={pattern!r} matches no file (working directory {Path.cwd()}); known suffixes: {KNOWN_SUFFIXES}"
        )
    for file in files:
        if not _SUFFIX.search(file.name):
            raise ValueError(f"{option}: {file} has an unknown suffix; known are {KNOWN_SUFFIXES}")
    return sorted(file.resolve() for file in files)


def file_source(option: str, pattern: str, text_field: str, joined: bool = False) -> Source:
    """Documents of local files, in the order of `local_files`; the key of a document is its text.

    A `.txt` file is one document, a `.json` or `.jsonl` file has one object per line, a
    `.parquet` file one document per row. Text is UTF-8. With `joined` the rows of all files, one
    after the other, are a single text instead.

    Raises:
        ValueError: as `local_files`, or `joined` with a `.txt` file. While reading: a file that is
            truncated, corrupt or not UTF-8, or a record without a text in `text_field`; the message
            names the file.
    """
    files = local_files(option, pattern)
    whole = next((file for file in files if _kind(file) == "txt"), None)
    if joined and whole is not None:
        raise ValueError(
            f"{option}: {whole} is one document and has no rows; rows_are_documents=False is for "
            "hub data sets and .jsonl, .json or .parquet files"
        )
    stats = [(str(file), file.stat()) for file in files]
    fingerprint = {"files": [[name, s.st_size, s.st_mtime_ns] for name, s in stats], "text_field": text_field}
    source = Source(f"{option}={pattern!r}", fingerprint, partial(_read_files, files, text_field))
    return join_rows(source) if joined else source


def _kind(file: Path) -> str:
    match = _SUFFIX.search(file.name)
    assert match is not None
    return (match[1] or match[3]).lower()


def _read_files(files: list[Path], text_field: str) -> Iterator[tuple[str, str]]:
    for file in files:
        reader = {"txt": _read_text, "parquet": _read_parquet}.get(_kind(file), _read_json_lines)
        try:
            yield from ((text, text) for text in reader(file, text_field))
        except _UnusableTextError:
            raise
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}); convert it first") from error
        except Exception as error:  # each compression and parquet raise their own kinds
            raise ValueError(
                f"{file} cannot be read, it may be truncated or corrupt ({type(error).__name__}: {error}); replace it"
            ) from error


class _UnusableTextError(ValueError):
    """An error whose message already says which file, field or package is at fault."""


def _open_text(file: Path) -> IO[str]:
    """Open a text file, decompressing by suffix; utf-8-sig drops the mark that Windows editors put first."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    if suffix == ".xz":
        return lzma.open(file, "rt", encoding="utf-8-sig")
    if suffix == ".zst":
        return _zstd(file).open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _zstd(file: Path) -> Any:
    """Python 3.14's zstd module or its backport: the older `zstandard` reads a truncated file without an error."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise _UnusableTextError(f"reading {file} needs a package: pip install backports.zstd") from error
    return zstd


def _read_text(file: Path, _: str) -> Iterator[str]:
    with _open_text(file) as stream:
        yield stream.read()


def _read_json_lines(file: Path, text_field: str) -> Iterator[str]:
    with _open_text(file) as stream:
        for number, line in enumerate(stream, start=1):
            if _blank(line):
                continue
            where = f"{file}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise _UnusableTextError(f"{where} is not JSON ({error}); each line must be one object") from error
            if not isinstance(record, dict):
                raise _UnusableTextError(f"{where} is a {type(record).__name__}; each line must be one object")
            _check_field(text_field, record, where)
            yield _checked(record[text_field], text_field, where)


def _read_parquet(file: Path, text_field: str) -> Iterator[str]:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise _UnusableTextError(f"reading {file} needs a package: pip install pyarrow") from error
    with parquet.ParquetFile(file) as table:
        _check_field(text_field, table.schema_arrow.names, str(file))
        row = 0
        for batch in table.iter_batches(batch_size=1000, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                yield _checked(value, text_field, f"{file}, row {row}")
                row += 1


def hub_source(name: str, config_name: str | None, split: str, text_field: str, streaming: bool) -> Source:
    """Documents of a hub data set, one per row; the key of a document is its text.

    Args:
        name: hub id.
        config_name: the data set's configuration, or None for its only or default one.
        split: e.g. `train`; not streaming, also a slice such as `train[:1%]`.
        text_field: the column with the text.
        streaming: read over the network instead of downloading first.

    Raises:
        ValueError: `datasets` is missing, or no such data set or configuration. While reading:
            no such split (the message lists them) or column (likewise), or a row without text.
    """
    try:
        import datasets  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ValueError(f"corpus={name!r}: hub data sets need a package: pip install datasets") from error
    try:
        builder = datasets.load_dataset_builder(name, config_name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"corpus={name!r} is not 'builtin', not an existing file or folder, and cannot be loaded from the hub "
            f"with corpus_config={config_name!r}: {error}"
        ) from error
    # The builder's hash covers the data set's revision, so an updated data set is read anew.
    fingerprint = {"hub": name, "config": builder.config.name, "hash": builder.hash, "split": split}
    read = partial(_read_hub, builder, name, split, text_field, streaming)
    return Source(f"corpus={name!r} split {split!r}", fingerprint | {"text_field": text_field}, read)


def _read_hub(builder: Any, name: str, split: str, text_field: str, streaming: bool) -> Iterator[tuple[str, str]]:
    if not streaming:
        builder.download_and_prepare()
    try:
        rows = builder.as_streaming_dataset(split=split) if streaming else builder.as_dataset(split=split)
    except ValueError as error:
        raise ValueError(f"corpus={name!r}: train_split or eval_split {split!r} is not there: {error}") from error
    if rows.column_names is not None:  # streamed columns may only be known with the first row
        _check_field(text_field, rows.column_names, f"corpus={name!r}")
        rows = rows.select_columns([text_field])
    for batch in rows.iter(batch_size=1000):
        _check_field(text_field, batch, f"corpus={name!r}")
        for value in batch[text_field]:
            text = _checked(value, text_field, f"corpus={name!r}, a row of split {split!r}")
            yield text, text


def _check_field(text_field: str, columns: Iterable[str], where: str) -> None:
    if text_field not in columns:
        raise _UnusableTextError(f"{where} has no field {text_field!r}; set text_field to one of {sorted(columns)}")


def _checked(value: Any, text_field: str, where: str) -> str:
    """`value` if it is a string that UTF-8 can encode (JSON can spell half a surrogate pair)."""
    if not isinstance(value, str):
        raise _UnusableTextError(f"{where}: {text_field!r} is {type(value).__name__}, not a text; drop that record")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _UnusableTextError(f"{where}: {text_field!r} is not valid Unicode ({error}); drop that record") from error
    return value


def _blank(text: str) -> bool:
    return not text or text.isspace()
