"""How time and memory are measured: contestants take turns, medians count, and peaks are what allocators count.

What is measured is in layer.py and step.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sparseift_llm.ops.kernels.native import NATIVE
from sparseift_llm.utils.progress import progress_bar


def take_turns(
    contestants: Mapping[str, Mapping[str, Callable[[], Any]]], device: str, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each part of each contestant, one round after the other; two rounds warm up."""
    times: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in parts} for name, parts in contestants.items()
    }
    with progress_bar("timing", (repeats + 2) * len(contestants), "turn") as bar:
        for turn in range(repeats + 2):
            for name, parts in contestants.items():
                for part, seconds in zip(parts, queued_seconds(list(parts.values()), device), strict=True):
                    if turn >= 2:
                        times[name][part].append(seconds)
                bar.update()  # outside of what is timed
    return times


def queued_seconds(runs: Sequence[Callable[[], Any]], device: str) -> list[float]:
    """Seconds of the device that each of `runs` takes, called one right after the other.

    On a GPU they are queued without waiting, as a training step queues them, with an event before and after each: what
    the host takes shows only where the GPU has nothing left to do.
    """
    if device != "cuda":
        return [seconds_of(run, device) for run in runs]
    torch.cuda.synchronize()
    events = []
    for run in runs:
        events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        events[-1][0].record()
        run()
        events[-1][1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Seconds that `run` takes, work queued on a GPU included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most bytes that torch's allocator held during `run` beyond what it held before.

    On a CPU, the memory that native block kernels keep for the next layer counts as well.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    NATIVE.release_scratch()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak + NATIVE.scratch_bytes()
