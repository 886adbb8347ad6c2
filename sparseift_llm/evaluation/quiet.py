"""Running lm-eval without traces: its warnings, bars and random states are kept from whoever calls it."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import datasets  # type: ignore[import-untyped, unused-ignore]
import lm_eval.api.task
import lm_eval.utils
import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

DEFAULT_SEEDS = (DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED, DEFAULT_OTHER_SEED, DEFAULT_OTHER_SEED)


@contextlib.contextmanager
def exchanged(place: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `place.name` is `value`: for the few things that lm-eval has neither an option nor a method for.

    These are its bars and templates here, and where tasks read their data from (task_loading.py).
    """
    own = name in vars(place)
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before) if own else delattr(place, name)


@contextlib.contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Inside, lm-eval logs errors only, and neither it nor `datasets` draws progress bars.

    Args:
        bars: let the bars be drawn.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    had_bars = not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if not bars:
        datasets.disable_progress_bars()
    try:
        with exchanged(lm_eval.api.task, "tqdm", functools.partial(tqdm, disable=None if bars else True)):
            yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def seeded(seeds: Sequence[int | None] = DEFAULT_SEEDS) -> Iterator[None]:
    """lm-eval's seeds inside, the caller's random states back outside: a training run goes on undisturbed.

    Args:
        seeds: of Python, numpy and torch, in lm-eval's order; None leaves one as it is. A fourth, of the few-shot
            examples, is not used here.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        if seeds[0] is not None:
            random.seed(seeds[0])
        if seeds[1] is not None:
            np.random.seed(seeds[1])
        if seeds[2] is not None:
            torch.manual_seed(seeds[2])
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles each prompt template anew for each example, which takes most of the time that prompts take."""
    templates = lm_eval.utils.env
    with exchanged(templates, "from_string", functools.cache(templates.from_string)):
        yield
