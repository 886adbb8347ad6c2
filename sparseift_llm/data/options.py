"""The options of the data of a run: where the text comes from, and how it becomes sequences.

Checks only what can be known without reading anything; loading.py does what the options say.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparseift_llm.config.parsing import config_class

EOS = "<|endoftext|>"  # the end-of-text token of a tokenizer that is trained here
Word = Annotated[str, Field(min_length=1)]
_VOCAB_SIZE = 4096


@config_class
class DataConfig:
    """Where the text comes from and how it becomes sequences.

    Raises:
        ValueError: a value outside its range or a contradictory combination, naming it.
    """

    corpus: Word = "builtin"
    """Training text: `builtin` (the Python standard library's source, about 10 MB), a local file, folder or glob (see
    `corpora.file_source`), or a hub data set id; a path that exists wins over a hub id."""
    corpus_config: Word | None = None
    """The hub data set's configuration, e.g. `wikitext-103-raw-v1`."""
    eval_corpus: Word | None = None
    """Local file, folder or glob with the held-out text."""
    train_split: Word = "train"
    """The hub data set's split to train on."""
    eval_split: Word | None = "validation"
    """The hub data set's held-out split; null holds out `eval_fraction` of the training split."""
    text_field: Word = "text"
    """The field (JSON) or column (parquet, hub) with the text."""
    skip_null_texts: bool = False
    """Leave out the rows of JSON, parquet or hub data whose text is null, and say in the log how many there were. By
    default such a row is an error."""
    rows_are_documents: bool = True
    """False: the rows of JSON, parquet or hub data are consecutive pieces of one running text, such as the lines of
    WikiText, to be joined as they are. The held-out text, whose rows are joined too, then comes from `eval_corpus` or
    `eval_split`."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents held out where there is no separate held-out text (builtin, or local files without
    `eval_corpus`)."""
    hold_out: Literal["documents", "tail"] | None = None
    """Where there is no separate held-out text: hold out whole `documents`, chosen by a hash of their text, or the
    `tail` of every document. By default documents, but the tail where the text is a single .txt file, which is one
    document."""
    streaming: bool = False
    """Tokenise the training text while training, storing nothing; the trainer then needs `max_steps`."""
    tokenizer: Word = "bpe"
    """`bpe` (train a byte-level BPE on the training documents, on the first 100 million characters at most), or the
    folder or hub id of a tokenizer."""
    vocab_size: int | None = None
    """Entries of the `bpe` tokenizer, end-of-text included, at least 257, by default 4096; a small corpus may give
    fewer. A tokenizer that is given has its own number of entries, so this is null."""
    seq_len: Annotated[int, Field(ge=2)] = 256
    """Tokens per sequence."""
    max_eval_sequences: Annotated[int, Field(ge=1)] | None = None
    """Evaluate on this many sequences at most; null means all. `streaming` needs it unless `eval_corpus` is given."""
    cache_dir: Word | None = None
    """Where tokens and the trained tokenizer are kept; null leaves it to the caller."""

    def __post_init__(self) -> None:
        self._set_vocab_size()
        if self.corpus == "builtin" and not self.rows_are_documents:
            raise ValueError(
                "rows_are_documents=False is for rows of text; corpus='builtin' has files, each a document"
            )
        if self.hold_out is not None and self.eval_corpus is not None:
            raise ValueError(
                f"hold_out={self.hold_out!r} is for text without eval_corpus={self.eval_corpus!r}; leave one of them "
                "out"
            )
        if self.hold_out == "tail" and self.corpus == "builtin":
            raise ValueError("hold_out='tail' would train on files of the built-in evaluation; leave it out")
        if self.streaming and self.max_eval_sequences is None and self.eval_corpus is None:
            raise ValueError("streaming needs max_eval_sequences or eval_corpus, or evaluation would read all the text")

    def _set_vocab_size(self) -> None:
        if self.tokenizer != "bpe":
            if self.vocab_size is not None:
                raise ValueError(
                    f"vocab_size={self.vocab_size} is for tokenizer='bpe', which is trained; tokenizer="
                    f"{self.tokenizer!r} has its own entries, so leave vocab_size out"
                )
        elif self.vocab_size is None:
            object.__setattr__(self, "vocab_size", _VOCAB_SIZE)
        elif self.vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and {EOS}), got {self.vocab_size}")
