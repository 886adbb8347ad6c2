"""How a suite is asked: which items, with which prompts and seeds. These are lm-eval's options under its names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sparseift_llm.evaluation.quiet import DEFAULT_SEEDS


@dataclass(frozen=True)
class EvaluationOptions:
    """What decides the scores besides the model, its tokenizer and the tasks; each field as in lm-eval.

    Args:
        limit: only the first so many items of each task, or this share of them if it is below 1.
        samples: task -> numbers of the items to evaluate, counted from 0; tasks that are not named are evaluated whole.
        apply_chat_template: put prompts into the tokenizer's chat template, or into the one of that name.
        fewshot_as_multiturn: examples become turns of the chat; None means if there is a chat template.
        system_instruction: text before every prompt.
        gen_kwargs: generation settings that take the place of the tasks' own.
        seeds: of Python, numpy, torch and of the few-shot examples.
        confirm_run_unsafe_code: allow tasks that run code which a model wrote.

    Raises:
        ValueError: a value out of range, or two that exclude each other.
    """

    limit: int | float | None = None
    samples: Mapping[str, Sequence[int]] | None = None
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int | None, int | None, int | None, int | None] = DEFAULT_SEEDS
    confirm_run_unsafe_code: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and (self.limit <= 0 or (self.limit > 1 and self.limit != int(self.limit))):
            raise ValueError(
                f"limit must be a whole number of at least 1, or a share between 0 and 1, got {self.limit}"
            )
        if self.limit is not None and self.samples is not None:
            raise ValueError("limit and samples exclude each other; give one of them")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("fewshot_as_multiturn needs apply_chat_template")
        for task, numbers in (self.samples or {}).items():
            is_list = isinstance(numbers, list | tuple) and numbers and all(type(number) is int for number in numbers)
            if not is_list or min(numbers) < 0 or len(set(numbers)) < len(numbers):
                raise ValueError(
                    f"samples of {task} must be a list of different item numbers of at least 0, got {numbers!r}"
                )

    @property
    def is_multiturn(self) -> bool:
        """Whether few-shot examples become turns of a chat."""
        return bool(self.apply_chat_template) if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn

    def samples_of(self, task: str) -> list[int] | None:
        """The item numbers asked for of a task, in the order of the data, in which lm-eval goes through them."""
        numbers = (self.samples or {}).get(task)
        return None if numbers is None else sorted(numbers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for comparing the settings of two evaluations."""
        return {**asdict(self), "fewshot_as_multiturn": self.is_multiturn, "seeds": list(self.seeds)}

    def check_samples(self, tasks: Mapping[str, Any]) -> None:
        """Refuse item numbers that no task has.

        Raises:
            ValueError: `samples` names an unknown task, or an item that its task lacks.
        """
        for name, numbers in (self.samples or {}).items():
            if name not in tasks:
                raise ValueError(f"samples name the task {name!r}; the suite has {', '.join(tasks)}")
            size = len(tasks[name].eval_docs)
            if max(numbers) >= size:
                raise ValueError(f"samples of {name} name item {max(numbers)}; it has items 0 to {size - 1}")
