"""Whole processes: measured, or ended with all that they started. No tests stand here."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence

import pytest

from tests.helpers.paths import ROOT


def cpu_seconds(command: Sequence[str]) -> float:
    """Processor time of one process from its start to its end, in seconds. It must succeed.

    Processor time is measured because the time on the clock depends on what else the machine does.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return usage.ru_utime + usage.ru_stime


def median_cpu_seconds(programs: Mapping[str, str], repeats: int) -> dict[str, float]:
    """Median processor time of Python programs, which take turns. The first turn, which fills caches, does not count.

    Args:
        programs: source text by name.
        repeats: turns that count.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            seconds = cpu_seconds([sys.executable, "-c", program])
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def run_within(
    seconds: float, command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command that starts processes of its own, with its output and errors in `stdout`.

    After `seconds` all of them are killed, and the test fails: a hang is a failure.
    """
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"processes did not end within {seconds} s:\n{output}")
    return subprocess.CompletedProcess(command, process.returncode, output)


def output_of(program: str) -> str:
    """What a Python program prints in a process of its own, with warnings as errors. It must succeed."""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
