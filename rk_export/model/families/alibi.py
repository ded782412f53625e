"""Slopes of ALiBi (arXiv 2108.12409): how much each head's scores fall with a token of distance."""

from __future__ import annotations


def halved_slopes(heads: int) -> tuple[float, ...]:
    """Return the slopes as BLOOM and Falcon have them.

    The first power of two of the heads has a geometric series; the others lie between its members.
    """
    power = 1 << (heads.bit_length() - 1)
    between = [2.0 ** (-4.0 * step / power) for step in range(1, 2 * (heads - power), 2)]
    return (*_series(power, 8.0), *between)


def skipped_slopes(heads: int, largest: float) -> tuple[float, ...]:
    """Return the slopes as MPT has them.

    They are members of the series of the next power of two, every second one first.

    Args:
        heads: Number of heads.
        largest: The exponent of the last slope.
    """
    power = 1 << (heads - 1).bit_length()
    series = _series(power, largest)
    return series if power == heads else (series[1::2] + series[::2])[:heads]


def _series(count: int, largest: float) -> tuple[float, ...]:
    return tuple(2.0 ** (-largest * step / count) for step in range(1, count + 1))
