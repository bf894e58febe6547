"""Checks on the rendered book: python workflow/check_site.py _build/html

What a reader would stumble over and Sphinx does not see: dead links, pictures without a
description, headings out of order, what the machine left on a page, anything from the network.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag

from citation import Citation

Parse = Callable[[Path], BeautifulSoup]

MAX_PAGE_BYTES = 3 * 2**20
MAX_SITE_BYTES = 10**9  # GitHub Pages takes no more
# Sphinx writes these from scripts; they have no text of ours.
NOT_OURS = {"genindex.html", "search.html", "_static"}
TEXT_FILES = {".html", ".csv", ".json", ".ipynb", ".py", ".svg", ".txt", ".yml", ".md"}
LEFTOVER = re.compile(r"\b(TODO|FIXME|XXX|lorem ipsum)\b", re.IGNORECASE)
FILE_NAME = re.compile(r"[/\\]|\.(png|svg|jpe?g|gif|webp)$", re.IGNORECASE)
REMOTE = re.compile(r"^(?:[a-z]+:)?//", re.IGNORECASE)
CSS_REMOTE = re.compile(r"""(?:@import\s+|url\()\s*["']?(?:https?:)?//[^"')]+""", re.IGNORECASE)
#: Text that corpora, programs or readers wrote, in which a placeholder's word means nothing.
QUOTED = "pre, code, .cell_output, .corpus-text, script, style"


def pages_of(site: Path) -> list[Path]:
    """The pages that hold text of ours."""
    return sorted(
        path for path in site.rglob("*.html") if path.relative_to(site).parts[0] not in NOT_OURS
    )


def check_site(site: Path, repository: Path, address: str = "") -> list[str]:
    """One sentence a problem, each with its page; [] for a sound site.

    repository: its folder here; address: where it is for others, '' if nowhere.
    """
    pages = pages_of(site)
    if not pages:
        return [f"{site.name} holds no pages."]
    parse = cache(_parse)
    found = [
        f"{page.relative_to(site)}: {problem}"
        for page in pages
        for problem in (
            *_page_problems(page, site, parse(page), parse),
            *_repository_links(parse(page), repository, address),
        )
    ]
    machine = _machine_paths(repository)
    total = 0
    for path in sorted(site.rglob("*")):
        if not path.is_file():
            continue
        total += path.stat().st_size
        text = path.read_text(errors="replace") if path.suffix in TEXT_FILES | {".css"} else ""
        name = path.relative_to(site)
        if path.suffix == ".css" and (remote := CSS_REMOTE.search(text)):
            found.append(f"{name}: loads {remote[0]} from the network.")
        if "_static" in name.parts or path.suffix == ".css":
            continue
        if match := machine.search(text):
            found.append(f"{name}: shows a path of this machine, {match[0]}.")
        if "Traceback (most recent call last)" in text:
            found.append(f"{name}: shows a traceback.")
    if total > MAX_SITE_BYTES:
        found.append(f"The site has {total / 1e9:.1f} GB, more than the 1 GB of GitHub Pages.")
    return found


def _page_problems(page: Path, site: Path, soup: BeautifulSoup, parse: Parse) -> Iterator[str]:
    if page.stat().st_size > MAX_PAGE_BYTES:
        yield f"has {page.stat().st_size / 2**20:.1f} MiB, more than 3."
    yield from _remote(soup)
    yield from _links(page, site, soup, parse)
    article = soup.select_one("article") or soup
    for image in article.select("img"):
        alt = str(image.get("alt", "")).strip()
        if not alt or FILE_NAME.search(alt):
            yield f"the image {image.get('src')} has no description (alt text: {alt or 'none'})."
    yield from _headings(article)
    prose = copy.copy(article)
    for quoted in prose.select(QUOTED):
        quoted.extract()
    for match in LEFTOVER.finditer(prose.get_text(" ")):
        yield f"still has a placeholder, {match[0]}."


def _remote(soup: BeautifulSoup) -> Iterator[str]:
    for tag in soup.select("script[src], iframe[src], img[src], source[src], video[src]"):
        if REMOTE.match(str(tag["src"])):
            yield f"loads {tag['src']} from the network."
    for tag in soup.select("link[href]"):
        # A canonical address or a licence names a place and loads nothing.
        if not {"canonical", "license"} & set(tag.get("rel") or []) and REMOTE.match(
            str(tag["href"])
        ):
            yield f"loads {tag['href']} from the network."


def _links(page: Path, site: Path, soup: BeautifulSoup, parse: Parse) -> Iterator[str]:
    targets = [str(tag["href"]) for tag in soup.select("a[href], link[href]")]
    targets += [str(tag["src"]) for tag in soup.select("img[src], script[src]")]
    for target in dict.fromkeys(targets):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc or target in ("", "#"):
            continue
        path = (page.parent / unquote(parts.path)).resolve() if parts.path else page.resolve()
        if not path.exists():
            yield f"links to {target}, which does not exist."
        elif not path.is_relative_to(site.resolve()):
            yield f"links to {target}, outside of the book."
        elif parts.fragment and path.suffix == ".html":
            place = parse(path).find(id=unquote(parts.fragment))
            if place is None:
                yield f"links to {target}, which has no such place."


def _repository_links(soup: BeautifulSoup, repository: Path, address: str) -> Iterator[str]:
    """Links into the repository, and launch buttons for its files, that would find nothing."""
    inside = rf"{re.escape(address)}/(?:blob|tree|raw)/[^/]+/([^?#]+)" if address else r"(?!)"
    launched = r"https://mybinder\.org/.*urlpath=lab/tree/([^&#]+)"
    for tag in soup.select("a[href]"):
        match = re.match(f"{inside}|{launched}", unquote(str(tag["href"])))
        path = match and next(filter(None, match.groups()))
        if path and not (repository / path).exists():
            yield f"links to {path} of the repository, which is not there."


def _headings(article: Tag) -> Iterator[str]:
    tags = article.select("h1, h2, h3, h4, h5, h6")
    levels = [(int(tag.name[1]), tag.get_text(" ", strip=True)) for tag in tags]
    if [level for level, _ in levels].count(1) != 1:
        yield "does not have exactly one title."
    for (before, _), (level, text) in pairwise(levels):
        if level > before + 1:
            yield f"the heading “{text.rstrip('#')}” jumps from level {before} to {level}."


def _machine_paths(repository: Path) -> re.Pattern[str]:
    roots = [r"/(?:root|home|Users|tmp)/\w", re.escape(str(repository.resolve())) + r"(?!\w)"]
    return re.compile(rf"(?<![\w.:~/-])(?:{'|'.join(roots)})[^\s\"'<]*")


def _parse(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    problems = check_site(Path(sys.argv[1]), root, Citation(root).repository)
    print("\n".join(problems) or "The site is sound.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
