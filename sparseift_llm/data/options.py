"""The options of the data of a run: where the text comes from, and how it becomes sequences.

Checks only what can be known without reading anything; loading.py does what the options say.
"""

from __future__ import annotations

from dataclasses import dataclass

EOS = "<|endoftext|>"  # the end-of-text token of a tokenizer that is trained here


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes sequences.

    Args:
        corpus: training text: `builtin` (the Python standard library's source, about 12 MB), a
            local file, folder or glob (see `corpora.file_source`), or a hub data set id; a path
            that exists wins over a hub id.
        corpus_config: the hub data set's configuration, e.g. `wikitext-103-raw-v1`.
        eval_corpus: local file, folder or glob with the held-out text.
        train_split: the hub data set's split to train on.
        eval_split: its held-out split, or None to hold out `eval_fraction` of the training split.
        text_field: the field (JSON) or column (parquet, hub) with the text.
        skip_null_texts: leave out the rows of JSON, parquet or hub data whose text is null, and say in the log how
            many there were. Without it such a row is an error.
        rows_are_documents: False: the rows of JSON, parquet or hub data are consecutive pieces of
            one running text, such as WikiText's lines, to be joined as they are. The held-out
            text, whose rows are joined too, then comes from `eval_corpus` or `eval_split`.
        eval_fraction: share of the documents held out where there is no separate held-out text
            (builtin, or local files without `eval_corpus`), in (0, 1).
        streaming: tokenise the training text while training, storing nothing; the trainer then
            needs `max_steps`.
        tokenizer: `bpe` (train a byte-level BPE on the training documents, on the first 100
            million characters at most), or a tokenizer's folder or hub id.
        vocab_size: entries of the `bpe` tokenizer, end-of-text included, at least 257; a small
            corpus may give fewer.
        seq_len: tokens per sequence, at least 2.
        max_eval_sequences: evaluate on this many sequences at most; None means all. Needed with
            `streaming` unless `eval_corpus` is given.
        cache_dir: where tokens and the trained tokenizer are kept; None leaves it to the caller.

    Raises:
        ValueError: a value outside its range or a contradictory combination, naming it.
    """

    corpus: str = "builtin"
    corpus_config: str | None = None
    eval_corpus: str | None = None
    train_split: str = "train"
    eval_split: str | None = "validation"
    text_field: str = "text"
    skip_null_texts: bool = False
    rows_are_documents: bool = True
    eval_fraction: float = 0.05
    streaming: bool = False
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    seq_len: int = 256
    max_eval_sequences: int | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("corpus", "train_split", "text_field", "tokenizer"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for name in ("eval_corpus", "eval_split", "corpus_config", "cache_dir"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must not be empty; leave it out or set it to null")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in (0, 1), got {self.eval_fraction}")
        if self.corpus == "builtin" and not self.rows_are_documents:
            raise ValueError(
                "rows_are_documents=False is for rows of text; corpus='builtin' has files, each a document"
            )
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and {EOS}), got {self.vocab_size}")
        if self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, got {self.seq_len}")
        if self.max_eval_sequences is not None and self.max_eval_sequences < 1:
            raise ValueError(f"max_eval_sequences must be at least 1, got {self.max_eval_sequences}")
        if self.streaming and self.max_eval_sequences is None and self.eval_corpus is None:
            raise ValueError("streaming needs max_eval_sequences or eval_corpus, or evaluation would read all the text")
