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
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from metasae_lib.interpret.examples import Example
from metasae_lib.study import ArtefactError, MetaSAEError, progress

Task = Literal["explain", "fuzzing", "strength", "detection"]
Value = str | int | float | bool
_EXPLANATION_LIMIT = 400  # characters of an explanation that is one sentence
_UNDECIDED = "?"  # what a judge says that was asked and cannot tell: an answer, if no value
_THOUGHT = r"<{0}(?:seed:)?(?:think(?:ing)?|thought|reasoning)>|\[{0}THINK\]"
_UNREAD: set[tuple[Path, str]] = set()  # what was answered unreadably in this process
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


def after_thinking(answer: str) -> str:
    """What a judge says after its thoughts, without space around it; "" if these do not end.

    Some servers leave out the mark that opens them.
    """
    text = re.split(_THOUGHT.format("/"), answer)[-1].strip()
    return "" if re.match(_THOUGHT.format(""), text) else text


def parse(question: Question, answer: str | None) -> Value | None:
    """The value of a raw answer after its thoughts, or None if it is not one.

    explain: the first sentence. fuzzing: 0 or 1. strength: 0 to 10. detection: True or False.
    Apart from an explanation, the whole answer must be the choice, so that "A strange text" is
    no vote for A.
    """
    text = after_thinking(answer or "")
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


def choice(task: Task, evidence: Sequence[float]) -> str:
    """The answer that evidence for each of the texts gives; "?" where it decides nothing.

    Strength: 5 + 5 x / (1 + |x|), which rises for ever.
    """
    if task == "strength":
        return f"{5 + 5 * evidence[0] / (1 + abs(evidence[0])):.6f}"
    first, second = (*evidence, 0.0)[:2]
    if first == second:
        return _UNDECIDED
    return ("A" if first > second else "B") if task == "fuzzing" else "yes" if first > 0 else "no"


class Judge(Protocol):
    """Answers questions. `identity`: what its answers depend on besides the prompt; JSON."""

    identity: dict[str, Any]

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """(index, raw answer) of every question, in any order, as they come. None: no answer."""
        ...


class AskOnce:
    """A judge whose prompts and answers are kept in a table (SQLite), written as they come.

    A prompt whose answer can be read, or says that the judge cannot tell, is never asked again. One
    that got no answer is asked again next time, and one whose answer cannot be read by the next
    process, as its server may be repaired by then. The table holds: key, task, prompt, answer.
    Raises ArtefactError where it cannot be read or written.
    """

    def __init__(self, judge: Judge, path: str | os.PathLike[str]) -> None:
        self.judge, self._path = judge, Path(path)
        with self._table():
            pass  # known to be in order before anything is asked

    def answers(self, questions: Sequence[Question]) -> list[str | None]:
        """The raw answer to every question, in their order; equal prompts are asked once."""
        name = json.dumps(self.judge.identity, sort_keys=True)
        keys = [
            hashlib.sha256(f"{name}\n{question.task}\n{question.prompt}".encode()).hexdigest()
            for question in questions
        ]
        by_key = dict(zip(keys, questions, strict=True))
        with self._table() as table:
            rows = table.execute(
                "SELECT key, answer FROM answers WHERE key IN (SELECT value FROM json_each(?))",
                [json.dumps(keys)],
            )
            known = {k: a for k, a in rows if _final(by_key[k], a) or (self._path, k) in _UNREAD}
            new = {key: question for key, question in by_key.items() if key not in known}
            order, asked = list(new), list(new.values())
            with progress(len(asked), "questions to the judge") as bar:
                for index, answer in self.judge.ask(asked):
                    bar.update()
                    if answer is not None:
                        known[order[index]] = answer
                        if not _final(asked[index], answer):
                            _UNREAD.add((self._path, order[index]))
                        row = (order[index], asked[index].task, asked[index].prompt, answer)
                        with table:
                            table.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", row)
        return [known.get(key) for key in keys]

    @contextmanager
    def _table(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=60)) as table:
                table.execute("PRAGMA synchronous = NORMAL")
                table.execute("PRAGMA journal_mode = WAL")
                table.execute(
                    "CREATE TABLE IF NOT EXISTS answers"
                    " (key TEXT PRIMARY KEY, task TEXT, prompt TEXT, answer TEXT)"
                )
                yield table
        except sqlite3.DatabaseError as error:
            code = error.sqlite_errorcode & 0xFF
            if code in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise ArtefactError(
                    f"{self._path} is no table of answers ({error}): delete it and run again"
                ) from None
            # On a full disk, what SQLite needs beside the table fails without saying why.
            full = code == sqlite3.SQLITE_FULL or (
                code == sqlite3.SQLITE_IOERR and shutil.disk_usage(self._path.parent).free < 2**20
            )
            cure = "free some space" if full else "keep runs on a disk with write access and locks"
            raise ArtefactError(
                f"{self._path} could not be used ({error}): {cure}, and run again; what it holds "
                f"is kept"
            ) from None


def _final(question: Question, answer: str) -> bool:
    return answer == _UNDECIDED or parse(question, answer) is not None
