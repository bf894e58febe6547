"""The HTTP judge against a real server on this machine: throughput, and 200 injected faults.

    make bench BENCH=judge   # which also makes .venv-serve, an environment that can serve

Starts `transformers serve` with the embedded SmolLM2-135M-Instruct on loopback and measures

- requests a second of `HttpJudge` with its table of answers, beside those of a bare client with as
  many connections, which is the server's own limit. Goal: within 15%. Closes with a line `ratio:`;
- a proxy before the server that injects faults (hang, 500, cut-off, garbage), and a restart of the
  server in the middle. Goal: no question lost, none asked twice, none read from a broken answer.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from metasae_lib.interpret.examples import Example
from metasae_lib.interpret.judges.http import HttpJudge
from metasae_lib.interpret.judges.questions import AskOnce, Question
from metasae_lib.subject import embedded

HOST = "127.0.0.1"
KINDS = ("500", "cut", "garbage")


class Serving:
    """`transformers serve` as a process of our own, which is ended with us."""

    def __init__(self, python: str, model: str, port: int) -> None:
        self.port = port
        code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
        self._command = [python, "-c", code, "serve", model, "--host", HOST, "--port", str(port)]

    def start(self, wait: float = 180) -> None:
        """Start the server and wait until it answers."""
        # It answers requests side by side, and more threads than one each fight for the cores.
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.5)
        self.stop()
        sys.exit("transformers serve did not start: does its environment have fastapi and uvicorn?")

    def stop(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()


class FaultyProxy:
    """Forwards to the server, after `per_prompt` faults for every prompt."""

    def __init__(self, upstream: int, per_prompt: int) -> None:
        self.attempts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.good: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._end = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                proxy.handle(self, upstream, per_prompt)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def handle(self, request: BaseHTTPRequestHandler, upstream: int, per_prompt: int) -> None:
        """One request: a fault, or the server's own answer."""
        body = request.rfile.read(int(request.headers["Content-Length"]))
        prompt = json.loads(body)["messages"][0]["content"]
        with self._lock:
            attempt = self.attempts[prompt]
            self.attempts[prompt] += 1
            # Hanging costs a whole timeout each: the first attempt of every fourth question.
            order = list(self.attempts).index(prompt)
            kind = "hang" if attempt == 0 and order % 4 == 0 else KINDS[(attempt + order) % 3]
            kind = kind if attempt < per_prompt else ""
            self.faults[kind] += bool(kind)
        if kind == "hang":
            self._end.wait(30)
            return
        status, answer = (200, b"<html>Yes</html>") if kind else forward(upstream, body)
        request.send_response(500 if kind == "500" else status)
        request.send_header("Content-Length", str(len(answer) + (100 if kind == "cut" else 0)))
        request.end_headers()
        request.wfile.write(answer)
        if status == 200 and not kind:
            with self._lock:
                self.good[prompt] += 1

    def close(self) -> None:
        """Stop serving."""
        self._end.set()
        self._server.shutdown()


def forward(port: int, body: bytes) -> tuple[int, bytes]:
    """One request to the server itself; 502 where it is not there."""
    try:
        connection = http.client.HTTPConnection(HOST, port, timeout=120)
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 502, b""


def questions(count: int, first: int) -> list[Question]:
    """Detection questions, no two alike."""
    made = []
    for k in range(first, first + count):
        words = f" the river rose {k} feet after two days of rain and the town was cut off".split(
            " "
        )
        pieces = tuple(f" {word}" for word in words[1:])
        example = Example(tuple(range(len(pieces))), pieces, (0.0,) * len(pieces), k)
        made.append(Question("detection", "rivers and water", (example,)))
    return made


def bare(port: int, model: str, asked: Sequence[Question], parallel: int) -> float:
    """Requests a second of plain connections: nothing is checked, kept or repeated."""
    bodies = [
        json.dumps(
            {
                "model": model, "messages": [{"role": "user", "content": q.prompt}],
                "max_tokens": q.max_tokens, "temperature": 0, "seed": 0,
            }
        ).encode()
        for q in asked
    ]  # fmt: skip
    started = time.monotonic()
    with ThreadPoolExecutor(parallel) as pool:
        statuses = [status for status, _ in pool.map(lambda body: forward(port, body), bodies)]
    if set(statuses) != {200}:
        sys.exit(f"the server answered {sorted(set(statuses))} to a bare client")
    return len(asked) / (time.monotonic() - started)


def ours(port: int, model: str, asked: Sequence[Question], parallel: int) -> float:
    """Requests a second of `HttpJudge` with its table of answers."""
    judge = HttpJudge(f"http://{HOST}:{port}/v1", model, parallel)
    dict(judge.ask(questions(1, 2 * 10**6)))  # the first goes alone: a long asking does not feel it
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        answers = AskOnce(judge, Path(folder) / "a.sqlite").answers(asked)
        seconds = time.monotonic() - started
    if None in answers:
        sys.exit(f"{answers.count(None)} of {len(asked)} questions got no answer")
    return len(asked) / seconds


def throughput(serving: Serving, model: str, count: int, parallel: int, rounds: int) -> float:
    """Ours over the bare client's: short turns, each first as often, as a machine's load drifts."""
    seconds = {bare: 0.0, ours: 0.0}
    bare(serving.port, model, questions(4, 10**6), parallel)  # warm
    for turn in range(2 * rounds):
        client = (bare, ours, ours, bare)[turn % 4]
        rate = client(serving.port, model, questions(count, turn * count), parallel)
        seconds[client] += count / rate
        print(f"{parallel} parallel, {client.__name__}: {rate:.2f} requests/s", flush=True)
    return seconds[bare] / seconds[ours]


def faults(serving: Serving, model: str, count: int, per_prompt: int) -> None:
    """Every question fails `per_prompt` times, and the server is restarted in the middle."""
    proxy = FaultyProxy(serving.port, per_prompt)
    asked = questions(count, 10**7)
    judge = HttpJudge(
        f"http://{HOST}:{proxy.port}/v1", model, parallel=4, timeout=20, tries=per_prompt + 12
    )
    with tempfile.TemporaryDirectory() as folder:
        once = AskOnce(judge, Path(folder) / "a.sqlite")
        results: list[list[str | None]] = []
        asking = threading.Thread(target=lambda: results.append(once.answers(asked)))
        asking.start()
        while proxy.good.total() < count // 3 and asking.is_alive():
            time.sleep(0.05)
        serving.stop()
        serving.start()
        asking.join()
    proxy.close()
    answers = results[0]
    twice = sum(n > 1 for n in proxy.good.values())
    broken = sum(answer is not None and "html" in answer for answer in answers)
    print(
        f"{proxy.faults.total()} faults ({dict(proxy.faults)}) and a restart: "
        f"{answers.count(None)} questions lost, {twice} asked twice, {broken} read from a broken "
        f"answer, of {count}"
    )


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=".venv-serve/bin/python", help="of what can serve")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--requests", type=int, default=8, help="in a turn")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each")
    parser.add_argument("--parallel", type=int, default=4)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server ends with us
    model = embedded.snapshot("embedded:smollm2-135m")
    serving = Serving(options.python, model, options.port)
    serving.start()
    try:
        ratio = throughput(serving, model, options.requests, options.parallel, options.rounds)
        faults(serving, model, count=40, per_prompt=5)
        print(f"ratio: {ratio:.2f}")
    finally:
        serving.stop()


if __name__ == "__main__":
    main()
