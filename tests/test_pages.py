"""From notebooks to pages: execution, post-processing, the rendered book and its checks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_report import fill

from metasae_lib import Profile, Run
from metasae_lib.show import run_scorecard
from metasae_lib.study.errors import ProfileError
from metasae_lib.study.kept import kept_runs
from metasae_lib.study.known import TEXTS

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "workflow"))

import book  # noqa: E402
import build  # noqa: E402
import execute  # noqa: E402
import landing  # noqa: E402
import pages  # noqa: E402
import sources  # noqa: E402
import toc  # noqa: E402
from check_site import check_site  # noqa: E402
from citation import READS_TABLES, Citation  # noqa: E402

NOTEBOOK = """\
# %% [markdown]
# # A page
#
# {{numref}}`curve` shows {{eq}}`energy`; see [the words](../book/glossary.md).
#
# $$ E = m c^2 $$ (energy)

# %% tags=["parameters"]
profile = "smollm2-135m"
overrides = {{}}
runs_dir = "../runs"

# %% tags=["hide-input"]
import warnings
from pathlib import Path

import pandas as pd
from IPython.display import Markdown, display
from matplotlib import pyplot

from metasae_lib import Profile, Run
from metasae_lib.show import table as table_of

run = Run.open(Profile.load(profile, overrides), runs_dir)
table = pd.DataFrame({{"x": [1, 2], "y": [3.0, 4.0]}})
_ = run.save_table("small", table, "two rows")
warnings.warn(f"from {{Path.home()}}")

# %% mystnb={{"figure": {{"name": "curve", "caption": "A line, see {{numref}}`numbers`."}}, \
"image": {{"alt": "A line that rises from left to right."}}}}
_ = pyplot.plot(table.x, table.y)

# %%
{extra}
display(table_of(pd.DataFrame({{"x": [0.123456789]}}), "Exact", "tab-exact"))
display(Markdown("## A heading of the cell\\n\\n:::{{table}} Numbers\\n:name: numbers\\n\\n"
                 "| x |\\n| --- |\\n| 1 |\\n:::\\n\\n[small](../runs/tables/small.csv)"))
print("after the heading")
"""


# What globs, Sphinx, Snakemake, papermill and addresses give a meaning to.
STRANGE = "we[i]rd {dir} #1 100% d’été?a=b&'c'"
MARKDOWN = "1. [no](gone.md), {numref}`gone` $x$, *a* <b>\n```{gone}\n:::\n(tab)= | \\begin{x}"


def _ran(source: str, count: int = 1, outputs: list[NotebookNode] | None = None) -> NotebookNode:
    return new_code_cell(source, execution_count=count, outputs=outputs or [])


def _shown(**data: str) -> NotebookNode:
    return new_output("display_data", data={k.replace("_", "/"): v for k, v in data.items()})


ADDRESS = "https://github.com/someone/a-book"


def _repository(folder: Path, extra: str = "") -> Path:
    """A repository with the real prose, a small notebook and a profile full of Markdown."""
    shutil.copytree(REPOSITORY / "book", folder / "book")
    (folder / "book" / "claims.yml").write_text("{announced: {}, runs: {}}\n")  # of other profiles
    shutil.copy(REPOSITORY / "_config.yml", folder)
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    cited |= {"repository-code": ADDRESS, "url": "https://someone.example/a-book/"}
    (folder / "CITATION.cff").write_text(yaml.safe_dump(cited))
    (folder / "profiles").mkdir()
    for name in ("tiny", "smollm2-135m", "gpt2-large"):
        profile = yaml.safe_load((REPOSITORY / "profiles" / f"{name}.yml").read_text())
        profile["about"] = MARKDOWN if name != "tiny" else profile["about"]
        profile["text"]["source"] = profile["text"]["source"].replace("fineweb", "a_*b*_$x$_<b>")
        (folder / "profiles" / f"{name}.yml").write_text(yaml.safe_dump(profile))
    (folder / "notebooks").mkdir()
    (folder / "notebooks" / "01_first.py").write_text(NOTEBOOK.format(extra=extra))
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with its rendered book: the same notebook for two profiles."""
    root = _repository(tmp_path_factory.mktemp("repository") / STRANGE)
    notebook = root / "notebooks" / "01_first.py"
    for name in ("tiny", "smollm2-135m"):
        run = Run.open(Profile.load(root / "profiles" / f"{name}.yml"), root / "runs")
        run.save_json("headline", {"sentences": [f"Found on {name}: 3 < 4."], "profile": name})
        execute.execute(notebook, run)
    fill(run)  # so that the first page has an answer and its picture
    run.save_table("scorecard", run_scorecard(run), "made up")
    book.stage(root, ["tiny", "smollm2-135m"], root / "runs", root / "_build" / "site-src")
    book.render(root, root / "_build" / "site-src", root)
    return root / "_build" / "html"


