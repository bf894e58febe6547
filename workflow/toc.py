"""What the book holds and in which order: the notebooks, what each waits for, and the contents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from metasae_lib import Profile

# A notebook reads tables that these have saved. One that is not named waits for none.
AFTER = {
    "03_cooccurrence": ["02_training"],
    "04_autointerp": ["02_training"],
    "05_case_studies": ["02_training", "04_autointerp"],
}
# A world of known atoms has no language model and no text.
SYNTHETIC = ["06_ground_truth"]
# The scorecard compares everything there is, so it waits for every other notebook.
LAST = "07_scorecard"

BEFORE_RUNS = ["method", "announced", "discussion", "setup", "saelens", "cluster"]
AFTER_RUNS = ["how-made", "scale", "texts", "glossary", "known-issues", "bibliography"]


def notebooks(folder: Path) -> list[str]:
    """Stems of the numbered notebooks, in reading order."""
    return sorted(path.stem for path in folder.glob("[0-9][0-9]_*.py"))


def pages_of(profile: Profile, all_notebooks: Sequence[str]) -> list[str]:
    """The notebooks that apply to a profile, in reading order."""
    return [name for name in all_notebooks if not profile.synthetic or name in SYNTHETIC]


def upstream(notebook: str, all_notebooks: Sequence[str]) -> list[str]:
    """The notebooks that must have run before this one."""
    if notebook == LAST:
        return [name for name in all_notebooks if name != LAST]
    return [name for name in AFTER.get(notebook, []) if name in all_notebooks]


def contents(
    run: Mapping[str, Sequence[str]], not_run: Sequence[str], claims: Sequence[str]
) -> dict[str, Any]:
    """The `_toc.yml` of a book: a part for the claims over all profiles, a part for every profile
    that was run with its notebooks, a page for the others."""
    parts = [
        {"caption": "The claim", "chapters": [{"file": page} for page in BEFORE_RUNS]},
        {"caption": "All profiles together", "chapters": [{"file": page} for page in claims]},
    ]
    for profile, notebooks_run in run.items():
        pages = [f"{profile}/index", *(f"{profile}/{name}" for name in notebooks_run)]
        parts.append({"caption": f"Run: {profile}", "chapters": [{"file": page} for page in pages]})
    if not_run:
        pages = [f"{profile}/index" for profile in not_run]
        parts.append(
            {"caption": "Not in this book", "chapters": [{"file": page} for page in pages]}
        )
    parts.append({"caption": "Reference", "chapters": [{"file": page} for page in AFTER_RUNS]})
    return {"format": "jb-book", "root": "index", "parts": parts}


def workflow_svg(all_notebooks: Sequence[str]) -> str:
    """The graph of the workflow as a drawing: profile, notebooks in columns, pages, book."""
    column = {name: 1 for name in all_notebooks}
    for name in all_notebooks:
        before = upstream(name, all_notebooks)
        column[name] = 1 + max((column[other] for other in before), default=0)
    last = max(column.values(), default=0) + 1
    nodes = {"profile": (0, 0), "pages": (last, 0), "book": (last + 1, 0)}
    for name in all_notebooks:
        nodes[name] = (column[name], sum(column[n] == column[name] for n in nodes if n in column))
    width, height, step_x, step_y = 150, 40, 190, 64
    rows = max(row for _, row in nodes.values()) + 1

    def at(name: str) -> tuple[int, int]:
        return 10 + nodes[name][0] * step_x, 10 + nodes[name][1] * step_y

    arrows = [("profile", name) for name in all_notebooks if not upstream(name, all_notebooks)]
    arrows += [(other, name) for name in all_notebooks for other in upstream(name, all_notebooks)]
    awaited = {start for start, _ in arrows}
    arrows += [(name, "pages") for name in all_notebooks if name not in awaited]
    arrows += [("pages", "book")]
    lines = []
    for start, end in arrows:
        (x0, y0), (x1, y1) = at(start), at(end)
        x0, y0, y1 = x0 + width, y0 + height // 2, y1 + height // 2
        middle = (x0 + x1) // 2
        lines.append(
            f'<path d="M{x0} {y0} C{middle} {y0} {middle} {y1} {x1 - 4} {y1}" fill="none"'
            ' stroke="#4a5568" stroke-width="1.5" marker-end="url(#tip)"/>'
        )
    boxes = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="#eef2f7"'
        f' stroke="#4a5568"/><text x="{x + width // 2}" y="{y + 25}" text-anchor="middle"'
        f' font-family="sans-serif" font-size="14" fill="#1a202c">{escape(name)}</text>'
        for name, (x, y) in ((name, at(name)) for name in nodes)
    ]
    size = f"0 0 {(last + 2) * step_x - 20} {rows * step_y}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="8"'
        ' markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="#4a5568"/></marker></defs>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(lines)}{"".join(boxes)}</svg>\n'
    )
