"""A judge behind an OpenAI-compatible server, such as vLLM with the paper's judge."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from urllib.parse import urlsplit

from metasae_lib.interpret.judges.questions import JudgeError, Question, Task

KEY_VARIABLE = "METASAE_JUDGE_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_BODY_LIMIT = 2**20


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
