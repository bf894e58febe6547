"""Numbers, lists and tables as a reader wants them, in MyST's dialect of Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from IPython.display import Markdown


def number(value: Any, digits: int = 3) -> str:
    """A number as a reader wants it; words as they are, nothing as a dash.

    `digits` significant ones, whole where that is more; powers of ten below 0.01; a true minus.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "—"
    if isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    size = abs(value)
    if math.isinf(value):
        text = "∞" if value > 0 else "-∞"
    elif float(value).is_integer() or 10**digits <= round(size) < 1e9:
        text = f"{value:,.0f}"
    elif 0.01 <= size < 1e9:
        text = f"{value:.{digits}g}"
    else:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "−")


def percent(value: float) -> str:
    """A change in percent with its sign: `−7.5%`."""
    return f"{signed(value, '+.1f')}%"


def signed(value: float, form: str = "+.4f") -> str:
    """A change with its sign, a true minus: `+0.0175`, as those of scores are shown."""
    return f"{value:{form}}".replace("-", "−")


def between(low: float, high: float, show: Callable[[float], str] = number) -> str:
    """An interval as `low to high`."""
    return f"{show(low)} to {show(high)}"


def table(
    frame: pd.DataFrame, caption: str, label: str, look: Literal["", "filterable", "wide"] = ""
) -> Markdown:
    """A numbered MyST table of a frame; its index is left out.

    The frame itself goes along as CSV, unrounded, in the metadata `table` by its label: a page
    offers it below the table.

    look: what it is on a page of the book: `filterable`, with a search box and a choice of verdict;
    `wide`, in small type and with unbroken names, to be scrolled where it does not fit.
    """
    columns = [cell(c) for c in frame.columns]
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(number(value)) for value in row] for row in frame.itertuples(index=False)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    kind = f":class: {look}\n" if look else ""
    text = f":::{{table}} {caption}\n:name: {label}\n{kind}\n{body}\n:::\n"
    return Markdown(text, metadata={"table": {label: frame.to_csv(index=False)}})


def section(title: str, text: str) -> Markdown:
    """A short section of a page, below a `##` heading."""
    return Markdown(f"### {title}\n\n{text}")


def bullets(title: str, sentences: Iterable[str]) -> Markdown:
    """A section of a page whose text is a list."""
    return Markdown(f"## {title}\n\n" + "\n".join(f"- {sentence}" for sentence in sentences))


def enumerated(items: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def cell(text: str) -> str:
    """Markdown as a cell of a table: on one line by every reader's idea of lines."""
    return " ".join(str(text).splitlines()).replace("|", "\\|")


def literal(text: str) -> str:
    """What someone wrote, on one line of Markdown, so that nothing in it is read as Markdown."""
    line = re.sub(r"([\\`*_{}\[\]<>$&~|])", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(\d*)(?=[-+#%=:.()])", r"\1\\", line)  # what begins a list or a block


def plain(value: Any) -> str:
    """Nested facts in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(v)}" for key, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(plain(v) for v in value) or "none"
    return str(value)