@pytest.fixture
def harmed(site: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the rendered book that a test may spoil."""
    copy = tmp_path / "html"
    shutil.copytree(site, copy)
    yield copy


# Pages from notebooks


def test_failed_and_unrun_cells_are_refused() -> None:
    error = new_output("error", ename="ValueError", evalue="no", traceback=[])
    failed = new_notebook(cells=[_ran("a"), _ran("b", outputs=[error])])
    unrun = new_notebook(cells=[_ran("a"), new_code_cell("b")])
    # What papermill writes when the kernel dies: everything completed, nothing counted.
    unrun.cells[1].metadata["papermill"] = {"status": "completed"}
    with pytest.raises(pages.PageError, match="code cell 2 failed"):
        pages.make_page(failed, "tiny", [])
    with pytest.raises(pages.PageError, match="code cell 2 never ran"):
        pages.make_page(unrun, "tiny", [])
    assert pages.unfinished(new_notebook(cells=[_ran("a"), new_code_cell("  ")])) == ""


def test_a_figure_has_its_cell_to_itself() -> None:
    both = _ran("a", outputs=[_shown(text_markdown="words"), _shown(image_png="")])
    both.metadata["mystnb"] = {"figure": {"name": "fig-a", "caption": "A line."}}
    with pytest.raises(pages.PageError, match="figure fig-a shows text as well"):
        pages.make_page(new_notebook(cells=[both]), "tiny", [])


def test_default_parameters_go_and_injected_ones_are_shown() -> None:
    default, injected = _ran('profile = "a"'), _ran('profile = "b"')
    default.metadata["tags"], injected.metadata["tags"] = ["parameters"], ["injected-parameters"]
    page = pages.make_page(new_notebook(cells=[default, injected]), "tiny", [])
    assert [(c.source, c.metadata["tags"]) for c in page.cells] == [('profile = "b"', [])]


def test_markdown_outputs_become_text_in_their_place() -> None:
    outputs = [
        new_output("stream", name="stdout", text="one"),
        new_output("stream", name="stderr", text="/root/warning"),
        _shown(text_markdown="## Two", text_plain="<Markdown>"),
        _shown(text_plain="three"),
    ]
    notebook = new_notebook(cells=[_ran("show()", outputs=outputs)])
    page = pages.make_page(notebook, "tiny", [])
    code, text, rest = page.cells
    assert code.source == "show()"
    assert [o.text for o in code.outputs] == ["one"]
    assert (text.cell_type, text.source) == ("markdown", "## Two")
    assert rest.source == "" and "remove-input" in rest.metadata["tags"]
    assert rest.outputs[0].data["text/plain"] == "three"
    assert len(notebook.cells[0].outputs) == 4, "the executed notebook was changed"


def test_the_points_of_a_figure_stand_behind_it() -> None:
    points = [{"left": 0.5, "top": 0.25, "arm": "solo", "words": "</script><b>"}]
    drawn = new_output(
        "execute_result", data={"image/png": ""}, metadata={"image/png": {"points": points}}
    )
    figure, text = pages.make_page(
        new_notebook(cells=[_ran("draw()", outputs=[drawn])]), "tiny", []
    ).cells
    assert figure.outputs[0].data == {"image/png": ""}
    assert text.source.startswith("```{raw} html") and text.source.count("<") == 2
    assert json.loads(re.findall(r">(.*)<", text.source)[0]) == points


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("(here)=\n# T", "(here-tiny)=\n# T"),
        (":::{table} T\n:name: here\n:::", ":::{table} T\n:name: here-tiny\n:::"),
        ("$$\nx\n$$ (here)", "$$\nx\n$$ (here-tiny)"),
        (r"\label{here} \eqref{here}", r"\label{here-tiny} \eqref{here-tiny}"),
        ("{numref}`here`", "{numref}`here-tiny`"),
        ("{numref}`Figure %s <here>`", "{numref}`Figure %s <here-tiny>`"),
        ("[text](#here)", "[text](#here-tiny)"),
        ("{ref}`elsewhere` (here) here", "{ref}`elsewhere` (here) here"),
    ],
)
def test_labels_carry_the_profile(before: str, after: str) -> None:
    page = pages.make_page(new_notebook(cells=[new_markdown_cell(before)]), "tiny", ["here"])
    assert page.cells[0].source == after


def test_labels_are_found_in_text_outputs_and_figures() -> None:
    table = _shown(text_markdown=":::{table} T\n:name: tab-a\n:::")
    cell = _ran("plot()")
    cell.metadata["mystnb"] = {"figure": {"name": "fig-a", "caption": "see {numref}`tab-a`"}}
    notebook = new_notebook(
        cells=[
            new_markdown_cell("$$ x $$ (eq-a)\n\n(sec-a)=\n# T"),
            cell,
            _ran("show()", outputs=[table]),
        ]
    )
    found = pages.labels(notebook)
    assert found == {"tab-a", "fig-a", "eq-a", "sec-a"}
    page = pages.make_page(notebook, "tiny", found)
    assert page.cells[1].metadata["mystnb"]["figure"] == {
        "name": "fig-a-tiny",
        "caption": "see {numref}`tab-a-tiny`",
    }
    assert cell.metadata["mystnb"]["figure"]["name"] == "fig-a", "the notebook was changed"


def test_a_folded_cell_stays_folded_and_shows_what_it_says() -> None:
    shown = [_shown(text_markdown="## Found"), _shown(text_plain="1")]
    cell = _ran("save(); show()", outputs=shown)
    cell.metadata["tags"] = ["hide-input"]
    code, text, rest = pages.make_page(new_notebook(cells=[cell]), "tiny", []).cells
    assert code.metadata["tags"] == ["hide-input"] and not code.outputs
    assert (text.cell_type, text.source) == ("markdown", "## Found")
    assert "remove-input" in rest.metadata["tags"] and len(rest.outputs) == 1


def test_headings_leave_fenced_blocks_out() -> None:
    text = "# One\n\n```python\n# no heading\n```\n\n## Two"
    assert pages.headings(new_notebook(cells=[new_markdown_cell(text)])) == [(1, "One"), (2, "Two")]


def test_links_to_a_missing_table_are_refused(tmp_path: Path) -> None:
    page = new_notebook(cells=[new_markdown_cell("[no](../runs/tiny/tables/no.csv)")])
    with pytest.raises(pages.PageError, match=r"tables/no\.csv"):
        pages.link_files(page, tmp_path, tmp_path)


def test_links_outside_of_the_book_are_files() -> None:
    for name in ("README.md", "CHANGELOG.md", "results/README.md"):
        text = (REPOSITORY / name).read_text()
        for target in re.findall(r"\]\((?![a-z]+:)([^)#]+)", text):
            assert (REPOSITORY / name).parent.joinpath(target).exists(), (name, target)


# Contents


def test_every_notebook_of_every_run_is_in_the_contents() -> None:
    table = toc.contents({"a": ["01_x", "02_y"], "b": ["01_x"]}, ["c"], ["together/x"])
    files = [chapter["file"] for part in table["parts"] for chapter in part["chapters"]]
    assert [f for f in files if f[0] in "abc" and "/" in f] == [
        "a/index", "a/01_x", "a/02_y", "b/index", "b/01_x", "c/index",
    ]  # fmt: skip
    assert len(files) == len(set(files))
    for name in toc.BEFORE_RUNS + toc.AFTER_RUNS:
        assert (REPOSITORY / "book" / f"{name}.md").exists()


def test_the_scorecard_waits_for_all_others() -> None:
    names = ["01_penalty", "02_training", "03_cooccurrence", "07_scorecard"]
    assert toc.upstream("07_scorecard", names) == names[:3]
    assert toc.upstream("03_cooccurrence", names) == ["02_training"]
    assert toc.upstream("03_cooccurrence", ["03_cooccurrence"]) == []
    assert toc.upstream("01_penalty", names) == []


# Execution


def test_a_failing_notebook_is_no_page_and_leaves_its_traceback(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = _repository(tmp_path / "repository", extra='raise ValueError("as planned")')
    with pytest.raises(execute.ExecutionError, match="as planned") as caught:
        execute.execute(root / "notebooks" / "01_first.py", run)
    assert "01_first.log" in str(caught.value)
    log = (run.folder / "logs" / "01_first.log").read_text()
    assert "ValueError" in log and "as planned" in log and "\x1b" not in log
    assert not (run.folder / "notebooks" / "01_first.ipynb").exists()
    assert "01_first: cell 5/5" in capsys.readouterr().out


def test_a_dead_kernel_is_no_page_and_is_not_run_again(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = _repository(tmp_path / "repository", extra="import os\nos._exit(138)")
    with pytest.raises(execute.ExecutionError):
        execute.execute(root / "notebooks" / "01_first.py", run)
    assert not (run.folder / "notebooks" / "01_first.ipynb").exists()
    assert capsys.readouterr().out.count("cell 1/5") == 1


@pytest.mark.parametrize("name", READS_TABLES)
def test_a_notebook_that_reads_tables_needs_what_is_kept_alone(name: str, tmp_path: Path) -> None:
    """As it opens from a launch button: nothing was run, and nothing kept is changed."""
    fresh = Run.open(Profile.load("smollm2-135m"), tmp_path)
    path = execute.execute(REPOSITORY / "notebooks" / f"{name}.py", fresh)
    outputs = [o for c in nbformat.read(path, 4).cells for o in c.get("outputs", [])]
    text = " ".join(o.data.get("text/markdown", "") for o in outputs if "data" in o)
    (kept,) = (run for run in kept_runs(REPOSITORY / "results") if run.name == fresh.name)
    assert kept.provenance()["commit"] in text
    assert str(kept.load_json("headline")["sentences"][0]) in text
    assert not list((fresh.folder / "tables").iterdir())


# The rendered book


def _problems(site: Path) -> list[str]:
    """What the check finds, but for links to the notebook that only the tests' repository has."""
    found = check_site(site, REPOSITORY, ADDRESS)
    return [line for line in found if "notebooks/01_first.py of" not in line]


def test_the_book_is_sound(site: Path) -> None:
    assert _problems(site) == []


def test_the_same_figure_stands_on_both_profiles_pages(site: Path) -> None:
    for name in ("tiny", "smollm2-135m"):
        html = (site / name / "01_first.html").read_text()
        assert f'id="curve-{name}"' in html
        assert 'alt="A line that rises from left to right."' in html
        assert "A heading of the cell</h2>" in html.replace('<a class="headerlink"', "</h2>")
        assert "after the heading" in html
        assert "small.csv" in html and "01_first.ipynb" in html
        folded = re.findall(
            r'<details class="admonition hide above-input">.*?</details>', html, re.DOTALL
        )
        assert any("import" in part and "save_table" in part for part in folded)
        assert "Provenance" in html


def test_downloads_are_the_run_s_own_files(site: Path) -> None:
    tables = sorted(path for path in site.rglob("small.csv"))
    assert tables and {path.read_text() for path in tables} == {"x,y\n1,3.0\n2,4.0\n"}
    page = BeautifulSoup((site / "tiny" / "01_first.html").read_text(), "html.parser")
    # The cell's, the figure's, and the block's.
    assert len(page.select('article a[href$="small.csv"]')) == 3
    notebook = nbformat.read(next(site.rglob("01_first.ipynb")), as_version=4)
    assert pages.unfinished(notebook) == "" and "papermill" not in notebook.metadata
    assert str(Path.home()) not in nbformat.writes(notebook)


def test_figures_and_tables_carry_their_data_and_the_line_that_made_them(site: Path) -> None:
    page = BeautifulSoup((site / "tiny" / "01_first.html").read_text(), "html.parser")
    figure, table = page.select(".source-line")
    lines = (site.parents[1] / "notebooks" / "01_first.py").read_text().splitlines()
    drawn = lines.index("_ = pyplot.plot(table.x, table.y)") + 1
    assert figure.select_one('a[href$="small.csv"]')
    assert f"notebooks/01_first.py, line {drawn} at commit" in figure.get_text()
    link = table.select_one('a[href$="tab-exact.csv"]')
    assert link and (site / "tiny" / str(link["href"])).read_text() == "x\n0.123456789\n"
    assert "0.123" in page.get_text() and "commit" in table.get_text()
    # Committed sources are linked, at the commit; changed ones are named only.
    commit = "0" * 40
    where = Citation(site.parents[1])
    told = where.file("notebooks/01_first.py", commit, 34)
    assert f"({ADDRESS}/blob/{commit}/notebooks/01_first.py#L34)" in told
    told = where.file("notebooks/01_first.py", f"{commit}+changes", 34)
    assert told == "`notebooks/01_first.py, line 34` at commit 00000000 with changes"


def test_data_are_found_by_the_names_that_a_cell_draws() -> None:
    notebook = 'run.save_table("a", x, "")\nrun.save_table("b", y, "")\nother.save("c", z)'
    assert sources.saved_tables(notebook) == {"x": ("a", 1), "y": ("b", 2)}
    assert sources.drawn_tables("z = x + y\nfigures.curve(y[y.arm == 1], z)", notebook) == ["b"]
    assert sources.drawn_tables("z = x + y\nfigures.curve(z)", notebook) == ["a", "b"]
    assert sources.drawn_tables("figures.curve(z)", notebook) == []
    assert sources.saver("phi", REPOSITORY / "notebooks")[0] == "notebooks/03_cooccurrence.py"


def test_pages_say_what_they_are_to_those_who_link_to_them(site: Path) -> None:
    page = BeautifulSoup((site / "index.html").read_text(), "html.parser")
    said = {str(tag.get("property") or tag.get("name")): tag["content"] for tag in page.select(
        "meta[property], meta[name]")}  # fmt: skip
    assert said["og:url"] == "https://someone.example/a-book/index.html"
    assert "features" in said["description"] and said["og:site_name"] == "Meta-SAEs, run again"
    card = said["og:image"].removeprefix("https://someone.example/a-book/")
    assert (site / card).stat().st_size > 10_000
    icon = page.select_one('link[rel="icon"]')
    assert icon and (site / str(icon["href"])).exists()
    assert "@book{metasaebook" in page.get_text()
    assert "CC BY 4.0" in " ".join(tag.get_text() for tag in page.select("footer"))


def test_every_embedded_text_is_listed_with_its_licence(site: Path) -> None:
    page = BeautifulSoup((site / "texts.html").read_text(), "html.parser")
    rows = page.select("#tab-texts tbody tr, table#tab-texts tbody tr")
    assert len({row.get_text() for row in rows}) == len(TEXTS)
    for text in TEXTS.values():
        (row,) = {row for row in rows if text.title in row.get_text()}
        assert (text.licence or "none stated") in row.get_text() and text.credit in row.get_text()
        assert row.select_one(f'a[href="{text.link}"]')


def test_the_citation_is_of_this_version() -> None:
    cited = Citation(REPOSITORY).values
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert cited["version"] == cited["preferred-citation"]["version"] == project["version"]
    assert cited["preferred-citation"]["title"] == cited["title"]
    assert cited["date-released"].year == cited["preferred-citation"]["year"]
    assert f"## {cited['version']}," in (REPOSITORY / "CHANGELOG.md").read_text()


def test_buttons_open_what_is_in_the_repository(site: Path) -> None:
    where = Citation(site.parents[1])
    for name in READS_TABLES:
        assert f"urlpath=lab/tree/notebooks/{name}.py" in where.launch(name)
        assert (REPOSITORY / "notebooks" / f"{name}.py").exists()
    assert where.launch("02_training") == "" == Citation(REPOSITORY).launch("07_scorecard")


def test_what_a_profile_says_is_shown_as_it_stands(site: Path) -> None:
    for page in ("smollm2-135m/index", "smollm2-135m/01_first", "gpt2-large/index"):
        html = (site / f"{page}.html").read_text()
        article = BeautifulSoup(html, "html.parser").select_one("article")
        assert article and " ".join(MARKDOWN.split()) in article.get_text()
        assert ("gpt2" in page) == ("hf:HuggingFaceFW/a_*b*_$x$_<b>" in article.get_text())


def test_no_profile_takes_a_name_that_the_book_or_runs_have(site: Path, tmp_path: Path) -> None:
    root = site.parents[1]
    profiles = {path.stem for path in (root / "profiles").iterdir()}
    folders = (root / "runs", root / "_build" / "site-src", site)
    taken = {path.name for folder in folders for path in folder.iterdir()} - profiles
    values = yaml.safe_load((root / "profiles" / "tiny.yml").read_text())
    others = ["_static", "..", "a/b", "Together", "artefacts", "explorer"]
    for name in [name for name in taken if name[0].isalnum()] + others:
        path = tmp_path / f"{Path(name).name}.yml"
        path.write_text(yaml.safe_dump(values | {"name": name}))
        with pytest.raises(ProfileError, match=r"name (is|must be)"):
            Profile.load(path)


def test_snakemake_takes_any_folder_and_any_name(tmp_path: Path) -> None:
    root = _repository(tmp_path / STRANGE)
    shutil.copytree(REPOSITORY / "workflow", root / "workflow")
    tiny = yaml.safe_load((root / "profiles" / "tiny.yml").read_text())
    (root / "profiles" / "1e3.yml").write_text(yaml.safe_dump(tiny | {"name": "1e3"}))
    (root / ".venv").symlink_to(sys.prefix)
    _, *command = [*build.command(["1e3"], "-[x] 'é'"), "--dry-run"]
    command.insert(0, str(root / ".venv" / "bin" / "python"))
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["tiny", "--output", "a{b}"], "rename it"), (["profiles/tiny.yml"], "give its bare name")],
)
def test_what_snakemake_cannot_take_is_refused_at_once(arguments: list[str], words: str) -> None:
    command = [sys.executable, REPOSITORY / "workflow" / "build.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and words in done.stderr


def test_the_landing_page_speaks_from_the_tables(site: Path) -> None:
    html = (site / "index.html").read_text()
    published = yaml.safe_load((REPOSITORY / "book" / "published.yml").read_text())
    assert "Found on tiny: 3 &lt; 4." in html and "Found on smollm2-135m" in html
    assert f"{published['gpt2-large']['fuzz_delta_pct']['value']}%" in html
    assert "its numbers say nothing" in html
    assert "mean |φ| falls under joint training" in html and "answer.png" in html
    assert "smollm2-135m: inconclusive" in html  # a badge


def test_a_profile_that_was_not_run_says_so(site: Path) -> None:
    html = (site / "gpt2-large" / "index.html").read_text()
    assert "has not been run" in html
    assert "tiny smollm2-135m gpt2-large" in html


def test_equations_need_no_network(site: Path) -> None:
    html = (site / "method.html").read_text()
    assert "mathjax/tex-mml-chtml.js" in html
    assert (site / "mathjax" / "tex-mml-chtml.js").stat().st_size > 1_000_000
    assert (site / "mathjax/output/chtml/fonts/woff-v2/MathJax_Main-Regular.woff").exists()


def test_a_run_without_a_headline_says_so(run: Run) -> None:
    assert "not drawn its conclusions yet" in landing.findings(run, link=True)


def test_a_book_with_a_dead_reference_is_not_rendered(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    (root / "src").mkdir(parents=True)
    for name in ("_config.yml", "CITATION.cff"):
        shutil.copy(REPOSITORY / name, root)
    (root / "src" / "references.bib").write_text("")
    (root / "src" / "_extra").mkdir()
    (root / "src" / "index.md").write_text("# T\n\n{numref}`nowhere`\n")
    (root / "src" / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    with pytest.raises(book.BookError, match="nowhere"):
        book.render(root, root / "src", root)


def test_what_a_reader_would_stumble_over_is_found(harmed: Path) -> None:
    harms = {
        '<a href="gone.html">x</a>': "links to gone.html, which does not exist",
        '<a href="index.html#gone">x</a>': "links to index.html#gone, which has no such place",
        '<a href="../outside.html">x</a>': "links to ../outside.html, outside of the book",
        '<img src="mathjax" alt="a/b.png">': "no description (alt text: a/b.png)",
        '<img src="mathjax">': "no description (alt text: none)",
        "<h4>deep</h4>": "the heading “deep” jumps from level 2 to 4",
        "<h1>again</h1>": "exactly one title",
        "<p>TODO: say more</p>": "a placeholder, TODO",
        "<p>Traceback (most recent call last)</p>": "shows a traceback",
        "<p>see /home/me/runs</p>": "a path of this machine, /home/me/runs",
        '<script src="https://cdn.example/x.js"></script>': "loads https://cdn.example/x.js",
        '<link rel="stylesheet" href="//cdn.example/x.css">': "loads //cdn.example/x.css",
        f'<a href="{ADDRESS}/blob/main/gone.py#L3">x</a>': "links to gone.py of the repository",
        '<a href="https://mybinder.org/v2/gh/a/b/HEAD?urlpath=lab/tree/gone.ipynb">x</a>': (
            "links to gone.ipynb of the repository"
        ),
    }
    (harmed.parent / "outside.html").write_text("")
    page = harmed / "method.html"
    html = page.read_text()
    assert "</article>" in html
    page.write_text(html.replace("</article>", "".join(harms) + "</article>", 1))
    found = _problems(harmed)
    assert all(line.startswith("method.html: ") for line in found)
    for said in harms.values():
        assert any(said in line for line in found), (said, found)
    assert len(found) == len(harms)


def test_styles_that_load_from_the_network_are_found(harmed: Path) -> None:
    (harmed / "_static" / "book.css").write_text('@import url("https://cdn.example/f.css");')
    assert any("book.css" in line for line in check_site(harmed, REPOSITORY))


def _luminance(colour: str) -> float:
    """Relative luminance of WCAG 2 of `#rrggbb`."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("mode", "ground"), [("light", "#ffffff"), ("dark", "#121212")])
def test_our_colours_can_be_read(mode: str, ground: str) -> None:
    css = (REPOSITORY / "book" / "_static" / "book.css").read_text()
    block = css.partition(f'html[data-theme="{mode}"] {{')[2].partition("}")[0]
    colours = dict(
        part.strip().removeprefix("--book-").split(": ") for part in block.split(";") if ":" in part
    )
    grounds = [ground, colours.pop("note"), colours.pop("stripe")]
    for name, colour in colours.items():
        for behind in grounds:
            light, dark = sorted((_luminance(colour), _luminance(behind)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (mode, name, behind)
