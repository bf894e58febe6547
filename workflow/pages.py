"""From an executed notebook to a page of the book.

One step between papermill and Sphinx, pure but for `add_downloads`: a page is refused unless every
cell ran; the parameters are those of the run, the defaults are left out; labels carry the profile's
name, so that two profiles can show the same figure; Markdown that a cell printed becomes text of
the page, so that its headings, numbered tables and references count; the points that a figure
offers (`figures.style.point`) stand behind it, for `book/_static/points.js`.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

LABEL = r"[A-Za-z][\w.:-]*"
# Where MyST defines a label: a target, a directive's name, an equation's label.
DEFINITIONS = [
    rf"(?P<before>^[ \t]*\()(?P<label>{LABEL})(?P<after>\)=[ \t]*$)",
    rf"(?P<before>^[ \t]*:(?:name|label):[ \t]*)(?P<label>{LABEL})(?P<after>[ \t]*$)",
    rf"(?P<before>\$\$[ \t]*\()(?P<label>{LABEL})(?P<after>\))",
    rf"(?P<before>\\label\{{)(?P<label>{LABEL})(?P<after>\}})",
]
# Where it uses one: a role, a role with its own text, a link, TeX.
USES = [
    rf"(?P<before>\{{(?:ref|numref|eq)\}}`)(?P<label>{LABEL})(?P<after>`)",
    rf"(?P<before>\{{(?:ref|numref|eq)\}}`[^`<]*<)(?P<label>{LABEL})(?P<after>>`)",
    rf"(?P<before>\]\(#)(?P<label>{LABEL})(?P<after>\))",
    rf"(?P<before>\\(?:eq)?ref\{{)(?P<label>{LABEL})(?P<after>\}})",
]
HEADING = re.compile(r"^(#{1,6})[ \t]+(.+?)[ \t]*$", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~|:::).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
LINES_SHOWN = 12  # of a log, on the terminal
#: Folders of a run whose files a page may offer for download.
OFFERED = ("tables", "values", "figures")


class PageError(Exception):
    """A notebook that must not become a page; the sentence says which cell and why."""


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that have something to run."""
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def unfinished(notebook: NotebookNode) -> str:
    """Why the notebook is not a finished one, or ''.

    Papermill's own metadata says that every cell completed even when the kernel died: only a
    cell's execution count and outputs tell.
    """
    for number, cell in enumerate(code_cells(notebook), start=1):
        if any(output.output_type == "error" for output in cell.outputs):
            return f"code cell {number} failed"
        if cell.execution_count is None:
            return f"code cell {number} never ran"
    return ""


def labels(notebook: NotebookNode) -> set[str]:
    """Every label that the notebook defines, in text, in Markdown outputs and in figures."""
    found = {
        match["label"]
        for text in _markdown_texts(notebook)
        for pattern in DEFINITIONS
        for match in re.finditer(pattern, text, re.MULTILINE)
    }
    for cell in notebook.cells:
        name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        found |= {name} if name else set()
    return found


def make_page(notebook: NotebookNode, profile: str, known_labels: Iterable[str]) -> NotebookNode:
    """A page (a new notebook) from an executed one; PageError for an unfinished one.

    `known_labels` are those of every notebook of the profile, so that one page can refer to a
    figure of another.
    """
    reason = unfinished(notebook)
    if reason:
        raise PageError(f"{reason}: run it again, a page shows finished notebooks only.")
    page = copy.deepcopy(notebook)
    cells: list[NotebookNode] = []
    for cell in page.cells:
        if cell.cell_type == "code":
            tags = cell.metadata.get("tags", [])
            if "parameters" in tags or not cell.source.strip():
                continue
            cells += _split(cell)
        else:
            cells.append(cell)
    renamed = {label: f"{label}-{profile}" for label in known_labels}
    for cell in cells:
        _rename(cell, renamed)
    page.cells = cells
    # Papermill's times and paths belong to the log.
    page.metadata = NotebookNode(
        {k: v for k, v in notebook.metadata.items() if k in ("kernelspec", "language_info")}
    )
    return page


def without_machine(notebook: NotebookNode) -> NotebookNode:
    """The executed notebook as offered for download: papermill's paths and warnings left out."""
    cleaned = copy.deepcopy(notebook)
    cleaned.metadata.pop("papermill", None)
    for cell in cleaned.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            _drop_stderr(cell)
    return cleaned


