"""The notebooks' rules: short, parameterised, every figure described and its data offered."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import jupytext
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow"))

from sources import drawn_tables

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
LABEL = re.compile(r"[a-z][a-z0-9-]*")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Any:
    return jupytext.read(request.param)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])  # type: ignore[no-any-return]


def test_there_are_notebooks() -> None:
    names = {path.stem for path in NOTEBOOKS}
    assert {"01_penalty", "02_training", "03_cooccurrence", "07_scorecard"} <= names


def test_header_and_title(notebook: Any) -> None:
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert notebook.metadata["jupytext"]["text_representation"]["format_name"] == "percent"
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    headings = [
        len(match[1])
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for match in re.finditer(r"^(#+) ", cell.source, re.MULTILINE)
    ]
    assert headings.count(1) == 1
    assert all(level <= 3 for level in headings)


def test_one_cell_of_plain_parameters(notebook: Any) -> None:
    tagged = [c for c in notebook.cells if "parameters" in tags(c)]
    assert len(tagged) == 1
    assert tagged[0] is code(notebook)[0]
    values = {}
    for line in ast.parse(tagged[0].source).body:
        assert isinstance(line, ast.Assign)
        values[line.targets[0].id] = ast.literal_eval(line.value)  # type: ignore[attr-defined]
    assert values == {"profile": "smollm2-135m", "overrides": {}, "runs_dir": "../runs"}


def test_few_short_cells_without_classes_or_functions(notebook: Any) -> None:
    cells = code(notebook)
    assert len([cell for cell in cells if "hide-input" not in tags(cell)]) <= 15
    assert len(cells) <= 18
    for cell in cells:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 12 or "parameters" in tags(cell), cell.source
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef | ast.FunctionDef)


def test_imports_and_saving_are_folded_and_figures_are_not(notebook: Any) -> None:
    for cell in code(notebook):
        plumbing = re.search(r"^(import|from) |\brun\.save_", cell.source, re.MULTILINE)
        assert not plumbing or "hide-input" in tags(cell), cell.source
        assert not ("hide-input" in tags(cell) and cell.metadata.get("mystnb")), cell.source


def test_ends_with_the_three_blocks(notebook: Any) -> None:
    calls = re.findall(r"show\.(\w+)\(", code(notebook)[-1].source)
    assert calls[-3:] == ["paper_against_ours", "provenance", "downloads"]


def test_every_figure_has_label_caption_and_description(notebook: Any) -> None:
    labels = []
    for cell in code(notebook):
        draws = re.search(r"\bfigures\.[a-z_0-9]+\(", cell.source)
        described = cell.metadata.get("mystnb", {})
        assert bool(draws) == bool(described), cell.source
        if described:
            figure, image = described["figure"], described["image"]
            assert LABEL.fullmatch(figure["name"]) and figure["name"].startswith("fig-")
            assert len(figure["caption"]) > 60 and figure["caption"].endswith(".")
            assert len(image["alt"]) > 30 and image["alt"] != figure["caption"]
            labels.append(figure["name"])
    assert len(labels) == len(set(labels))


def test_every_table_is_offered_for_download(notebook: Any) -> None:
    source = "\n".join(cell.source for cell in code(notebook))
    saved = set(re.findall(r'save_table\(\s*"([\w.-]+)"', source))
    offered = code(notebook)[-1].source.split("show.downloads(")[1]
    assert saved, "a notebook saves the tables behind its figures"
    # What only the scorecard reads is offered there.
    saved = {name for name in saved if not name.endswith("_values")}
    assert saved <= set(re.findall(r'"([\w.-]+)"', offered))


def test_every_figure_is_drawn_from_a_saved_table(notebook: Any) -> None:
    source = "\n\n".join(cell.source for cell in code(notebook))
    for cell in code(notebook):
        if "mystnb" in cell.metadata:
            assert drawn_tables(cell.source, source), cell.source


def test_labels_differ_between_notebooks() -> None:
    found: list[str] = []
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        found += re.findall(r'"(?:fig|tab)-[\w-]+"', text)
    assert len(found) == len(set(found))
