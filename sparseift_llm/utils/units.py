"""Numbers as people read them: 6.61M parameters, 2.4 GB, 1 h 05 min."""

from __future__ import annotations

import math


def readable_count(number: float) -> str:
    """A count with three digits and k, M, G or T.

    >>> [readable_count(n) for n in (0, 512, 1536, 6_614_272, 999_999, 2.5e12)]
    ['0', '512', '1.54k', '6.61M', '1.00M', '2.50T']
    """
    for power, letter in ((4, "T"), (3, "G"), (2, "M"), (1, "k")):
        scaled = number / 1000**power
        if scaled >= 0.9995:
            return f"{scaled:.{max(0, 2 - int(math.log10(max(scaled, 1) * 1.0005)))}f}{letter}"
    return f"{number:g}" if number == int(number) else f"{number:.3g}"


def readable_bytes(number: float) -> str:
    """Bytes in decimal units, as disks and GPUs are sold.

    >>> [readable_bytes(n) for n in (0, 512, 1_300_000_000, 80e9)]
    ['0 B', '512 B', '1.30 GB', '80.0 GB']
    """
    text = readable_count(number)
    letter = text[-1] if text[-1] in "kMGT" else ""
    return f"{text.removesuffix(letter)} {letter}B"


def unit_at(largest: float, unit: str) -> tuple[float, str]:
    """What to divide numbers up to `largest` by, so that they are short, and the unit that they are in then.

    Args:
        largest: the largest absolute value.
        unit: `FLOP`, `s`, ..., which take SI prefixes; `tokens`, whose billions are called B.

    >>> [unit_at(n, "FLOP") for n in (900, 2.9e12, 3e18)]
    [(1.0, 'FLOP'), (1000000000000.0, 'TFLOP'), (1e+18, 'EFLOP')]
    >>> [unit_at(n, "tokens") for n in (900, 1_228_800, 2e9)]
    [(1.0, 'tokens'), (1000000.0, 'M tokens'), (1000000000.0, 'B tokens')]
    """
    prefixes, space = ("kMBT", " ") if unit == "tokens" else ("kMGTPEZY", "")
    power = min(int(math.log10(largest) + 1e-9) // 3, len(prefixes)) if largest >= 1000 else 0
    return 1000.0**power, f"{prefixes[power - 1]}{space}{unit}" if power else unit


def readable_flops(number: float) -> str:
    """FLOPs with four digits and a prefix.

    >>> [readable_flops(n) for n in (900, 2_924_872_728_576)]
    ['900 FLOP', '2.925 TFLOP']
    """
    divisor, unit = unit_at(number, "FLOP")
    return f"{number / divisor:.4g} {unit}"


def readable_seconds(seconds: float) -> str:
    """A duration in its two largest units.

    >>> [readable_seconds(s) for s in (0.25, 12, 125, 3_900, 200_000)]
    ['0.25 s', '12 s', '2 min 05 s', '1 h 05 min', '2 d 08 h']
    """
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{round(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours:02d} h"
