"""Reading text documents: local files and hub data sets. The built-in corpus is in standard_library.py.

Nothing here knows of tokenizers or sequences; loading.py puts the pieces together. Which share of the text is held out
is decided in held_out.py.
"""

from __future__ import annotations

import fnmatch
import glob
import gzip
import json
import logging
import lzma
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from sparseift_llm.utils.outputs import user_path

logger = logging.getLogger(__name__)

_SUFFIX = re.compile(r"\.(?:(txt|jsonl|json)(?:\.(gz|xz|zst))?|(parquet))$", re.IGNORECASE)
KNOWN_SUFFIXES = ".txt, .jsonl, .json (each also with .gz, .xz or .zst after it), .parquet"


@dataclass(frozen=True)
class Source:
    """Documents that can be read again and again, always in the same order.

    Args:
        name: how error messages call the text.
        fingerprint: a JSON-serialisable value that changes whenever the documents may have changed.
        read: gives (key, text) pairs. The key alone decides whether a document is held out.
        joined: whether the texts are not documents of their own, but the consecutive pieces of a single one.
        num_bytes: about how large the text is, for progress bars; None if that is not known.
    """

    name: str
    fingerprint: dict[str, Any]
    read: Callable[[], Iterable[tuple[str, str]]]
    joined: bool = False
    num_bytes: int | None = None

    def documents(self) -> Iterator[str]:
        """The texts, those that are empty or only white space left out; if `joined`, only the empty ones."""
        return (text for _, text in self.read() if (text if self.joined else not _blank(text)))


def join_rows(source: Source) -> Source:
    """The same rows as the pieces of one running text, as they are; white space in between counts."""
    return replace(source, fingerprint={"joined": source.fingerprint}, joined=True)


def is_one_text_file(pattern: str) -> bool:
    """Whether a path, folder or glob means a single .txt file, which is a single document. Raises as `local_files`."""
    files = local_files("corpus", pattern)
    return len(files) == 1 and _kind(files[0]) == "txt"


def is_local(corpus: str) -> bool:
    """Whether `corpus` means local files: it exists, or cannot be a hub id `name` or `owner/name`."""
    looks_like_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", corpus) and not _SUFFIX.search(corpus)
    return not looks_like_hub_id or Path(corpus).exists()


def would_read(pattern: str, folder: Path, names: Iterable[str]) -> bool:
    """Whether a path, folder or glob, as `local_files` reads it, means files that are written into `folder` later.

    Args:
        pattern: a file, a folder or a glob.
        folder: where files are going to be written; need not exist.
        names: paths, relative to `folder`, of some of them.
    """
    corpus = user_path(pattern)
    if corpus.is_dir():
        root, target = corpus.resolve(), folder.resolve()
        return target.is_relative_to(root) and not any(p.startswith(".") for p in target.relative_to(root).parts)
    wanted = Path(os.path.abspath(corpus)).parts
    return any(_matches((Path(os.path.abspath(folder)) / name).parts, wanted) for name in names)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the parts of a path fit those of a glob, in which `**` stands for any number of parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def local_files(option: str, pattern: str) -> list[Path]:
    """The files that a path, folder or glob means, sorted, as absolute paths.

    A folder gives every file of a known suffix below it, hidden ones left out.

    Args:
        option: name of the config field, for error messages.
        pattern: a file, a folder or a glob (`**` crosses folders); `~` is the home folder.

    Raises:
        ValueError: nothing matched, or a file named or matched by a glob has an unknown suffix.
    """
    path = user_path(pattern)
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


