"""The scorecard at a glance."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from metasae_lib.show.figures.style import BLACK, BLUE, GREY, RED, SKY, YELLOW, styled

_VERDICTS = {
    "agrees": BLUE, "as in the paper": BLUE, "made": BLUE,
    "same direction, different size": SKY, "set otherwise": SKY,
    "inconclusive": YELLOW, "disagrees": RED,
    "other model: not comparable": "#BDBDBD", "not run": "#E4E4E4", "not printed": "#F4F4F4",
}  # fmt: skip


@styled(8.0, 3.8)
def scorecard_overview(figure: Figure, frame: pd.DataFrame) -> None:
    """How many of the published values stand how. Columns: section, group (the verdict)."""
    ax = figure.subplots()
    sections = list(dict.fromkeys(frame.section))
    groups = [g for g in _VERDICTS if (frame.group == g).any()]
    counts = pd.crosstab(frame.section, frame.group).reindex(index=sections, columns=groups)
    left = np.zeros(len(sections))
    for group in groups:
        width = counts[group].to_numpy()
        bars = ax.barh(sections, width, left=left, color=_VERDICTS[group], edgecolor=GREY,
                       linewidth=0.5, label=group)  # fmt: skip
        labels = [str(w) if w else "" for w in width]
        dark = _VERDICTS[group] in (BLUE, RED)
        ax.bar_label(bars, labels, label_type="center", color="white" if dark else BLACK)
        left += width
    ax.invert_yaxis()
    ax.set_xlim(0, 1.03 * left.max())
    ax.set_xlabel("published values")
    ax.grid(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=3)
