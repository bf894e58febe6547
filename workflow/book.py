"""From finished runs to the rendered book: python workflow/book.py tiny smollm2-135m

Stages prose, generated pieces and one page a notebook and profile in `_build/site-src`, lets
Jupyter Book render them into `_build/html`, and checks what came out. Nothing is executed here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_markdown_cell

import announced
import discussion
import landing
import toc
import together
from check_site import check_site
from citation import Citation
from landing import toy
from metasae_lib import Profile, Run
from metasae_lib.show import tables
from metasae_lib.show.text import literal
from metasae_lib.study.errors import MetaSAEError
from metasae_lib.study.kept import KeptRun, kept_runs
from metasae_lib.study.known import TEXTS, WHEELS
from pages import (
    ANSI,
    LINES_SHOWN,
    PageError,
    headings,
    labels,
    link_files,
    make_page,
    tables_used,
    without_machine,
)
from sources import add_sources

REPOSITORY = Path(__file__).resolve().parents[1]
# One file with TeX input and HTML output; its fonts are looked for beside it.
MATHJAX_PACKAGE = "sphinx-mathjax-offline"
MATHJAX_FILES = ["tex-mml-chtml.js", "output/chtml/fonts/woff-v2"]
PAPER = "gpt2-large"  # the profile of the paper's own model
_REFERENCES = '<div role="list" class='


class BookError(Exception):
    """A book that cannot be made; the sentence says why."""


def stage(root: Path, profiles: Sequence[str], runs_dir: Path, staging: Path) -> None:
    """Write every source of the site under `staging`, from nothing.

    `root` holds book/, notebooks/ and profiles/. PageError or BookError for what must not be shown.
    """
    where = Citation(root)
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(root / "book", staging, ignore=shutil.ignore_patterns("explorer"))
    _copy_mathjax(staging / "_extra" / "mathjax")
    generated = staging / "generated"
    generated.mkdir()
    notebooks = toc.notebooks(root / "notebooks")
    runs = {name: Run.open(_profile(root, name), runs_dir) for name in profiles}
    kept = {run.name: run for run in kept_runs(root / "results")}
    pages = {name: toc.pages_of(run.profile, notebooks) for name, run in runs.items()}
    for name, run in runs.items():
        _stage_run(run, pages[name], root / "notebooks", staging / name, kept.get(run.name), where)
    known = sorted(path.stem for path in (root / "profiles").glob("*.yml"))
    # A toy that was not run is nothing that a reader misses.
    others = [name for name in known if name not in runs and not toy(name)]
    for name in others:
        (staging / name).mkdir()
        (staging / name / "index.md").write_text(
            _not_run_page(_profile(root, name), profiles, kept.get(name)), encoding="utf-8"
        )
    published = yaml.safe_load((root / "book" / "published.yml").read_text(encoding="utf-8"))
    (generated / "workflow.svg").write_text(toc.workflow_svg(notebooks), encoding="utf-8")
    # A fresh run stands for the kept one of its profile; of others, what is kept is shown.
    shown = runs | {name: kept[name] for name in others if name in kept}
    announcement = yaml.safe_load((root / "book" / "claims.yml").read_text(encoding="utf-8"))
    judging = {name: _profile(root, name) for name in announcement["runs"]}
    made = announced.made(judging, kept | runs)
    said = announced.page(announcement, judging, kept | runs, where)
    (generated / "announced.md").write_text(said + "\n", encoding="utf-8")
    said = discussion.page(announcement, judging, kept | runs, _profile(root, PAPER))
    (generated / "discussion.md").write_text(said + "\n", encoding="utf-8")
    # What is claimed of language models, a world of known atoms cannot answer. Runs that were
    # announced stand first, as they were.
    first = [*filter(shown.__contains__, made), *shown]
    shown = {name: shown[name] for name in first if not shown[name].profile.synthetic}
    silent = announced.answered_for(announcement, made)
    landing.write(published, shown, generated, where, silent)
    (generated / "texts.md").write_text(_texts(), encoding="utf-8")
    claims = together.write(shown, staging, root / "notebooks", where, silent)
    table = toc.contents(pages, others, claims)
    (staging / "_toc.yml").write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")


def render(root: Path, staging: Path, output: Path) -> None:
    """Let Jupyter Book make `output/_build/html` from the staged sources; warnings are errors."""
    staging, output = staging.resolve(), output.resolve()
    settings = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    # A card needs the book's address, and is drawn for nobody without it.
    address = Citation(root).site
    cards = {"enable": bool(address), "image_mini": "_static/favicon.png"}
    settings["sphinx"]["config"] |= {"ogp_site_url": address, "ogp_social_cards": cards}
    (staging / "_config.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    shutil.rmtree(output / "_build" / "html", ignore_errors=True)
    command = [
        str(Path(sys.executable).with_name("jupyter-book")), "build", str(staging), "--all", "-W",
        "-n", "--keep-going", "--quiet", "--config", str(staging / "_config.yml"),
        "--toc", str(staging / "_toc.yml"), "--path-output", str(output),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    log = output / "_build" / "site.log"
    text = ANSI.sub("", done.stdout + done.stderr).replace(str(staging) + os.sep, "")
    log.write_text(text, encoding="utf-8")
    if done.returncode:
        lines = re.findall(r"^.*(?:WARNING|ERROR|CRITICAL|Extension error).*$", text, re.M)
        shown = "\n".join(lines or text.splitlines()[:LINES_SHOWN])
        raise BookError(f"{shown}\nThe book was not rendered; the log is {os.path.relpath(log)}.")
    site = output / "_build" / "html"
    for source_map in site.rglob("*.map"):  # 3 MB for the authors of the theme's scripts
        source_map.unlink()
    # docutils calls its references a list, of entries that are no items of one.
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        if _REFERENCES in text:
            page.write_text(text.replace(_REFERENCES, "<div class="), encoding="utf-8")


def _stage_run(
    run: Run,
    notebooks: Sequence[str],
    sources: Path,
    folder: Path,
    kept: KeptRun | None,
    where: Citation,
) -> None:
    (folder / "executed").mkdir(parents=True)
    executed = {}
    for name in notebooks:
        path = run.folder / "notebooks" / f"{name}.ipynb"
        if not path.exists():
            raise PageError(f"{name} has not been run for {run.name}: make book runs it.")
        executed[name] = nbformat.read(path, as_version=4)
    known = {label for notebook in executed.values() for label in labels(notebook)}
    for name, notebook in executed.items():
        try:
            page = make_page(notebook, run.profile.name, known)
            made_at = notebook.metadata.get("commit", "unknown")
            add_sources(page, sources / f"{name}.py", folder, made_at, where)
            titles = [title.lower() for _, title in headings(page)]
            # A notebook ends with these itself; one that forgot them gets them here.
            if "provenance" not in titles:
                text = tables.provenance(run).data
                page.cells.append(new_markdown_cell(f"## Provenance\n\n{text}"))
            if "downloads" not in titles:
                text = tables.downloads(run, *filter(run.has_table, tables_used(notebook))).data
                page.cells.append(new_markdown_cell(f"## Downloads\n\n{text}"))
            page.cells.append(new_markdown_cell(_notebook_links(name)))
            _add_banner(page, run.profile, where.launch(name))
            link_files(page, run.folder, folder)
        except PageError as error:
            raise PageError(f"{name} of {run.name}: {error}") from error
        nbformat.write(page, folder / f"{name}.ipynb")
        nbformat.write(without_machine(notebook), folder / "executed" / f"{name}.ipynb")
        shutil.copyfile(sources / f"{name}.py", folder / "executed" / f"{name}.py")
    (folder / "index.md").write_text(_run_page(run, executed, kept), encoding="utf-8")
    explorer = run.folder / "explorer"  # finished pages: Sphinx copies them as they are
    if explorer.is_dir():
        shutil.copytree(explorer, folder.parent / "_extra" / "explorer" / run.profile.name)


def _add_banner(page: nbformat.NotebookNode, profile: Profile, launch: str) -> None:
    """Say under the title which run the page shows, and where it can be tried."""
    first = page.cells[0] if page.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        raise PageError("it does not begin with a '# ' title.")
    title, _, rest = first.source.partition("\n")
    about = f"Profile [{profile.name}](index.md): {literal(profile.about)}"
    banner = f"```{{div}} run-banner\n{about}\n```\n"
    first.source = f"{title}\n\n{banner}{_small_run(profile)}\n{launch}\n{rest}"


def _small_run(profile: Profile) -> str:
    if not toy(profile.name):
        return ""
    return (
        "\n:::{warning}\nThis is a toy profile: it shows that every step works, in minutes."
        " Its numbers say nothing about the paper.\n:::\n"
    )


def _run_page(run: Run, executed: Mapping[str, nbformat.NotebookNode], kept: KeptRun | None) -> str:
    profile = run.profile
    titles = {name: next(iter(headings(notebook)))[1] for name, notebook in executed.items()}
    listed = "\n".join(f"- [{title}]({name}.ipynb)" for name, title in titles.items())
    return (
        f"# About {profile.name}\n\n{literal(profile.about)}\n{_small_run(profile)}\n"
        f"## What we find\n\n{landing.findings(run, link=False)}\n\n"
        f"{landing.agreement_sentence(run, kept)}\n\n"
        f"## The pages of this run\n\n{listed}\n\n## Settings\n\n{_settings(profile)}\n"
    )


def _not_run_page(profile: Profile, built: Sequence[str], kept: KeptRun | None) -> str:
    command = f'make book PROFILES="{" ".join([*built, profile.name])}"'
    shown = ", so nothing is shown for it.\n:::\n"
    if kept is not None:
        shown = (
            "; what is shown of it is kept from an earlier run, in `results/`.\n:::\n\n"
            f"## What we find\n\n{landing.findings(kept, link=False)}\n"
        )
    return (
        f"# About {profile.name}\n\n{literal(profile.about)}\n\n"
        f":::{{note}}\nThis profile has not been run for this book{shown}"
        f"\n## How to run it\n\n```bash\n{command}\n```\n\n"
        f"What that costs, before anything is spent: `make plan PROFILE={profile.name}`.\n\n"
        f"## Settings\n\n{_settings(profile)}\n"
    )


def _settings(profile: Profile) -> str:
    """The numbers a reader asks for first as a numbered table, then the whole profile, folded."""
    training, sizes = profile.training, profile.dictionary
    roles = ", ".join(f"{role} {tokens:,}" for role, tokens in profile.text.roles.items())
    subject = {
        "Language model": f"{literal(profile.model.source)}, layer {profile.model.layer},"
        f" {profile.model.dtype}, weights {profile.model.weights.replace('_', ' ')}",
        "Text": f"{literal(profile.text.source)}, rows of {profile.text.context_length} tokens",
        "Tokens by role": roles,
    }
    if profile.synthetic:
        subject = {"World of known atoms": literal(profile.model.source)}
    rows = subject | {
        "Primary dictionary": f"$n$ = {sizes.n_features:,}, $k$ = {sizes.k}",
        "Meta dictionary": f"$m$ = {sizes.n_meta_features:,}, $k$ = {sizes.meta_k}",
        "Trained on": f"{training.train_tokens:,} tokens in batches of {training.batch_tokens:,},"
        f" Adam at {training.learning_rate:g}",
        "Grid": f"$\\lambda_2$ in {training.lambda2}, $\\sigma^2$ in {training.sigma_sq}",
        "Seeds": ", ".join(map(str, training.seeds)),
    }
    written = yaml.safe_dump(
        profile.model_dump(exclude={"about"}), sort_keys=False, allow_unicode=True
    )
    return (
        _table(f"Settings of {profile.name}", f"settings-{profile.name}", rows)
        + f"\n:::{{dropdown}} The whole profile\n```yaml\n{written}```\n:::\n"
    )


def _texts() -> str:
    """The embedded texts: what each is, whose, and how it may be used."""
    lines = [["Text", "By", "Licence of the text", "Read from"], ["---"] * 4]
    lines += [
        [f"[{text.title}]({text.link})", text.credit,
         f"[{text.licence}]({text.terms})" if text.licence else "none stated",
         f"[{package} {WHEELS[package].version}](https://pypi.org/project/{package}/)"]
        for package, text in TEXTS.items()
    ]  # fmt: skip
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f":::{{table}} The embedded texts\n:name: tab-texts\n\n{body}\n:::\n"


def _table(caption: str, name: str, rows: Mapping[str, str]) -> str:
    body = "\n".join(f"* - {key}\n  - {value}" for key, value in rows.items())
    return f"```{{list-table}} {caption}\n:name: {name}\n:stub-columns: 1\n\n{body}\n```\n"


def _notebook_links(name: str) -> str:
    return (
        f"The notebook: {{download}}`as executed <executed/{name}.ipynb>`,"
        f" {{download}}`its source <executed/{name}.py>`."
    )


def _copy_mathjax(folder: Path) -> None:
    spec = importlib.util.find_spec(MATHJAX_PACKAGE)
    if spec is None or spec.origin is None:
        raise BookError(f"The package {MATHJAX_PACKAGE} is missing: make book installs it.")
    source = Path(spec.origin).parent / "static" / "mathjax"
    for name in MATHJAX_FILES:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target)
        else:
            shutil.copyfile(source / name, target)


def _profile(root: Path, name: str) -> Profile:
    return Profile.load(root / "profiles" / f"{name}.yml")


def main() -> int:
    parser = argparse.ArgumentParser(description="Render the book from finished runs.")
    parser.add_argument("profiles", nargs="+")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=Path(), help="where _build is made")
    arguments = parser.parse_args()
    staging = arguments.output / "_build" / "site-src"
    try:
        print("book: pages", flush=True)
        stage(REPOSITORY, arguments.profiles, arguments.runs, staging)
        print("book: rendering", flush=True)
        render(REPOSITORY, staging, arguments.output)
    except (BookError, PageError, MetaSAEError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    repository = Citation(REPOSITORY).repository
    problems = check_site(arguments.output / "_build" / "html", REPOSITORY, repository)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
