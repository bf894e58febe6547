"""Judges: who explains features and answers questions about them, behind one small interface.

Three steps are kept apart: a `Question` renders its prompt, a judge gives a raw answer or None, and
`parse` reads it, strictly: what is not an answer is None, and never right. `AskOnce` keeps every
prompt with its answer, so that nothing is asked twice, also by the next process.

- `LexicalJudge`: no model; an explanation is token statistics. The floor for every other judge.
- `InProcessJudge`: a small transformers model in this process, by log-probabilities.
- `HttpJudge`: any OpenAI-compatible server, such as vLLM with the paper's judge.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import random
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from metasae_lib import embedded
from metasae_lib.contexts import Example
from metasae_lib.errors import MetaSAEError
from metasae_lib.progress import progress

if TYPE_CHECKING:
    import torch

Task = Literal["explain", "fuzzing", "strength", "detection"]
Value = str | int | float | bool
KEY_VARIABLE = "METASAE_JUDGE_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_BODY_LIMIT = 2**20
_EXPLANATION_LIMIT = 400  # characters of an explanation that is one sentence


class JudgeError(MetaSAEError):
    """A judge that cannot be reached, started or afforded."""


# --------------------------------------------------------------------------- questions


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
            f"{label}{_line(example.text)}"
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
    return _line(text + "»" * inside)


def _line(text: str) -> str:
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


# --------------------------------------------------------------------------- lexical


class LexicalJudge:
    """No model: an explanation lists the tokens that a feature is strongest on, with weights.

    The weight of a token is the log-odds of being an example's strongest token against being any
    other token of the examples, smoothed by half a count; only tokens above 0 are kept. A text
    scores the sum of its tokens' weights, and is said to fire above the cut that best separates the
    explainer's examples from the silent ones.
    """

    identity: dict[str, Any] = {"judge": "lexical", "version": 2}  # noqa: RUF012

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """Answers at once, in order."""
        for index, question in enumerate(questions):
            yield index, self._answer(question)

    def _answer(self, question: Question) -> str:
        if question.task == "explain":
            return self._explain(question)
        weights, cut = self._read(question.explanation)
        scores = [_lexical_score(weights, example) for example in question.examples]
        if question.task == "fuzzing":
            return "?" if scores[0] == scores[1] else "AB"[scores[1] > scores[0]]
        if question.task == "strength":
            return f"{10 - 10 * math.exp(-scores[0] / 10):.4f}"
        return "?" if not weights else "yes" if scores[0] > cut else "no"

    def _explain(self, question: Question) -> str:
        peaks = Counter(_word(example.pieces[example.peak]) for example in question.examples)
        others = Counter(
            _word(piece) for example in question.examples for k, piece in enumerate(example.pieces)
            if k != example.peak
        )  # fmt: skip
        others += Counter(_word(piece) for example in question.against for piece in example.pieces)
        odds = {
            word: math.log((count + 0.5) / (len(question.examples) + 1))
            - math.log((others[word] + 0.5) / (others.total() + 1))
            for word, count in peaks.items()
        }
        weights = {word: round(odds[word], 2) for word in sorted(odds, key=lambda w: (-odds[w], w))}
        weights = {word: weight for word, weight in weights.items() if word and weight > 0}
        fires = [_lexical_score(weights, example) for example in question.examples]
        silent = [_lexical_score(weights, example) for example in question.against]
        cuts = sorted({*fires, *silent})[:-1] or [0.0]

        def balanced(cut: float) -> float:
            hit = sum(score > cut for score in fires) / max(len(fires), 1)
            return hit + sum(score <= cut for score in silent) / max(len(silent), 1)

        return json.dumps({"tokens": weights, "cut": max(cuts, key=balanced)}, ensure_ascii=False)

    @staticmethod
    def _read(explanation: str) -> tuple[dict[str, float], float]:
        try:
            content = json.loads(explanation)
            return dict(content["tokens"]), float(content["cut"])
        except (ValueError, KeyError, TypeError):
            words = re.findall(r"\w+", explanation.lower())  # a sentence: each of its words
            return {word: 1.0 for word in words}, 0.0


def _word(piece: str) -> str:
    return piece.strip().lower()


def _lexical_score(weights: Mapping[str, float], example: Example) -> float:
    return math.fsum(weights.get(_word(piece), 0.0) for piece in example.pieces)


# --------------------------------------------------------------------------- in-process


class InProcessJudge:
    """A small transformers model in this process, asked by the log-probability of its options.

    The options of a question are its texts x, and the evidence for one under an explanation e is
    how much the explanation helps to predict it: log p(x | e) - log p(x), in nats. The difference
    takes out how fluent a text is, which would betray a replaced token by itself. Fuzzing: the text
    with more evidence. Detection: evidence above 0. Strength: evidence through a logistic curve.
    Nothing is parsed or sampled. (A 135M model asked to *say* A or B always says A.)

    source: as `model.source` of a profile.
    """

    def __init__(self, source: str = "embedded:smollm2-135m", batch_tokens: int = 4096) -> None:
        self._source, self._batch_tokens = source, batch_tokens
        name = source.removeprefix("embedded:")
        known = embedded.conversion_name(name) if name != source else source
        self.identity = {"judge": "in-process", "model": known, "version": 2}
        self._plain: dict[tuple[str, str], float] = {}

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """Answers block by block, so that a killed run keeps what it had."""
        for start in range(0, len(questions), _BLOCK_QUESTIONS):
            block = questions[start : start + _BLOCK_QUESTIONS]
            explain = [k for k, q in enumerate(block) if q.task == "explain"]
            texts = self._generate([block[k].messages for k in explain])
            yield from ((start + k, text) for k, text in zip(explain, texts, strict=True))
            rest = [k for k, q in enumerate(block) if q.task != "explain"]
            evidence = self._evidence(
                {(block[k].explanation, e.text) for k in rest for e in block[k].examples}
            )
            for k in rest:
                values = [evidence[block[k].explanation, e.text] for e in block[k].examples]
                yield start + k, _choice(block[k].task, values)

    @cached_property
    def model(self) -> Any:
        """The language model, loaded on first use, on a GPU where there is one."""
        import torch
        from transformers import AutoModelForCausalLM

        with embedded.quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(
                embedded.snapshot(self._source), dtype=torch.bfloat16
            )
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(embedded.snapshot(self._source))

    def _evidence(self, pairs: set[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """log p(text | explanation) - log p(text) of (explanation, text) pairs."""
        new = {("", text) for _, text in pairs} - self._plain.keys()
        scores = self._log_likelihoods(sorted(pairs | new))
        # The same segments come up under many features, so what they are worth alone is kept.
        self._plain |= {pair: scores[pair] for pair in new}
        scores |= self._plain
        return {pair: round(scores[pair] - scores["", pair[1]], 3) for pair in pairs}

    def _log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """log p(text | explanation) in nats; what prompts and texts begin with in common is read
        once."""
        groups: dict[str, list[tuple[list[int], str]]] = {}
        for explanation, text in pairs:
            groups.setdefault(explanation, []).append((self._ids(f" {_line(text)}"), text))
        rows: list[_Tree] = []
        for explanation, texts in groups.items():
            prompt = self._ids(f"Words to look for: {explanation or 'any text'}.\nText:")
            tree = _Tree(explanation, prompt)
            for ids, text in sorted(texts):
                if len(tree) + len(ids) > _ROW_TOKENS and tree.paths:
                    rows.append(tree)
                    tree = _Tree(explanation, prompt)
                tree.add(text, ids)
            rows.append(tree)
        rows.sort(key=len)
        scores: dict[tuple[str, str], float] = {}
        while rows:
            batch = max(1, self._batch_tokens // len(rows[-1]))
            part, rows = rows[-batch:], rows[:-batch]  # rows of similar length, the longest first
            scores |= self._score(part)
        return scores

    def _score(self, rows: Sequence[_Tree]) -> dict[tuple[str, str], float]:
        import torch

        length = max(map(len, rows))
        device = self.model.device
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        positions = torch.zeros_like(ids)
        # A token sees itself and what its own path holds; padding sees itself.
        sees = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
        for r, row in enumerate(rows):
            ids[r, : len(row)] = torch.tensor(row.ids)
            positions[r, : len(row)] = torch.tensor(row.depths)
            seen = sees[r].numpy()
            for token, parent in enumerate(row.parents[1:], 1):
                seen[token] |= seen[parent]
        mask = torch.zeros(sees.shape, dtype=self.model.dtype)
        mask.masked_fill_(~sees, torch.finfo(mask.dtype).min)
        read = [(r, k) for r, row in enumerate(rows) for k in range(row.prompt, len(row))]
        before = [rows[r].parents[k] for r, k in read]
        targets = torch.tensor([rows[r].ids[k] for r, k in read], device=device)
        with torch.no_grad():
            hidden = self.model.model(
                input_ids=ids.to(device), attention_mask=mask[:, None].to(device),
                position_ids=positions.to(device), use_cache=False,
            ).last_hidden_state[[r for r, _ in read], before]  # fmt: skip
            parts = zip(hidden.split(_LOGITS_AT_ONCE), targets.split(_LOGITS_AT_ONCE), strict=True)
            logp = torch.cat([self._log_p(h, t) for h, t in parts]).cpu().double().numpy()
        scores, start = {}, 0
        for row in rows:
            for text, path in row.paths:
                scores[row.explanation, text] = float(logp[[start + k for k in path]].sum())
            start += len(row) - row.prompt
        return scores

    def _log_p(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.lm_head(hidden).float()
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    def _generate(self, chats: Sequence[list[dict[str, str]]]) -> list[str]:
        """Greedy answers to chats, in the model's own form."""
        import torch

        tokenizer = self.tokenizer
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        texts = []
        for start in range(0, len(chats), _GENERATED_AT_ONCE):
            written = [
                tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                for chat in chats[start : start + _GENERATED_AT_ONCE]
            ]
            given = tokenizer(written, return_tensors="pt", padding=True, add_special_tokens=False)
            with torch.no_grad():
                out = self.model.generate(
                    **given.to(self.model.device), do_sample=False, max_new_tokens=24,
                    pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            new = out[:, given["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


_BLOCK_QUESTIONS = 2048
_GENERATED_AT_ONCE = 32
_ROW_TOKENS = 320  # every token of a row is compared with every other
_LOGITS_AT_ONCE = 128


class _Tree:
    """One row of ids: a prompt, and texts that continue it, what they begin with in common once.

    parents, depths: of each token, the token before it in its text, and how many stand before.
    paths: of each text, its tokens as places after the prompt.
    """

    def __init__(self, explanation: str, prompt: Sequence[int]) -> None:
        self.explanation, self.prompt = explanation, len(prompt)
        self.ids, self.parents = list(prompt), list(range(-1, len(prompt) - 1))
        self.depths = list(range(len(prompt)))
        self.paths: list[tuple[str, list[int]]] = []
        self._after: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, text: str, ids: Sequence[int]) -> None:
        """One more text."""
        parent, path = self.prompt - 1, []
        for token in ids:
            place = self._after.setdefault((parent, token), len(self))
            if place == len(self):
                self.ids.append(token)
                self.parents.append(parent)
                self.depths.append(self.depths[parent] + 1)
            path.append(place - self.prompt)
            parent = place
        self.paths.append((text, path))


def _choice(task: Task, evidence: Sequence[float]) -> str:
    """The answer that evidence in nats gives; "?" where it decides nothing."""
    if task == "strength":
        return f"{10 / (1 + math.exp(-max(min(evidence[0], 50), -50))):.6f}"
    first, second = (*evidence, 0.0)[:2]
    if first == second:
        return "?"
    return ("A" if first > second else "B") if task == "fuzzing" else "yes" if first > 0 else "no"


# --------------------------------------------------------------------------- HTTP


class HttpJudge:
    """A model behind an OpenAI-compatible server (`/v1/chat/completions`), at temperature 0.

    parallel: requests under way at once. timeout: seconds for one request as a whole. tries: per
    question, for answers that are broken (a status of 500, no JSON, cut off, too late); after them
    the question has no answer. A refused connection is waited out with growing pauses, and after
    `patience` seconds without any good answer a JudgeError stops all. budget: requests in all,
    repeated ones included; JudgeError when it is spent. What was answered is kept by `AskOnce`.

    A key is read from the environment variable METASAE_JUDGE_KEY, and is sent only over TLS or to
    this machine. Redirects and proxies are not followed.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000/v1",
        model: str = "Qwen/Qwen2.5-72B-Instruct-AWQ",
        parallel: int = 16,
        timeout: float = 120,
        tries: int = 6,
        patience: float = 600,
        budget: int = 1_000_000,
        pause: float = 0.5,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise JudgeError(f"'{url}' is not an http address of a judge, without name or password")
        if min(parallel, tries, budget) < 1 or min(timeout, patience) <= 0:
            raise JudgeError("parallel, tries, budget, timeout and patience must be above 0")
        self._parts, self._model = parts, model
        self._parallel, self._timeout, self._tries = parallel, timeout, tries
        self._patience, self._pause = patience, pause
        self._left = budget
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._last_good = 0.0
        # The address is left out: the same model elsewhere gives the same answers.
        self.identity = {"judge": "http", "model": model, "temperature": 0, "version": 1}
        if os.environ.get(KEY_VARIABLE) and not self._may_send_key:
            raise JudgeError(
                f"{KEY_VARIABLE} is set, but {parts.hostname} is another machine without TLS: "
                f"use https, or unset it"
            )

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """Answers in the order in which they come. Raises JudgeError as the class says."""
        self._stop.clear()
        self._last_good = time.monotonic()
        waiting = iter(enumerate(questions))
        pool = ThreadPoolExecutor(self._parallel, thread_name_prefix="judge")
        running: dict[Future[str | None], int] = {}
        try:
            while True:
                for index, question in islice(waiting, 2 * self._parallel - len(running)):
                    running[pool.submit(self._answer, question)] = index
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, question: Question) -> str | None:
        body = {
            "model": self._model,
            "messages": question.messages,
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "seed": 0,
        }
        tries, pauses = 0, 0
        while tries < self._tries and not self._stop.is_set():
            self._spend()
            try:
                answer = self._request(json.dumps(body).encode(), question.task)
            except ConnectionRefusedError:
                pauses += 1  # a server that starts again: waiting costs nothing
            except _Rejected:
                return None
            except _Refused as error:
                self._stop.set()
                raise JudgeError(str(error)) from None
            except (OSError, http.client.HTTPException, _Broken):
                tries, pauses = tries + 1, pauses + 1
            else:
                self._last_good = time.monotonic()
                return answer
            if time.monotonic() - self._last_good > self._patience:
                self._stop.set()
                raise JudgeError(
                    f"the judge at {self._parts.hostname}:{self._parts.port or ''} gave no answer "
                    f"for {self._patience:.0f} s: start it and run again, what it said is kept"
                )
            # Half of the pause is drawn, so that requests that failed together come back apart.
            pause = min(self._pause * 2 ** min(pauses - 1, 10), 30) * (0.5 + random.random() / 2)
            self._stop.wait(pause)
        return None

    def _spend(self) -> None:
        with self._lock:
            if self._left <= 0:
                self._stop.set()
                raise JudgeError(
                    "the budget of requests is spent: raise it and run again, what was said is kept"
                )
            self._left -= 1

    def _request(self, body: bytes, task: Task) -> str:
        """One request. OSError, HTTPException or _Broken if it gave no whole answer."""
        deadline = time.monotonic() + self._timeout
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert self._parts.hostname is not None
        connection = kind(self._parts.hostname, self._parts.port, timeout=self._timeout)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        key = os.environ.get(KEY_VARIABLE)
        if key and self._may_send_key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            path = f"{self._parts.path.rstrip('/')}/chat/completions"
            connection.request("POST", path, body, headers)
            sock = connection.sock  # getresponse may let go of it, and its timeout is still needed
            response = connection.getresponse()
            received = b""
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or len(received) > _BODY_LIMIT:
                    raise _Broken
                if sock.fileno() >= 0:
                    sock.settimeout(left)  # also a server that sends a byte now and then is late
                part = response.read1(65536)
                if not part:
                    break
                received += part
        finally:
            connection.close()
        if response.status in (400, 413, 422):
            raise _Rejected
        if response.status in (401, 403, 404):
            raise _Refused(
                f"the judge answered {response.status} {response.reason}: check its address, the "
                f"model's name ({self._model}) and {KEY_VARIABLE}"
            )
        if response.status != 200:
            raise _Broken
        return _content(received, task)

    @property
    def _may_send_key(self) -> bool:
        return self._parts.scheme == "https" or self._parts.hostname in _LOOPBACK


class _Broken(Exception):
    """A response that holds no whole answer."""


class _Rejected(Exception):
    """A response that says that this one question cannot be answered, such as a prompt too long."""


class _Refused(Exception):
    """A response that would be the same for every question."""


def _content(received: bytes, task: Task) -> str:
    """The text of a chat completion; _Broken if the body is none, or an explanation was cut off."""
    try:
        choice = json.loads(received)["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _Broken from None
    if not isinstance(content, str) or reason not in ("stop", "length"):
        raise _Broken
    if task == "explain" and reason == "length" and "." not in content:
        return ""  # no whole sentence: an answer, but not an explanation
    return content
