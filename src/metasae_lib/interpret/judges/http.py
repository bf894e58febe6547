"""A judge behind an OpenAI-compatible server, such as vLLM with the paper's judge."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx2  # what openai speaks HTTP with
import openai

from metasae_lib.interpret.judges.questions import JudgeError, Question, after_thinking, one_line
from metasae_lib.study.errors import first_line
from metasae_lib.study.sections import server_address

KEY_VARIABLE = "METASAE_JUDGE_KEY"
_BODY_LIMIT = 2**20
_THINKING = 2048  # tokens for the thoughts of a judge that has them
_NEWER_LIMIT = "max_completion_tokens"
_MESSAGES = ("error", "message", "detail", "msg")  # where servers say what is wrong
_NO_WAY = (socket.gaierror, ssl.SSLError)  # no such host, or none that speaks TLS as it should


class HttpJudge:
    """A model behind an OpenAI-compatible server (`/v1/chat/completions`), at temperature 0.

    parallel: requests under way at once. timeout: seconds for one request as a whole. tries: per
    question, for answers that are broken (a status of 500, no JSON, cut off, too late); after them
    the question has no answer. A refused connection, or a server that says "later" (429, or still
    loading), is waited out without using up tries, and after `patience` seconds without any good
    answer a JudgeError stops all. budget: requests in all, repeated ones included; JudgeError when
    it is spent. What was answered is kept by `AskOnce`.

    The first question goes alone. It shows whether the judge thinks before it answers, and needs
    room for that. If it fails, a short one of our own shows whether any would be answered: if not,
    a JudgeError holds the server's words. Later failures are counted in a warning, with its words.

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
        try:
            self.url = urlsplit(server_address(url))
        except ValueError:
            raise JudgeError(
                "the judge's address cannot be asked: give http(s)://host[:port]/path without "
                "name, password or query"
            ) from None
        if min(parallel, tries, budget) < 1 or min(timeout, patience) <= 0:
            raise JudgeError("parallel, tries, budget, timeout and patience must be above 0")
        _authorization(self.url)
        self.model, self.parallel = model, parallel
        self.budget, self.requests = budget, itertools.count(1)
        self.proven = False  # whether the server has shown that it answers
        self.words = self._lost = ""  # what it said of the last failure, and of one for good
        self._timeout, self._tries, self._patience = timeout, tries, patience
        self._room, self._limit = 0, "max_tokens"
        # The address is left out: the same model elsewhere gives the same answers.
        self.identity = {"judge": "http", "model": model, "temperature": 0, "version": 1}

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """Answers in the order in which they come. Raises JudgeError as the class says."""
        waiting, last_good, lost = iter(enumerate(questions)), time.monotonic(), 0
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
                most = 2 * self.parallel if self.proven else 1
                for index, question in itertools.islice(waiting, most - len(running)):
                    running[pool.submit(self._answer, client, question)] = index
                if not running:
                    break
                done, _ = wait(running, self._patience, FIRST_COMPLETED)
                for future in done:
                    if (answer := future.result()) is None:
                        lost += 1
                    else:
                        last_good = time.monotonic()
                    yield running.pop(future), answer
                if time.monotonic() - last_good > self._patience:
                    raise JudgeError(
                        f"the judge at {self.url.netloc} gave no answer for {self._patience:.0f} s "
                        f"({self.words}): start it and run again, what it said is kept"
                    )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
        if lost:
            warnings.warn(
                f"the judge did not answer {lost} of {len(questions)} questions; the last "
                f"because: {self._lost}",
                stacklevel=2,
            )

    def _answer(self, client: openai.OpenAI, question: Question) -> str | None:
        try:
            choice = self._choice(client, question.messages, question.max_tokens)
            if not self.proven and choice.finish_reason == "length":
                choice = self._with_room(client, question, choice)
            answer = self._read(question, choice)
        except openai.APIError:  # the tries are spent, or this one question cannot be answered
            answer, self._lost = None, self.words
            if not self.proven:
                self._ask_shortly(client)
        self.proven = True
        return answer

    def _ask_shortly(self, client: openai.OpenAI) -> None:
        try:
            self._choice(client, [{"role": "user", "content": "Answer yes."}], 8)
        except openai.APIError:
            raise JudgeError(
                f"the judge at {self.url.netloc} answers nothing ({self.words}): see to what it "
                f"says and run again"
            ) from None

    def _choice(self, client: openai.OpenAI, messages: Any, tokens: int) -> Any:
        """What is said in at most so many tokens; newer servers have another name for these."""
        limit: Any = {self._limit: tokens + self._room}
        try:
            return client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, seed=0, **limit
            ).choices[0]
        except openai.BadRequestError:
            if self._limit == _NEWER_LIMIT or _NEWER_LIMIT not in self.words:
                raise
        self._limit = _NEWER_LIMIT
        return self._choice(client, messages, tokens)

    def _with_room(self, client: openai.OpenAI, question: Question, short: Any) -> Any:
        """A first answer that was cut off, again: with room, if it is thoughts that need it."""
        self._room, long = _THINKING, short
        with suppress(openai.APIError):  # once: a slow server goes on with what nobody waits for
            once = client.with_options(max_retries=0)
            long = self._choice(once, question.messages, question.max_tokens)
        said = (long.message.content or "").strip()
        if short.message.content and said == after_thinking(said):
            self._room = 0
            return short  # it is only long-winded
        if self._read(question, long) is None:
            raise JudgeError(f"the judge at {self.url.netloc} does not answer: {self._lost}")
        return long

    def _read(self, question: Question, choice: Any) -> str | None:
        text = _clean(choice.message.content or "")
        said, cut_off = after_thinking(text), choice.finish_reason == "length"
        if cut_off and not said:
            self._lost = (
                "it was cut off in its thoughts; choose a model that answers at once, or serve it "
                'with thinking off (the chat_template_kwargs {"enable_thinking": false})'
            )
            return None
        # No whole sentence is an answer, but not an explanation.
        return "" if question.task == "explain" and cut_off and "." not in said else text


