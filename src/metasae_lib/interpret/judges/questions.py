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
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from metasae_lib.interpret.examples import Example
from metasae_lib.study import MetaSAEError, progress

Task = Literal["explain", "fuzzing", "strength", "detection"]
Value = str | int | float | bool
_EXPLANATION_LIMIT = 400  # characters of an explanation that is one sentence
_ASKED = {  # what stands before and after the texts of a question
    "fuzzing": (
        "Both texts showed this pattern. In one of them the words that showed it were replaced by "
        "random ones.\n",
        "Which text is real, A or B? Answer with one letter.",
    ),
    "strength": (
        "",
        "How strongly does the text show the pattern, from 0 (not at all) to 10 (as strongly as "
        "can be)? Answer with one number.",
    ),
    "detection": ("", "Does the text show the pattern? Answer yes or no."),
}


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
        labels = ("A", "B") if self.task == "fuzzing" else ("Text",)
        texts = "\n".join(
            f"{label}: {one_line(example.text)}"
            for label, example in zip(labels, self.examples, strict=True)
        )
        before, after = _ASKED[self.task]
        about = f"A pattern in text: {self.explanation or 'unknown'}\n"
        return f"{about}{before}{texts}\n{after}"

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
        space = len(piece) - len(piece.lstrip()) if strong else 0
        mark = "" if strong == inside else "«" if strong else "»"
        text += piece[:space] + mark + piece[space:]
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
    text = (answer or "").strip()
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
    number = float(word) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", word) else -1
    return number if 0 <= number <= 10 else None


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
        self.judge, self._path = judge, Path(path)
        self._open().close()

    def answers(self, questions: Sequence[Question]) -> list[str | None]:
        """The raw answer to every question, in their order; equal prompts are asked once."""
        name = json.dumps(self.judge.identity, sort_keys=True)
        keys = [
            hashlib.sha256(f"{name}\n{question.task}\n{question.prompt}".encode()).hexdigest()
            for question in questions
        ]
        with closing(self._open()) as table:
            known: dict[str, str] = dict(
                table.execute(
                    "SELECT key, answer FROM answers WHERE key IN (SELECT value FROM json_each(?))",
                    [json.dumps(keys)],
                )
            )
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

    def _open(self) -> sqlite3.Connection:
        try:
            table = sqlite3.connect(self._path, timeout=60)
            table.execute("PRAGMA synchronous = NORMAL")
            table.execute("PRAGMA journal_mode = WAL")
            table.execute(
                "CREATE TABLE IF NOT EXISTS answers"
                " (key TEXT PRIMARY KEY, task TEXT, prompt TEXT, answer TEXT)"
            )
            return table
        except sqlite3.DatabaseError as error:
            raise JudgeError(
                f"{self._path} is no table of answers ({error}): delete it and run again"
            ) from None