def file_source(
    option: str, pattern: str, text_field: str, joined: bool = False, skip_null_texts: bool = False
) -> Source:
    """Documents of local files, in the order of `local_files`; the key of a document is its text.

    A `.txt` file is one document, a `.json` or `.jsonl` file has one object per line, a
    `.parquet` file one document per row. Text is UTF-8. With `joined` the rows of all files, one
    after the other, are a single text instead. With `skip_null_texts` rows whose text is null are left out, and their
    number is logged.

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
    fingerprint = {
        "files": [[name, s.st_size, s.st_mtime_ns] for name, s in stats],
        **_identity(text_field, skip_null_texts),
    }
    rows = _TextRows(text_field, skip_null_texts)
    is_plain = all(file.suffix.lower() in (".txt", ".json", ".jsonl") for file in files)
    num_bytes = sum(s.st_size for _, s in stats) if is_plain else None
    source = Source(f"{option}={pattern!r}", fingerprint, partial(_read_files, files, rows), num_bytes=num_bytes)
    return join_rows(source) if joined else source


def _kind(file: Path) -> str:
    match = _SUFFIX.search(file.name)
    assert match is not None
    return (match[1] or match[3]).lower()


class _TextRows:
    """Takes the texts out of rows, and reports those without one; the same object serves all readings of a source.

    Args:
        field: the name of the field with the text.
        skip_nulls: leave out rows whose text is null, which are an error otherwise.
    """

    def __init__(self, field: str, skip_nulls: bool) -> None:
        self.field = field
        self._skip_nulls = skip_nulls
        self._reported: set[str] = set()

    def texts(self, rows: Iterable[tuple[Any, str]], name: str) -> Iterator[str]:
        """The checked texts of rows, each given as the value of its field and a description of where it stands.

        The number of rows left out is logged the first time that all rows of `name` were read.
        """
        skipped = 0
        for value, where in rows:
            if value is None and self._skip_nulls:
                skipped += 1
            else:
                yield self._checked(value, where)
        if skipped and name not in self._reported:
            self._reported.add(name)
            logger.warning("%s: %d rows whose %r is null were left out", name, skipped, self.field)

    def check_field(self, columns: Iterable[str], where: str) -> None:
        """Raise an error unless the field is among the columns."""
        if self.field not in columns:
            raise _UnusableTextError(f"{where} has no field {self.field!r}; set text_field to one of {sorted(columns)}")

    def _checked(self, value: Any, where: str) -> str:
        """`value` if it is a string that UTF-8 can encode (JSON can spell half a surrogate pair)."""
        if not isinstance(value, str):
            advice = "drop that record"
            if value is None:
                advice += ", or leave out all rows without a text with skip_null_texts: true"
            raise _UnusableTextError(f"{where}: {self.field!r} is {type(value).__name__}, not a text; {advice}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _UnusableTextError(
                f"{where}: {self.field!r} is not valid Unicode ({error}); drop that record"
            ) from error
        return value


def _identity(text_field: str, skip_null_texts: bool) -> dict[str, Any]:
    """The part of a fingerprint that says which texts are read; the same as before there was `skip_null_texts`."""
    return {"text_field": text_field} | ({"skip_null_texts": True} if skip_null_texts else {})


def _read_files(files: list[Path], rows: _TextRows) -> Iterator[tuple[str, str]]:
    for file in files:
        try:
            yield from ((text, text) for text in _texts_of(file, rows))
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


def _texts_of(file: Path, rows: _TextRows) -> Iterator[str]:
    if _kind(file) == "txt":
        return _read_text(file)
    read = _read_parquet if _kind(file) == "parquet" else _read_json_lines
    return rows.texts(read(file, rows), str(file))


def _read_text(file: Path) -> Iterator[str]:
    with _open_text(file) as stream:
        yield stream.read()


def _read_json_lines(file: Path, rows: _TextRows) -> Iterator[tuple[Any, str]]:
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
            rows.check_field(record, where)
            yield record[rows.field], where


def _read_parquet(file: Path, rows: _TextRows) -> Iterator[tuple[Any, str]]:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise _UnusableTextError(f"reading {file} needs a package: pip install pyarrow") from error
    with parquet.ParquetFile(file) as table:
        rows.check_field(table.schema_arrow.names, str(file))
        row = 0
        for batch in table.iter_batches(batch_size=1000, columns=[rows.field]):
            for value in batch.column(0).to_pylist():
                yield value, f"{file}, row {row}"
                row += 1


def hub_source(
    name: str, config_name: str | None, split: str, text_field: str, streaming: bool, skip_null_texts: bool = False
) -> Source:
    """Documents of a hub data set, one per row; the key of a document is its text.

    Args:
        name: hub id.
        config_name: the data set's configuration, or None for its only or default one.
        split: e.g. `train`; not streaming, also a slice such as `train[:1%]`.
        text_field: the column with the text.
        streaming: read over the network instead of downloading first.
        skip_null_texts: leave out rows whose text is null; their number is logged when all rows were read.

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
    read = partial(_read_hub, builder, name, split, _TextRows(text_field, skip_null_texts), streaming)
    identity = fingerprint | _identity(text_field, skip_null_texts)
    return Source(f"corpus={name!r} split {split!r}", identity, read)


def _read_hub(builder: Any, name: str, split: str, texts: _TextRows, streaming: bool) -> Iterator[tuple[str, str]]:
    if not streaming:
        builder.download_and_prepare()
    try:
        rows = builder.as_streaming_dataset(split=split) if streaming else builder.as_dataset(split=split)
    except ValueError as error:
        raise ValueError(f"corpus={name!r}: train_split or eval_split {split!r} is not there: {error}") from error
    if rows.column_names is not None:  # streamed columns may only be known with the first row
        texts.check_field(rows.column_names, f"corpus={name!r}")
        rows = rows.select_columns([texts.field])
    where = f"corpus={name!r}, a row of split {split!r}"

    def values() -> Iterator[tuple[Any, str]]:
        for batch in rows.iter(batch_size=1000):
            texts.check_field(batch, f"corpus={name!r}")
            yield from ((value, where) for value in batch[texts.field])

    yield from ((text, text) for text in texts.texts(values(), f"corpus={name!r} split {split!r}"))


def _blank(text: str) -> bool:
    return not text or text.isspace()