class _Later(httpx2.ConnectError):
    """A server that is there, but not ready. `pause`: seconds that it asks for, 0 for none."""

    pause = 0.0


class _Line(httpx2.HTTPTransport):
    """The way of one asking to the server, under the client, which repeats what fails here.

    Each request is counted, waits while the server is away or not ready, and brings a whole answer
    or an error. It has headers of its own, not those that the OPENAI_... variables name; so the key
    is in no request that an error of the client holds.
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
            except httpx2.TransportError as error:
                self._judge.words = first_line(error)
                if not isinstance(error, httpx2.ConnectError):
                    raise
                root: BaseException = error
                while inner := root.__cause__ or root.__context__:
                    root = inner
                if isinstance(root, _NO_WAY) and not self._judge.proven:
                    raise JudgeError(
                        f"the judge at {self._judge.url.netloc} cannot be reached "
                        f"({self._judge.words}): check its name, and whether it is http or https"
                    ) from None
                # A server that starts again is waited for: that costs no try.
                if self._closed.wait(getattr(error, "pause", 0) or pause):
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
        status, judge = response.status_code, self._judge
        body = self._without_key(body)
        if status == 200:
            if not _is_answer(body):
                raise httpx2.RemoteProtocolError(f"no answer, but: {_words(body)}")
        else:
            judge.words = f"{status} {httpx2.codes.get_reason_phrase(status)}: {_words(body)}"
        asked_for = response.headers.get("Retry-After", "")
        if status == 429 or (status in (502, 503) and (asked_for or not judge.proven)):
            later = _Later(judge.words)
            later.pause = float(asked_for) if asked_for.isdecimal() else 0.0
            raise later
        # The client repeats 408, 409 and 5xx. 400, 413 and 422 are about one question.
        if status not in (200, 400, 408, 409, 413, 422) and status < 500:
            raise JudgeError(
                f"the judge at {judge.url.netloc} answered {judge.words}: check its address, the "
                f"model's name ({judge.model}) and {KEY_VARIABLE}"
            )
        return httpx2.Response(status, headers={"Content-Type": "application/json"}, content=body)

    def _without_key(self, body: bytes) -> bytes:
        """What a server sent, which may repeat what it got. A short key is a word, no secret."""
        key = self._headers.get("Authorization", "").removeprefix("Bearer ").encode()
        return body.replace(key, b"(the key)") if len(key) > 7 else body

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
        message = choice["message"]
        content = message.get("content")
        thoughts = bool(message.get("reasoning_content") or message.get("reasoning"))
        ended = choice.get("finish_reason") not in ("abort", "error", "content_filter")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
    return ended and (isinstance(content, str) or (content is None and thoughts))


def _words(body: bytes) -> str:
    """What a server says of a fault, on one line: its JSON's innermost message, or the text."""
    said: Any = body.decode(errors="replace")
    with suppress(ValueError, RecursionError):
        said = json.loads(said)
    while isinstance(said, dict | list):
        inner = [said[key] for key in _MESSAGES if key in said] if isinstance(said, dict) else said
        said = inner[0] if inner else json.dumps(said)
    return one_line(re.sub("<[^>]*>", " ", _clean(str(said))))[:300] or "it gave no reason"


def _clean(text: str) -> str:
    """Without half characters, for which UTF-8 has no bytes, and NUL, which ends text elsewhere."""
    return re.sub(r"[\0\ud800-\udfff]", "\ufffd", text)
