"""Numbers as a person reads them: three significant digits and a unit; a dash for what was not measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

ABSENT = "–"


def number(value: float | None) -> str:
    """Return ``value`` with three significant digits: ``0.0120``, ``22.5``, ``1,230``, ``1.2e-5``."""
    if value is None:
        return ABSENT
    if not math.isfinite(value) or (abs(value) < 1e6 and value == round(value)):
        return f"{value:,g}" if abs(value) < 1000 or not math.isfinite(value) else f"{value:,.0f}"
    if 1e-3 <= abs(value) < 1000:
        return _digits(value)
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _digits(value: float) -> str:
    """Return three significant digits with their zeros: ``14.0``, ``0.350``, ``100``."""
    return f"{value:#.3g}".rstrip(".")


def _with_unit(value: float, units: Sequence[str]) -> str:
    """Scale ``value`` down by thousands until it is below 1000 and append the unit reached."""
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{_digits(value) if power else round(value)} {units[power]}".rstrip()


def count(value: float | None) -> str:
    """Return a number of things, e.g. parameters: ``576``, ``28.3 M``, ``6.74 G``."""
    return ABSENT if value is None else _with_unit(value, ("", "k", "M", "G", "T"))


def size(value: float | None) -> str:
    """Return bytes in decimal units: ``512 B``, ``74.3 MB``."""
    return ABSENT if value is None else _with_unit(value, ("B", "kB", "MB", "GB", "TB"))


def share(part: float | None, whole: float | None = 1.0) -> str:
    """Return ``part / whole`` in percent: ``89.3 %``; absent where it is not defined."""
    if part is None or not whole:
        return ABSENT
    percent = 100 * part / whole
    return f"{_digits(percent) if abs(percent) >= 0.01 else number(percent)} %"


def duration(seconds: float | None) -> str:
    """Return a time: ``85.0 ms``, ``12.3 s``, ``3 min 20 s``, ``1 h 05 min``."""
    if seconds is None:
        return ABSENT
    if seconds < 0.9995:
        return f"{_digits(1000 * seconds)} ms"
    if seconds < 59.95:
        return f"{_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plain(text: str) -> str:
    """Return ``text`` on one line, without characters that would steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def ranges(values: Iterable[int]) -> str:
    """Return sorted integers with runs joined: ``0-3,7``."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
