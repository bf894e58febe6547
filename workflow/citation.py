"""Who made this, where it is and how it is cited: all of it stands in CITATION.cff alone.

The repository's address is its `repository-code`, the book's own its `url`. Neither has to be
there: what would link to the repository names file and commit instead.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

#: Notebooks that read tables alone, and so open anywhere with what is kept in results/.
READS_TABLES = ("07_scorecard",)
_BINDER = "https://mybinder.org/v2/gh/{}/HEAD?urlpath=lab/tree/{}"


class Citation:
    """What CITATION.cff says."""

    def __init__(self, root: Path) -> None:
        text = (root / "CITATION.cff").read_text(encoding="utf-8")
        self.values: dict[str, Any] = yaml.safe_load(text)
        self.repository = str(self.values.get("repository-code", "")).rstrip("/")
        self.site = str(self.values.get("url", ""))

    def file(self, path: str, commit: str, line: int | None = None) -> str:
        """Markdown that names a file of the repository at a commit, linked where that can be."""
        place = path if line is None else f"{path}, line {line}"
        known = re.fullmatch(r"[0-9a-f]{40}", commit)
        if not (self.repository and known):
            return f"`{place}` at commit {commit[:8]}{'' if known else ' with changes'}"
        anchor = "" if line is None else f"#L{line}"
        return f"[`{place}`]({self.repository}/blob/{commit}/{path}{anchor}) at commit {commit[:8]}"

    def launch(self, notebook: str) -> str:
        """A button that opens a notebook in the browser; '' where that cannot be."""
        owner = self.repository.removeprefix("https://github.com/")
        if notebook not in READS_TABLES or owner in ("", self.repository):
            return ""
        address = _BINDER.format(owner, f"notebooks/{notebook}.py")
        return f"```{{button-link}} {address}\n:color: primary\nTry it in the browser (Binder)\n```"

    def box(self) -> str:
        """How to cite the book and the paper that it runs again, as BibTeX."""
        (paper,) = self.values["references"]
        entries = [
            _bibtex("metasaebook", self.values["preferred-citation"]),
            _bibtex("levinson2026metasaes", paper),
        ]
        return "```bibtex\n" + "\n\n".join(entries) + "\n```"


def _bibtex(key: str, reference: dict[str, Any]) -> str:
    # In braces of its own, a name that is no person's is not taken apart.
    authors = [
        f"{{{a['name']}}}" if "name" in a else f"{a['family-names']}, {a['given-names']}"
        for a in reference["authors"]
    ]
    fields = {"title": f"{{{reference['title']}}}", "author": " and ".join(authors)}
    fields |= {k: reference[k] for k in ("year", "version", "journal", "url") if k in reference}
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@{reference['type']}{{{key},\n{body}\n}}"
