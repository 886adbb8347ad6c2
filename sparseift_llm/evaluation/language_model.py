"""Models for lm-eval: loading a run, a checkpoint or a hub model, and splitting requests over processes.

lm-eval splits items over processes before it draws few-shot examples, so prompts depend on the number of
processes. Here every process builds all prompts and the batches of model calls are dealt out instead.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparseift_llm.checkpoints.loading import load_pretrained
from sparseift_llm.evaluation.hub import hub_fault
from sparseift_llm.utils.outputs import user_path

T = TypeVar("T")
_LOGIT_BYTES = 2**28  # of one batch on a CPU, where running out of memory would not raise an error
_MAX_BATCH = 64


def load_model(name: str, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a folder or a hub id; Sparse-IFT checkpoints are told by their config.

    Args:
        name: output folder of recipes/pretrain.py, one of its checkpoints, any transformers folder, or a hub id.
        kwargs: passed on to `from_pretrained`, e.g. `dtype`.

    Raises:
        ValueError: no such model, no tokenizer beside it, or damaged weights.
    """
    name = str(user_path(name)) if name.startswith("~") else name  # transformers does not know home folders
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(path.name for path in folder.glob("checkpoint-*"))) or "no checkpoints either"
            raise ValueError(f"--model {name} holds no model (no config.json); in it: {found}")
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"--model {name} is not a folder; give a run's output folder, a checkpoint or a hub id")
    elif fault := hub_fault():
        raise ValueError(f"--model {name} is not a folder, and cannot be had from the hub: {fault}")
    try:
        config = AutoConfig.from_pretrained(name)
        is_sparse = getattr(config, "sparse_ift", None)
        load: Callable[..., PreTrainedModel] = load_pretrained if is_sparse else AutoModelForCausalLM.from_pretrained
        return load(name, **kwargs), AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"--model {name} cannot be loaded: {error}") from error


class TooLongError(ValueError):
    """An item of a task does not fit the model's context; the message names the task, the item and both lengths."""


