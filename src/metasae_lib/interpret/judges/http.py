"""A judge behind an OpenAI-compatible server, such as vLLM with the paper's judge."""

from __future__ import annotations

import itertools
import json
import os
import re
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from urllib.parse import SplitResult, urlsplit

import httpx2  # what openai speaks HTTP with
import openai

from metasae_lib.interpret.judges.questions import JudgeError, Question

KEY_VARIABLE = "METASAE_JUDGE_KEY"
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
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise JudgeError(f"'{url}' is not an http address of a judge, without name or password")
        if min(parallel, tries, budget) < 1 or min(timeout, patience) <= 0:
            raise JudgeError("parallel, tries, budget, timeout and patience must be above 0")
        _authorization(parts)
        self.url, self.model, self.parallel = parts, model, parallel
        self.budget, self.requests = budget, itertools.count(1)
        self._timeout, self._tries, self._patience = timeout, tries, patience
        # The address is left out: the same model elsewhere gives the same answers.
        self.identity = {"judge": "http", "model": model, "temperature": 0, "version": 1}

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """Answers in the order in which they come. Raises JudgeError as the class says."""
        waiting, last_good = iter(enumerate(questions)), time.monotonic()
        pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="judge")
        running: dict[Future[str | None], int] = {}
        client = openai.OpenAI(
            base_url=self.url.geturl(),
            api_key="the line has it",
            timeout=self._timeout,
            max_retries=self._tries - 1,
            http_client=httpx2.Client(transport=_Line(self), trust_env=False),
        )
        try:
            while True:
                for index, question in itertools.islice(waiting, 2 * self.parallel - len(running)):
                    running[pool.submit(self._answer, client, question)] = index
                if not running:
                    return
                done, _ = wait(running, self._patience, FIRST_COMPLETED)
                for future in done:
                    if (answer := future.result()) is not None:
                        last_good = time.monotonic()
                    yield running.pop(future), answer
                if time.monotonic() - last_good > self._patience:
                    raise JudgeError(
                        f"the judge at {self.url.hostname}:{self.url.port or ''} gave no answer "
                        f"for {self._patience:.0f} s: start it and run again, what it said is kept"
                    )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()

    def _answer(self, client: openai.OpenAI, question: Question) -> str | None:
        try:
            choice = client.chat.completions.create(
                model=self.model,
                messages=question.messages,  # type: ignore[arg-type]
                max_tokens=question.max_tokens,
                temperature=0,
                seed=0,
            ).choices[0]
        except openai.APIError:
            return None  # the tries are spent, or this one question cannot be answered
        text = choice.message.content or ""
        cut_off = choice.finish_reason == "length" and "." not in text
        # No whole sentence is an answer, but not an explanation.
        return "" if question.task == "explain" and cut_off else text


class _Line(httpx2.HTTPTransport):
    """The way of one asking to the server, under the client, which repeats what fails here.

    Each request is counted, waits while no connection can be had, and brings a whole answer or an
    error. It has headers of its own, not those that the OPENAI_... variables name; so the key is
    in no request that an error of the client holds.
    """

    def __init__(self, judge: HttpJudge) -> None:
        limits = httpx2.Limits(max_connections=judge.parallel)
        super().__init__(ssl.create_default_context(), trust_env=False, limits=limits)
        self._judge, self._closed = judge, threading.Event()
        self._headers = {"Content-Type": "application/json"} | _authorization(judge.url)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        sent = httpx2.Request("POST", request.url, headers=self._headers, content=request.content)
        sent.extensions = request.extensions
        pause = 0.5
        while True:
            if next(self._judge.requests) > self._judge.budget:
                raise JudgeError(
                    "the budget of requests is spent: raise it and run again, what was said is kept"
                )
            try:
                return self._whole(sent)
            except httpx2.ConnectError:
                # A server that starts again is waited for: that costs no try.
                if self._closed.wait(pause):
                    raise
                pause = min(2 * pause, 30)

    def _whole(self, sent: httpx2.Request) -> httpx2.Response:
        """The response with its body, which is an answer if the status is 200, within its time.

        A timeout of the client is for each read: who sends a byte now and then is never late.
        """
        deadline, body = time.monotonic() + sent.extensions["timeout"]["read"], b""
        with closing(super().handle_request(sent)) as response:
            for part in response.iter_raw():
                body += part
                if time.monotonic() > deadline or len(body) > _BODY_LIMIT:
                    raise httpx2.ReadTimeout("the body is late, or too long")
        status, headers = response.status_code, response.headers
        if status == 200 and not _is_answer(body):
            raise httpx2.RemoteProtocolError("the body is no answer")
        # The client repeats 408, 409, 429 and 5xx. 400, 413 and 422 are about one question.
        if status not in (200, 400, 408, 409, 413, 422, 429) and status < 500:
            raise JudgeError(
                f"the judge answered {status} {response.reason_phrase}: check its address, the "
                f"model's name ({self._judge.model}) and {KEY_VARIABLE}"
            )
        asked_for = headers.get("Retry-After", "")
        if asked_for.isdecimal():  # the client would give up on a pause of more than two minutes
            headers["Retry-After"] = str(min(int(asked_for), 120))
        return httpx2.Response(
            status, headers=headers, content=body, extensions=response.extensions
        )

    def close(self) -> None:
        self._closed.set()
        super().close()


def _authorization(parts: SplitResult) -> dict[str, str]:
    """The header with the key, if there is one; JudgeError where it must not or cannot be sent."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        return {}
    if not re.fullmatch(r"[!-~]+", key):
        raise JudgeError(f"{KEY_VARIABLE} holds what no key can hold: set it again, or unset it")
    if parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise JudgeError(
            f"{KEY_VARIABLE} is set, but {parts.hostname} is another machine without TLS: "
            f"use https, or unset it"
        )
    return {"Authorization": f"Bearer {key}"}


def _is_answer(body: bytes) -> bool:
    """Whether the body of a response is a chat completion that has come to an end."""
    try:
        choice = json.loads(body)["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    return isinstance(content, str) and reason in ("stop", "length")