def headings(notebook: NotebookNode) -> list[tuple[int, str]]:
    """(level, text) of every heading in the notebook's text, fenced blocks left out."""
    text = "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    return [(len(level), title) for level, title in HEADING.findall(FENCE.sub("", text))]


def link_files(page: NotebookNode, run_folder: Path, page_folder: Path) -> None:
    """Copy the run's files that the page links to beside it, and make the links downloads.

    A target counts by its last two parts (`tables/phi.csv`), whatever stands before them: the same
    link works in the notebook. Links to the book's prose lose their `../book/`. PageError for a
    link to a file that is not there.
    """

    def replace(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        if "book" in Path(target).parts[:-1]:
            return f"[{text}](../{target.rpartition('book/')[2]}{anchor})"
        *_, folder, name = (".", *Path(target).parts)
        if folder not in OFFERED:
            return match[0]
        source = run_folder / folder / name
        if not source.is_file():
            raise PageError(f"it links to {folder}/{name}, which the run does not hold.")
        (page_folder / folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, page_folder / folder / name)
        return f"{{download}}`{text} <{folder}/{name}>`"

    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(replace, cell.source)


def tables_used(notebook: NotebookNode) -> list[str]:
    """Names of the tables that the notebook saves or loads by a literal name."""
    call = re.compile(r"""(?:save|load)_table\(\s*["']([\w.-]+)["']""")
    source = "\n".join(cell.source for cell in code_cells(notebook))
    return list(dict.fromkeys(call.findall(source)))


def _markdown_texts(notebook: NotebookNode) -> Iterable[str]:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield cell.source
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                yield output.data["text/markdown"]


def _drop_stderr(cell: NotebookNode) -> None:
    # Warnings of libraries name files of this machine; the log keeps them.
    cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def _split(cell: NotebookNode) -> list[NotebookNode]:
    """A code cell as cells of the page: its code, and what it showed, Markdown as text.

    PageError for text in a figure's cell: the page would show the text and lose the figure.
    """
    _drop_stderr(cell)
    figure = cell.metadata.get("mystnb", {}).get("figure")
    if figure and any("text/markdown" in output.get("data", {}) for output in cell.outputs):
        raise PageError(f"the cell of figure {figure['name']} shows text as well: split it.")
    metadata = {k: v for k, v in cell.metadata.items() if k in ("mystnb", "tags")}
    if "injected-parameters" in metadata.get("tags", []):
        metadata["tags"] = []  # what a reader changes first: in full view
    pieces = [new_code_cell(cell.source, metadata=metadata, execution_count=cell.execution_count)]
    for output in cell.outputs:
        text = output.get("data", {}).get("text/markdown")
        if text is not None:
            about = output.metadata.get("text/markdown", {})
            pieces.append(new_markdown_cell(text, metadata=about))
            continue
        if pieces[-1].cell_type == "markdown":
            tags = [*metadata.get("tags", []), "remove-input"]
            pieces.append(new_code_cell("", metadata=metadata | {"tags": tags}))
        pieces[-1].outputs.append(output)
        points = output.get("metadata", {}).get("image/png", {}).get("points")
        if points:
            pieces.append(new_markdown_cell(_points(points)))
    return pieces


def _points(points: list[dict[str, Any]]) -> str:
    """The points of a figure, for the script that lets a reader choose them."""
    data = json.dumps(points, ensure_ascii=False).replace("<", "\\u003c")
    script = f'<script type="application/json" class="points">{data}</script>'
    return f"```{{raw}} html\n{script}\n```"


def _rename(cell: NotebookNode, renamed: dict[str, str]) -> None:
    if cell.cell_type == "markdown":
        cell.source = _renamed(cell.source, renamed)
    figure = cell.metadata.get("mystnb", {}).get("figure", {})
    for key, value in figure.items():
        figure[key] = renamed.get(value, value) if key == "name" else _renamed(value, renamed)


def _renamed(text: str, renamed: dict[str, str]) -> str:
    def replace(match: re.Match[str]) -> str:
        return match["before"] + renamed.get(match["label"], match["label"]) + match["after"]

    for pattern in (*DEFINITIONS, *USES):
        text = re.sub(pattern, replace, text, flags=re.MULTILINE)
    return text
