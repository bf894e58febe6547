"""Questions, the answers that count, and the table that keeps them.

Three steps are kept apart: a `Question` renders its prompt, a judge gives a raw answer or None, and
`parse` reads it, strictly: what is not an answer is None, and never right. `AskOnce` keeps every
prompt with its answer, so that nothing is asked twice, also by the next process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from metasae_lib.interpret.examples import Example
from metasae_lib.study.errors import MetaSAEError
from metasae_lib.study.progress import progress

Task = Literal["explain", "fuzzing", "strength", "detection"]
Value = str | int | float | bool
_EXPLANATION_LIMIT = 400  # characters of an explanation that is one sentence


class JudgeError(MetaSAEError):
    """A judge that cannot be reached, started or afforded."""


@dataclass(frozen=True)
class Question:
    """One thing to ask about one feature.

    - `explain`: what do the examples have in common? The feature is silent in those of `against`.
    - `fuzzing`: two examples; in one the strongest tokens were replaced. Which is real, 0 or 1?
    - `strength`: one example; how strong is the feature there, 0 to 10?
    - `detection`: one example; does the feature fire there?
    """

    task: Task
    explanation: str
    examples: tuple[Example, ...]
    against: tuple[Example, ...] = ()

    @property
    def prompt(self) -> str:
        """The question in words."""
        if self.task == "explain":
            texts = "\n".join(f"- {marked(example)}" for example in self.examples)
            return (
                "Here are pieces of text. In each, the words between « and » share something.\n"
                f"{texts}\nIn one short sentence: what do the marked words have in common?"
            )
        texts = "\n".join(
            f"{label}{one_line(example.text)}"
            for label, example in zip(self._labels, self.examples, strict=True)
        )
        about = f"A pattern in text: {self.explanation or 'unknown'}\n"
        if self.task == "fuzzing":
            return (
                f"{about}Both texts showed this pattern. In one of them the words that showed it "
                f"were replaced by random ones.\n{texts}\n"
                "Which text is real, A or B? Answer with one letter."
            )
        if self.task == "strength":
            return (
                f"{about}{texts}\nHow strongly does the text show the pattern, from 0 (not at all) "
                "to 10 (as strongly as can be)? Answer with one number."
            )
        return f"{about}{texts}\nDoes the text show the pattern? Answer yes or no."

    @property
    def _labels(self) -> tuple[str, ...]:
        return ("A: ", "B: ") if self.task == "fuzzing" else ("Text: ",)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as a chat."""
        return [{"role": "user", "content": self.prompt}]

    @property
    def max_tokens(self) -> int:
        """Length of an answer."""
        return 60 if self.task == "explain" else 8


def marked(example: Example) -> str:
    """An example on one line, the tokens at half of its strength or more between « and »."""
    text, inside = "", False
    for piece, act in zip(example.pieces, example.acts, strict=True):
        strong = example.strength > 0 and act >= example.strength / 2
        if strong and not inside:
            space = len(piece) - len(piece.lstrip())
            text += piece[:space] + "«" + piece[space:]
        elif inside and not strong:
            text += "»" + piece
        else:
            text += piece
        inside = strong
    return one_line(text + "»" * inside)


def one_line(text: str) -> str:
    return " ".join(text.split())


def parse(question: Question, answer: str | None) -> Value | None:
    """The value of a raw answer, or None if it is not one.

    explain: the first sentence. fuzzing: 0 or 1. strength: 0 to 10. detection: True or False.
    Apart from an explanation, the whole answer must be the choice, so that "A strange text" is
    no vote for A.
    """
    if answer is None:
        return None
    text = answer.strip()
    if question.task == "explain":
        line = text.splitlines()[0].strip() if text else ""
        return line if 0 < len(line) <= _EXPLANATION_LIMIT else None
    found = re.fullmatch(
        r"(?:answer|text)?\W*?(-?\w+(?:\.\d+)?)\W*", text, re.IGNORECASE | re.ASCII
    )
    word = found.group(1).lower() if found else ""
    if question.task == "fuzzing":
        return {"a": 0, "b": 1}.get(word)
    if question.task == "detection":
        return {"yes": True, "no": False}.get(word)
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", word) and 0 <= float(word) <= 10:
        return float(word)
    return None


class Judge(Protocol):
    """Answers questions. `identity`: what its answers depend on besides the prompt; JSON."""

    identity: dict[str, Any]

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """(index, raw answer) of every question, in any order, as they come. None: no answer."""
        ...


class AskOnce:
    """A judge whose prompts and answers are kept in a table (SQLite), written as they come.

    A prompt that has an answer is never asked again, whatever the answer; one that got none is
    asked again next time. The table holds: key, task, prompt, answer.
    """

    def __init__(self, judge: Judge, path: str | os.PathLike[str]) -> None:
        self.judge = judge
        self._path = Path(path)
        self._name = json.dumps(judge.identity, sort_keys=True)
        with closing(self._open()) as table, table:
            table.execute("PRAGMA journal_mode = WAL")
            table.execute(
                "CREATE TABLE IF NOT EXISTS answers"
                " (key TEXT PRIMARY KEY, task TEXT, prompt TEXT, answer TEXT)"
            )

    def answers(self, questions: Sequence[Question]) -> list[str | None]:
        """The raw answer to every question, in their order; equal prompts are asked once."""
        keys = [self._key(question) for question in questions]
        with closing(self._open()) as table:
            known = self._known(table, keys)
            new = {k: q for k, q in zip(keys, questions, strict=True) if k not in known}
            order, asked = list(new), list(new.values())
            with progress(len(asked), "questions to the judge") as bar:
                for index, answer in self.judge.ask(asked):
                    bar.update()
                    if answer is not None:
                        known[order[index]] = answer
                        row = (order[index], asked[index].task, asked[index].prompt, answer)
                        with table:
                            table.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", row)
        return [known.get(key) for key in keys]

    def __len__(self) -> int:
        """Answers kept."""
        with closing(self._open()) as table:
            return int(table.execute("SELECT count(*) FROM answers").fetchone()[0])

    def _known(self, table: sqlite3.Connection, keys: Iterable[str]) -> dict[str, str]:
        known: dict[str, str] = {}
        remaining = iter(dict.fromkeys(keys))
        while block := list(islice(remaining, 500)):
            marks = ",".join("?" * len(block))
            known |= table.execute(
                f"SELECT key, answer FROM answers WHERE key IN ({marks})", block
            ).fetchall()
        return known

    def _key(self, question: Question) -> str:
        return hashlib.sha256(
            f"{self._name}\n{question.task}\n{question.prompt}".encode()
        ).hexdigest()

    def _open(self) -> sqlite3.Connection:
        try:
            table = sqlite3.connect(self._path, timeout=60)
            table.execute("PRAGMA synchronous = NORMAL")
            return table
        except sqlite3.DatabaseError as error:
            raise JudgeError(
                f"{self._path} is no table of answers ({error}): delete it and run again"
            ) from None
