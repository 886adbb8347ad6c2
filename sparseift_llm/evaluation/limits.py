"""Which tasks cannot be asked of a model because its context is too short, found out before the first one runs.

Prompts that are too long are another matter: they lose their beginning, as in lm-eval, and are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lm_eval.evaluator_utils import get_sample_size
from lm_eval.models.utils import normalize_gen_kwargs

from sparseift_llm.evaluation.harness import max_gen_toks
from sparseift_llm.evaluation.language_model import SplitLM, no_room, too_long
from sparseift_llm.evaluation.options import EvaluationOptions
from sparseift_llm.evaluation.quiet import quiet, templates_compiled_once

_STOCK_GENERATED = 256  # lm-eval's most, for tasks that name no number of their own


def tasks_too_long(lm: SplitLM, tasks: Mapping[str, Any], options: EvaluationOptions) -> dict[str, str]:
    """The tasks that `lm` has too short a context for, and why.

    A task is among them if it generates so many tokens that no prompt fits beside them, or if one of its items has an
    answer that is longer than the context. Answers are measured without the prompts before them, which can change
    them by a token; `SplitLM` measures them again.

    Args:
        lm: the model.
        tasks: lm-eval's task objects by name.
        options: which items are asked.
    """
    with quiet(), templates_compiled_once():
        found = {name: _reason(lm, name, task, options) for name, task in tasks.items()}
    return {name: reason for name, reason in found.items() if reason is not None}


def shortened_answers(lm: SplitLM, tasks: Mapping[str, Any]) -> dict[str, int]:
    """The tasks whose answers may not become as long as lm-eval allows, and how many tokens they may have.

    Those are tasks that name no number of their own, asked of a model whose context is too short for lm-eval's number:
    lm-eval itself fails there.
    """
    if lm.max_gen_toks >= _STOCK_GENERATED:
        return {}
    unnamed = [name for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until" and not _own_number(task)]
    return dict.fromkeys(unnamed, lm.max_gen_toks)


def _own_number(task: Any) -> int:
    """The number of tokens to generate that a task's configuration names; 0 if it names none."""
    return int(normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, 0)["max_gen_toks"])


def _reason(lm: SplitLM, name: str, task: Any, options: EvaluationOptions) -> str | None:
    generated = max_gen_toks(lm, task)
    if generated is not None:
        return no_room(generated, lm.max_length) if generated >= lm.max_length else None
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return None
    lengths: dict[str, int] = {}
    for doc_id, answer in _answers(name, task, options):
        if answer not in lengths:
            lengths[answer] = len(lm.tok_encode(answer, add_special_tokens=False))
        if lengths[answer] > lm.max_length:
            return too_long(f"item {doc_id}", lengths[answer], lm.max_length)
    return None


def _answers(name: str, task: Any, options: EvaluationOptions) -> Iterator[tuple[int, str]]:
    """Number of the item, and each text that is scored as an answer to it."""
    samples = options.samples_of(name)
    limit = get_sample_size(task, options.limit)
    for number, doc in task.doc_iterator(limit=limit, samples=samples):
        context: Any = ""
        if getattr(task, "multiple_input", 0):
            context = [""] * len(task.doc_to_choice(doc))
        requests = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(name, number, 1),
            apply_chat_template=bool(options.apply_chat_template),
        )
        for request in requests if isinstance(requests, list) else [requests]:
            yield (samples[number] if samples else number), request.args[1]
