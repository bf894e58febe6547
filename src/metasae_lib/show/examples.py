"""Features with their explanation and their examples, as HTML."""

from __future__ import annotations

import html

import pandas as pd

from metasae_lib.interpret import Contexts, Example, in_words


def highlighted(example: Example) -> str:
    """An example as HTML, its tokens shaded by activation. Its text is escaped: it is the web's."""
    parts = []
    for piece, act in zip(example.pieces, example.acts, strict=True):
        text = html.escape(piece)
        if act > 0 and piece:
            shade = 0.25 + 0.75 * act / example.strength
            style = f"background:rgba(230,159,0,{shade:.2f});color:inherit"
            text = f'<mark style="{style}" title="{act:.2f}">{text}</mark>'
        parts.append(text)
    return "".join(parts)


def examples_page(contexts: Contexts, frame: pd.DataFrame, examples: int = 3) -> str:
    """Features with their explanation, scores and strongest examples, as HTML.

    frame: columns feature, explanation, fuzzing, spearman, detection.
    """
    parts = []
    for row in frame.to_dict("records"):
        text = html.escape(in_words(row["explanation"]) or "no explanation")
        lines = "".join(
            f"<li>… {highlighted(example)} … <small>{html.escape(example.origin)}</small></li>"
            for example in contexts.top(int(row["feature"]), examples)
        )
        parts.append(
            f"<p><strong>Feature {row['feature']}</strong>: {text}<br>"
            f"fuzzing {row['fuzzing']:+.2f}, Spearman {row['spearman']:+.2f}, "
            f"detection {row['detection']:.2f}</p><ul>{lines}</ul>"
        )
    return "".join(parts)