class SplitLM(HFLM):  # type: ignore[misc, unused-ignore]
    """lm-eval's Hugging Face model whose batches are dealt out to all processes of an `accelerate launch`.

    To lm-eval each process is the only one (`world_size` is 1): all hold all prompts and all answers.
    Batches are made as one process would, so that answers do not depend on the number of processes.

    Args:
        model: on this process's device.
        tokenizer: its tokenizer.
        batch_size: sequences per call, or `auto`: what fits a GPU, or by the size of the logits on a CPU.
        state: accelerate's view of the processes.
        bars: draw progress bars; by default only where a person looks at the standard error output.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str = "auto",
        state: PartialState | None = None,
        bars: bool | None = None,
    ) -> None:
        own_tokenizer = copy.deepcopy(tokenizer)  # lm-eval sets its padding
        lm_eval_logger = logging.getLogger("lm_eval")
        level = lm_eval_logger.level
        lm_eval_logger.setLevel(logging.ERROR)  # it warns of several processes, which are taken care of here
        super().__init__(pretrained=model, tokenizer=own_tokenizer, backend="causal", batch_size=batch_size)
        lm_eval_logger.setLevel(level)
        state = state or PartialState()
        self._process_index, self._num_processes = state.process_index, state.num_processes
        self._quiet = state.process_index != 0 or not (sys.stderr.isatty() if bars is None else bars)
        self._asked: Sequence[Any] = ()  # the requests that _loglikelihood_tokens answers
        self._cut: dict[tuple[int, int], int] = {}
        if batch_size == "auto":
            self.batch_size_per_gpu = min(self._gather(self._fitting_batch_size()))

    @property
    def max_gen_toks(self) -> int:
        """lm-eval's 256 where that leaves room for a prompt, else half of the model's context."""
        stock: int = super().max_gen_toks
        return stock if stock < self.max_length else self.max_length // 2

    def take_cut_tokens(self) -> dict[tuple[int, int], int]:
        """How many tokens were left out at the beginning of the prompts answered since the last call.

        Returns:
            (number of the item among those asked, number of its request) -> tokens that did not fit; equal on all
            processes. Whole texts, which are read window by window, are not among them.
        """
        cut, self._cut = self._cut, {}
        return cut

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding gives it."""
        self._asked = requests
        try:
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm or self._quiet)
        finally:
            self._asked = ()
        return answers

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Answers to (strings, context tokens, continuation tokens), in order; each process runs its batches.

        Raises:
            TooLongError: a continuation alone is longer than the model's context.
        """
        for index, (_, context, continuation) in enumerate(requests):
            asked = self._asked[index] if self._asked else None
            if len(continuation) > self.max_length:
                raise TooLongError(too_long(_item_name(asked), len(continuation), self.max_length))
            if asked is not None:
                # the model sees all but the last token
                self._note_cut(asked, len(context) + len(continuation) - 1 - self.max_length)
        quiet = disable_tqdm or self._quiet

        def run(own: list[Any]) -> list[tuple[float, bool]]:
            answers: list[tuple[float, bool]] = super(SplitLM, self)._loglikelihood_tokens(own, quiet, override_bs)
            return answers

        if override_bs is not None:  # called by loglikelihood_rolling, which has dealt already
            return run(requests)
        # as HFLM does: requests that differ in the last token only share a call
        tokens = [tuple(context + continuation) for _, context, continuation in requests]
        return self._deal(
            requests,
            run,
            group=lambda index: tokens[index][:-1],
            order=lambda members: (-len(tokens[members[0]]), tokens[members[0]]),
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts; windows are batched in order, as HFLM does."""
        windows: list[Any] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *utils.make_disjoint_window(window)) for window in rolling]
            owners += [number] * (len(windows) - len(owners))
        size = int(self.batch_size)
        batches = [windows[start : start + size] for start in range(0, len(windows), size)]
        mine = [
            self._loglikelihood_tokens(batch, True, override_bs=len(batch))
            for batch in batches[self._process_index :: self._num_processes]
        ]
        gathered = self._gather(mine)
        totals = [0.0] * len(requests)
        answers = (
            answer
            for number in range(len(batches))
            for answer in gathered[number % self._num_processes][number // self._num_processes]
        )
        for owner, (log_likelihood, _) in zip(owners, answers, strict=True):
            totals[owner] += log_likelihood
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, in order; each process runs its batches.

        Raises:
            TooLongError: the tokens to generate leave no room for a prompt.
        """
        quiet = disable_tqdm or self._quiet

        def run(own: list[Any]) -> list[str]:
            answers: list[str] = super(SplitLM, self).generate_until(own, quiet)
            return answers

        contexts = [request.args[0] for request in requests]
        lengths = [len(self.tok_encode(context)) for context in contexts]
        for request, length in zip(requests, lengths, strict=True):
            generated = int(normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"])
            if generated >= self.max_length:
                raise TooLongError(f"{_item_name(request)} {no_room(generated, self.max_length)}")
            self._note_cut(request, length + generated - self.max_length)
        return self._deal(
            requests,
            run,
            group=lambda index: index,
            order=lambda members: (-lengths[members[0]], contexts[members[0]]),
            kind=lambda index: repr(requests[index].args[1]),
        )

    def _deal(
        self,
        requests: Sequence[Any],
        run: Callable[[list[Any]], list[T]],
        group: Callable[[int], Hashable],
        order: Callable[[list[int]], Any],
        kind: Callable[[int], Hashable] = lambda _: None,
    ) -> list[T]:
        """Run every request once, on one of the processes; the answers of all, in the order of `requests`.

        Args:
            requests: the same on every process.
            run: answers some of them, in order.
            group: requests with the same value share a place in a batch.
            order: sorts the groups.
            kind: requests of different kinds never share a batch.
        """
        if self._num_processes == 1:
            return run(list(requests))
        batches = list(_batches(range(len(requests)), int(self.batch_size), group, order, kind))
        own = sorted(index for batch in batches[self._process_index :: self._num_processes] for index in batch)
        answers = run([requests[index] for index in own]) if own else []
        collected = dict(pair for pairs in self._gather(list(zip(own, answers, strict=True))) for pair in pairs)
        return [collected[index] for index in range(len(requests))]

    def _note_cut(self, request: Any, tokens: int) -> None:
        self._cut[request.doc_id, request.idx] = max(tokens, 0)

    def _gather(self, value: T) -> list[T]:
        """`value` of every process, by process index."""
        if self._num_processes == 1:
            return [value]
        values: list[Any] = [None] * self._num_processes
        dist.all_gather_object(values, value)
        return values

    def _fitting_batch_size(self) -> int:
        if self.device.type != "cpu":
            return int(self._detect_batch_size())
        bytes_per_sequence = self.max_length * self.model.config.get_text_config().vocab_size * 4
        return max(1, min(_MAX_BATCH, _LOGIT_BYTES // bytes_per_sequence))


def too_long(what: str, num_tokens: int, context: int) -> str:
    """Why an answer cannot be scored, in words."""
    return f"{what} has an answer of {num_tokens:,} tokens, more than the model's context of {context:,}"


def no_room(num_generated: int, context: int) -> str:
    """Why a task cannot generate its answers, in words that follow its name."""
    return f"generates up to {num_generated:,} tokens, which leaves no room for a prompt in the context of {context:,}"


def _item_name(request: Any) -> str:
    return "a request" if request is None else f"item {request.doc_id} of {request.task_name}"


def _batches(
    indices: Iterable[int],
    size: int,
    group: Callable[[int], Hashable],
    order: Callable[[list[int]], Any],
    kind: Callable[[int], Hashable],
) -> Iterable[list[int]]:
    """Batches of at most `size` groups, each in order."""
    kinds: dict[Hashable, dict[Hashable, list[int]]] = {}
    for index in indices:
        kinds.setdefault(kind(index), {}).setdefault(group(index), []).append(index)
    for groups in kinds.values():
        ordered = sorted(groups.values(), key=order)
        for start in range(0, len(ordered), size):
            yield [index for members in ordered[start : start + size] for index in members]
