"""Loading the data of a run: from its options to a tokenizer, and to training and held-out sequences.

Reading documents is in corpora.py, making sequences of them in packing.py, and storing them in cache.py. Batches and
their order are the trainer's business.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseift_llm.data.cache import cached_tokens, tokenizer_identity
from sparseift_llm.data.corpora import (
    Source,
    file_source,
    hub_source,
    is_local,
    is_one_text_file,
    join_rows,
    local_files,
    would_read,
)
from sparseift_llm.data.held_out import hold_out, hold_out_tails, refuse_empty_side
from sparseift_llm.data.options import DataConfig
from sparseift_llm.data.packing import TRAIN_ADVICE, PackedDataset, PackedStream, too_short
from sparseift_llm.data.standard_library import builtin_source
from sparseift_llm.data.tokenizer import cached_tokenizer
from sparseift_llm.utils.outputs import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CACHE_NAMES = ("tokens-0/manifest.json", "tokenizer-0/tokenizer.json")  # what cache.py writes, with digests for 0
_EVAL_ADVICE = "give more held-out text in eval_corpus, raise eval_fraction or lower seq_len"


@dataclass(frozen=True)
class LoadedData:
    """What `load_data` returns.

    Args:
        tokenizer: has an end-of-text token; `len(tokenizer)` is the vocabulary size for the model.
        train: sequences to train on.
        eval: held-out sequences.
        num_train_tokens: tokens in `train`, or None when streaming.
        num_eval_tokens: tokens in `eval`.
        bytes_per_eval_token: UTF-8 bytes of held-out text per token, end-of-text tokens counted, so
            that bits per byte = loss in nats / ln 2 / bytes_per_eval_token.
        fingerprint: hex digest of the tokenizer and of the training and held-out token streams, the
            same wherever and whenever those are the same; it does not depend on the sequence length. A
            streamed training text is known by its files' paths, sizes and times or by the hub's version.
    """

    tokenizer: PreTrainedTokenizerBase
    train: PackedDataset | PackedStream
    eval: PackedDataset
    num_train_tokens: int | None
    num_eval_tokens: int
    bytes_per_eval_token: float
    fingerprint: str


def load_data(config: DataConfig, cache_dir: str | Path) -> LoadedData:
    """Tokenizer, training and held-out sequences; whatever is stored already is reused.

    With several processes call it inside `TrainingArguments.main_process_first()`: the main process
    builds, the others find the finished files and map the same memory.

    Args:
        config: the options.
        cache_dir: where to store tokens and the trained tokenizer, unless `config.cache_dir` is set.

    Raises:
        ValueError: text or tokenizer cannot be read, or there is less than one sequence of training
            or of held-out text; the message names the file or option to change.
    """
    folder = user_path(config.cache_dir or cache_dir)
    check_not_read(config, folder, CACHE_NAMES, "cache_dir")
    train_source, eval_source = _open_sources(config)
    tokenizer = cached_tokenizer(config, train_source, folder)
    limit = config.max_eval_sequences and config.max_eval_sequences * config.seq_len
    eval_file, eval_info = cached_tokens(tokenizer, eval_source, folder, limit)
    held_out = PackedDataset(eval_file, config.seq_len, config.max_eval_sequences)
    if len(held_out) == 0:
        raise ValueError(too_short(eval_source, eval_info["tokens"], config.seq_len, _EVAL_ADVICE))
    train: PackedDataset | PackedStream
    if config.streaming:
        train = PackedStream(train_source, tokenizer, config.seq_len)
        train_identity: Any = train_source.fingerprint
    else:
        train_file, train_info = cached_tokens(tokenizer, train_source, folder, None)
        train = PackedDataset(train_file, config.seq_len)
        train_identity = train_info["sha256"]
        if len(train) == 0:
            raise ValueError(too_short(train_source, train_info["tokens"], config.seq_len, TRAIN_ADVICE))
    identity = json.dumps([tokenizer_identity(tokenizer), train_identity, eval_info["sha256"]], sort_keys=True)
    return LoadedData(
        tokenizer=tokenizer,
        train=train,
        eval=held_out,
        num_train_tokens=len(train) * config.seq_len if isinstance(train, PackedDataset) else None,
        num_eval_tokens=len(held_out) * config.seq_len,
        bytes_per_eval_token=eval_info["text_bytes"] / eval_info["tokens"],
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    )


def check_not_read(config: DataConfig, folder: Path, names: Iterable[str], option: str) -> None:
    """Refuse a corpus that holds the folder of another option, whose files would be read as text the next time.

    Args:
        config: the options of the data.
        folder: where the run is going to write.
        names: paths, relative to `folder`, of files that it writes there.
        option: the name of the option that says so, for the message.

    Raises:
        ValueError: `corpus` or `eval_corpus` means such files.
    """
    for name in ("corpus", "eval_corpus"):
        pattern = getattr(config, name)
        is_text = pattern is not None and (name != "corpus" or (pattern != "builtin" and is_local(pattern)))
        if is_text and would_read(pattern, folder, names):
            raise ValueError(
                f"{name}={pattern!r} covers {option}={str(folder)!r}, so that a resumed run would read what it has "
                f"written itself; move the text to a folder of its own, or choose another {option}"
            )


def _open_sources(config: DataConfig) -> tuple[Source, Source]:
    """The training and the held-out documents that the options mean."""
    hub = config.corpus != "builtin" and not is_local(config.corpus)
    joined = not config.rows_are_documents
    if config.corpus_config is not None and not hub:
        raise ValueError(
            f"corpus_config={config.corpus_config!r} is for hub data sets; corpus={config.corpus!r} is not one"
        )

    def hub_split(split: str) -> Source:
        rows = hub_source(
            config.corpus, config.corpus_config, split, config.text_field, config.streaming, config.skip_null_texts
        )
        return join_rows(rows) if joined else rows

    if config.corpus == "builtin":
        source = builtin_source()
    elif hub:
        source = hub_split(config.train_split)
    else:
        source = file_source("corpus", config.corpus, config.text_field, joined, config.skip_null_texts)
    if config.eval_corpus is not None:
        if config.corpus != "builtin" and not hub:
            _check_disjoint(config.corpus, config.eval_corpus)
        held_out = file_source("eval_corpus", config.eval_corpus, config.text_field, joined, config.skip_null_texts)
        return source, held_out
    if hub and config.eval_split is not None:
        if config.hold_out is not None:
            raise ValueError(
                f"hold_out={config.hold_out!r} is for text without a held-out split; set eval_split to null, or leave "
                "hold_out out"
            )
        return source, hub_split(config.eval_split)
    if joined:
        raise ValueError(
            "rows_are_documents=False needs eval_corpus or eval_split (of a hub data set): "
            "rows of one running text cannot be held out one by one"
        )
    return _held_out_part(config, source, is_file=not hub and config.corpus != "builtin")


def _held_out_part(config: DataConfig, source: Source, is_file: bool) -> tuple[Source, Source]:
    """The training and the held-out side of a text that has no held-out text beside it.

    Raises:
        ValueError: one side of local files would be empty.
    """
    how = config.hold_out
    if how is None:
        how = "tail" if is_file and is_one_text_file(config.corpus) else "documents"
    if how == "tail":
        logger.info("%s: the last %g of every document is held out", source.name, config.eval_fraction)
        return hold_out_tails(source, config.eval_fraction)
    sides = hold_out(source, config.eval_fraction)
    if is_file:
        refuse_empty_side(source, *sides, config.eval_fraction)
    return sides


def _check_disjoint(corpus: str, eval_corpus: str) -> None:
    shared = set(local_files("corpus", corpus)).intersection(local_files("eval_corpus", eval_corpus))
    if shared:
        raise ValueError(f"{min(shared)} is in both corpus and eval_corpus; training must not see held-out text")
