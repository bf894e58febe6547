"""Where a figure or table comes from: below it a line with its data and the cell that made it.

A figure's data are the saved tables that its cell draws, found by the names of the variables; a
printed table brings its own frame (`show.text.table`), which is written beside the page.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from citation import Citation

SHOWN = "shown"  # folder of the printed tables beside a page


def line(data: Iterable[str], maker: str) -> str:
    """The line itself: links to data, and what made them."""
    return f"```{{div}} source-line\nData: {', '.join(data)}. Made by {maker}.\n```"


def saved_tables(source: str) -> dict[str, tuple[str, int]]:
    """By variable, the table that a notebook saves it as, and the line where it does."""
    return {
        call.args[1].id: (str(call.args[0].value), call.lineno)
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "save_table"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[1], ast.Name)
    }


def drawn_tables(cell: str, source: str) -> list[str]:
    """The saved tables that a cell of the notebook `source` draws, or at least computes with."""
    saved, tree = saved_tables(source), ast.parse(cell)
    drawn = [
        argument
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("figures.")
        for argument in call.args
    ]
    for nodes in (drawn, [tree]):
        names = [n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)]
        if found := dict.fromkeys(saved[name][0] for name in names if name in saved):
            return list(found)
    return []


def saver(table: str, notebooks: Path) -> tuple[str, int] | None:
    """The notebook that saves a table, from the repository's folder, and the line where it does."""
    for path in sorted(notebooks.glob("[0-9][0-9]_*.py")):
        for name, number in saved_tables(path.read_text(encoding="utf-8")).values():
            if name == table:
                return f"{notebooks.name}/{path.name}", number
    return None


def add_sources(page: NotebookNode, path: Path, folder: Path, commit: str, where: Citation) -> None:
    """Give every figure and table of a page its line, and write printed tables into its folder.

    page: of `pages.make_page`; path: the notebook's source, which ran at `commit`.
    """
    source = path.read_text(encoding="utf-8")
    file, cells, maker = f"{path.parent.name}/{path.name}", [], ""
    for cell in page.cells:
        cells.append(cell)
        if cell.cell_type == "code" and cell.source:
            found = source.find(cell.source)
            number = source.count("\n", 0, found) + 1 if found >= 0 else None
            maker = where.file(file, commit, number)
        shown: Mapping[str, str] = cell.metadata.pop("table", {})
        for label, csv in shown.items():
            (folder / SHOWN).mkdir(parents=True, exist_ok=True)
            (folder / SHOWN / f"{label}.csv").write_text(csv, encoding="utf-8")
            data = f"{{download}}`{label}.csv <{SHOWN}/{label}.csv>`"
            cell.source += "\n\n" + line([data], maker)
        if "figure" in cell.metadata.get("mystnb", {}) and cell.outputs:
            tables = [f"[{t}.csv](tables/{t}.csv)" for t in drawn_tables(cell.source, source)]
            cells.append(new_markdown_cell(line(tables, maker)))
    page.cells = cells
