"""Judges: strict parsing, nothing asked twice, a real HTTP server that fails in every way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import BOS, byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from metasae_lib.interpret.examples import Example
from metasae_lib.interpret.judges import http
from metasae_lib.interpret.judges import questions as questions_module
from metasae_lib.interpret.judges.http import HttpJudge
from metasae_lib.interpret.judges.in_process import InProcessJudge
from metasae_lib.interpret.judges.lexical import LexicalJudge
from metasae_lib.interpret.judges.questions import AskOnce, JudgeError, Question, marked, parse
from metasae_lib.study import ArtefactError, Profile, ProfileError


def example(text: str, acts: Sequence[float] | None = None) -> Example:
    pieces = tuple(f" {word}" for word in text.split())
    return Example(tuple(range(len(pieces))), pieces, tuple(acts or [0.0] * len(pieces)), 0)


def detection(number: int) -> Question:
    return Question("detection", "numbers", (example(f"text number {number}"),))


# --------------------------------------------------------------------------- questions


@pytest.mark.parametrize(
    ("task", "answer", "value"),
    [
        ("fuzzing", "A", 0),
        ("fuzzing", " b.\n", 1),
        ("fuzzing", "Answer: B", 1),
        ("fuzzing", "Text A", 0),
        ("fuzzing", "**A**", 0),
        ("fuzzing", "A strange text", None),
        ("fuzzing", "A or B", None),
        ("fuzzing", "C", None),
        ("fuzzing", "", None),
        ("detection", "Yes", True),
        ("detection", "no!", False),
        ("detection", "No, it does", None),
        ("detection", "not", None),
        ("strength", "7", 7.0),
        ("strength", "7.5.", 7.5),
        ("strength", "Answer: 10", 10.0),
        ("strength", "11", None),
        ("strength", "-3", None),
        ("strength", "7 of 10", None),
        ("strength", "nan", None),
        ("strength", "٣", None),
        ("explain", "Words about rain.\nMore.", "Words about rain."),
        ("explain", "  ", None),
        ("explain", "x" * 401, None),
        ("explain", "<think>\nRain? Or.\n</think>\n\nWords about rain.", "Words about rain."),
        ("explain", "<think>\nRain? Or. Let me see", None),
        ("explain", "Words such as <think> in code.", "Words such as <think> in code."),
        ("fuzzing", "so it is A</thinking>B", 1),
        ("fuzzing", "<thought>A</thought><thought>B</thought> A", 0),
        ("fuzzing", "[THINK]A[/THINK]B", 1),
        ("fuzzing", "<think>A</think><think>A", None),
        ("strength", "<think></think>7", 7.0),
        ("detection", "<seed:think>no</seed:think>\nyes", True),
    ],
)
def test_parse_takes_the_answer_and_nothing_else(task: Any, answer: str, value: Any) -> None:
    found = parse(Question(task, "", ()), answer)
    assert found == value and type(found) is type(value)
    assert parse(Question(task, "", ()), None) is None


def test_prompts_say_what_is_asked() -> None:
    texts = example("one two"), example("three four")
    assert "A: one two\nB: three four\n" in Question("fuzzing", "numbers", texts).prompt
    assert "Text: one two" in Question("strength", "numbers", texts[:1]).prompt
    assert "unknown" in Question("detection", "", texts[:1]).prompt
    prompt = Question("explain", "", (example("it was too hot", [0, 0, 4, 2.5]),)).prompt
    assert "- it was «too hot»" in prompt


def test_marked_marks_half_of_the_strength() -> None:
    assert marked(example("a b c d", [1, 2, 0, 4])) == "a «b» c «d»"
    assert marked(example("a b")) == "a b"


# --------------------------------------------------------------------------- asking once


def kept(path: Path) -> list[tuple[str, str, str]]:
    """Task, prompt and answer of what a table holds."""
    with closing(sqlite3.connect(path)) as table:
        return table.execute("SELECT task, prompt, answer FROM answers").fetchall()


def number(prompt: str) -> int:
    """Which question it is; 0 for one that the judge asks on its own."""
    return int((*re.findall(r"text number (\d+)", prompt), 0)[0])


def counted(prompt: str) -> str:
    """An answer like no other question's."""
    return "yes" + "!" * number(prompt)


class Counting:
    """Answers as `counted`, except None for what is in `silent`; stops after `limit` answers."""

    def __init__(self, limit: int = 10**9) -> None:
        self.identity: dict[str, Any] = {"judge": "counting"}
        self.asked: Counter[str] = Counter()
        self.silent: set[str] = set()
        self.limit = limit

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        for index in reversed(range(len(questions))):
            if self.asked.total() == self.limit:
                raise KeyboardInterrupt
            prompt = questions[index].prompt
            self.asked[prompt] += 1
            yield index, None if prompt in self.silent else counted(prompt)


def test_a_killed_asking_goes_on_without_asking_twice(tmp_path: Path) -> None:
    questions = [detection(k) for k in range(50)]
    judge = Counting(limit=20)
    with pytest.raises(KeyboardInterrupt):
        AskOnce(judge, tmp_path / "answers.sqlite").answers(questions)
    judge.limit = 10**9
    again = AskOnce(judge, tmp_path / "answers.sqlite")
    assert len(kept(tmp_path / "answers.sqlite")) == 20
    answers = again.answers([*questions, *questions[:5]])  # a prompt that comes twice, too
    assert all(a == counted(q.prompt) for q, a in zip(questions, answers, strict=False))
    assert answers[50:] == answers[:5]
    assert set(judge.asked.values()) == {1}


def test_an_asking_ended_by_sigkill_goes_on_without_asking_twice(tmp_path: Path) -> None:
    questions = [detection(k) for k in range(30)]

    class Deadly(Counting):
        def ask(self, asked: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
            for count, found in enumerate(super().ask(asked)):
                if count == 12:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield found

    child = os.fork()
    if not child:
        try:
            AskOnce(Deadly(), tmp_path / "a.sqlite").answers(questions)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    judge = Counting()
    answers = AskOnce(judge, tmp_path / "a.sqlite").answers(questions)
    assert answers == [counted(q.prompt) for q in questions]
    assert judge.asked.total() == 30 - 12


def test_every_prompt_and_answer_is_in_the_table(tmp_path: Path) -> None:
    AskOnce(Counting(), tmp_path / "a.sqlite").answers([detection(1)])
    prompt = detection(1).prompt
    assert kept(tmp_path / "a.sqlite") == [("detection", prompt, "yes!")]


def test_what_got_no_answer_is_asked_again_next_time(tmp_path: Path) -> None:
    judge = Counting()
    judge.silent = {detection(1).prompt}
    once = AskOnce(judge, tmp_path / "a.sqlite")
    assert once.answers([detection(1)]) == [None]
    judge.silent = set()
    assert once.answers([detection(1)]) != [None]


def test_judges_do_not_share_answers(tmp_path: Path) -> None:
    AskOnce(Counting(), tmp_path / "a.sqlite").answers([detection(1)])
    other = Counting()
    other.identity = {"judge": "another"}
    AskOnce(other, tmp_path / "a.sqlite").answers([detection(1)])
    assert other.asked.total() == 1


def test_a_foreign_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite").write_text("this is no database, and long enough to be seen as such")
    with pytest.raises(ArtefactError, match=r"a\.sqlite is no table of answers"):
        AskOnce(Counting(), tmp_path / "a.sqlite")


def test_an_answer_that_cannot_be_read_is_asked_for_again_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Repaired(Counting):
        says: str | None = "<think>Let me see"

        def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
            return ((index, self.says) for index, _ in super().ask(questions))

    judge, question = Repaired(), detection(1)
    for _ in range(2):  # the second time by another part of the same run
        assert AskOnce(judge, tmp_path / "a.sqlite").answers([question]) == [judge.says]
    assert judge.asked.total() == 1
    for judge.says, asked in (("no idea", 2), ("?", 3), ("yes", 3)):  # "?": it cannot tell
        monkeypatch.setattr(questions_module, "_UNREAD", set())  # as in the next process
        AskOnce(judge, tmp_path / "a.sqlite").answers([question])
        assert judge.asked.total() == asked
    assert [answer for *_, answer in kept(tmp_path / "a.sqlite")] == ["?"]


def test_a_full_disk_under_the_answers_is_named_and_loses_nothing(small_disk: Path) -> None:
    questions = [
        Question("detection", "x" * 4000, (example(f"text number {k}"),)) for k in range(9)
    ]
    once, judge = AskOnce(Counting(), small_disk / "a.sqlite"), Counting()
    with pytest.raises(ArtefactError, match=r"full.*: free some space, and run again"):
        once.answers(questions)
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert AskOnce(judge, small_disk / "a.sqlite").answers(questions) == [
        counted(q.prompt) for q in questions
    ]
    assert 0 < judge.asked.total() < 9  # the others were kept
    filler, free = small_disk / "filler", shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(free - 28 * 1024))  # enough for a table, and not for what goes with it
    with pytest.raises(ArtefactError, match=r"I/O.*: free some space, and run again"):
        AskOnce(judge, small_disk / "b.sqlite")
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(ArtefactError, match="a disk with write access and locks, and run again"):
        AskOnce(judge, small_disk / "a.sqlite")


# --------------------------------------------------------------------------- lexical


def test_the_lexical_explanation_by_hand() -> None:
    firing = tuple(example(f"so {word} x", [0, 3, 1]) for word in ("too", "too", "also"))
    silent = tuple(example("so it goes") for _ in range(3))
    question = Question("explain", "", firing, silent)
    ((_, answer),) = LexicalJudge().ask([question])
    assert answer is not None
    explanation = json.loads(answer)
    # too: (2 + ½) / (3 + 1) peaks, (0 + ½) / (15 + 1) elsewhere; x and so are never a peak.
    assert explanation["tokens"] == {"too": 3.0, "also": 2.48}
    assert explanation["cut"] == 0.0


# --------------------------------------------------------------------------- in-process


@pytest.fixture(scope="module")
def small_judge(tmp_path_factory: pytest.TempPathFactory) -> InProcessJudge:
    """A random Llama of 2 layers in float32 with a vocabulary of words."""
    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "Words", "to", "look", "for", ":", "any", "text", ".", "Text", "red", "green"]
    words += [f"w{i}" for i in range(20)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    judge = InProcessJudge(f"folder:{folder}", batch_tokens=100)
    judge.model.float()
    return judge


def test_packed_likelihoods_equal_one_text_at_a_time(small_judge: InProcessJudge) -> None:
    texts = [" ".join(f"w{(k * i) % 20}" for i in range(1, 4 + k)) for k in range(9)]
    pairs = [(e, t) for e in ("red", "green red", "") for t in texts]
    found = small_judge._log_likelihoods(sorted(pairs))
    for explanation, text in pairs:
        prompt = small_judge._prompt(explanation or "any text")
        ids = torch.tensor([prompt + small_judge._ids(text)])
        with torch.no_grad():
            logp = small_judge.model(ids).logits[0].log_softmax(-1)
        alone = sum(float(logp[i - 1, ids[0, i]]) for i in range(len(prompt), ids.shape[1]))
        assert found[explanation, text] == pytest.approx(alone, abs=1e-3)


def test_prompts_are_in_the_form_that_the_model_was_trained_on(tmp_path: Path) -> None:
    """A chat model's own template, in which the text is the answer; another's own start token."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "plain")
    judge = InProcessJudge(f"folder:{tmp_path / 'plain'}")
    # One that starts texts by itself, as Llama's and Gemma's do.
    starting = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.backend_tokenizer.post_processor = starting
    tokenizer.save_pretrained(tmp_path / "starting")
    started = InProcessJudge(f"folder:{tmp_path / 'starting'}")
    assert started._prompt("red") == [BOS, *judge._prompt("red")]
    assert BOS not in started._ids("a text")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    chat = InProcessJudge(f"folder:{tmp_path / 'chat'}")
    said = chat.tokenizer.decode(chat._prompt("red"))
    assert said.startswith("[user]") and "red" in said and said.endswith("[assistant]")


def test_answers_are_kept_by_what_the_judge_is(tmp_path: Path, small_judge: InProcessJudge) -> None:
    """Replaced weights in the same folder are another judge."""
    copy = tmp_path / "copy"
    shutil.copytree(small_judge._source.removeprefix("folder:"), copy)
    same = InProcessJudge(f"folder:{copy}").identity
    assert same == small_judge.identity
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert InProcessJudge(f"folder:{copy}").identity != same


def test_the_in_process_judge_needs_no_parsing_and_has_no_order(
    small_judge: InProcessJudge,
) -> None:
    a, b = example("w1 w2 w3"), example("w4 w5 w6")
    questions = [
        Question("fuzzing", "red", (a, b)),
        Question("fuzzing", "red", (b, a)),
        Question("strength", "red", (a,)),
        Question("detection", "red", (a,)),
        Question("detection", "red", (b,)),
        Question("fuzzing", "", (a, b)),
        Question("detection", "", (a,)),
    ]
    raw = dict(small_judge.ask(questions))
    values = [parse(q, raw[k]) for k, q in enumerate(questions)]
    assert {values[0], values[1]} == {0, 1}
    assert isinstance(values[2], float) and isinstance(values[3], bool)
    assert (values[2] > 5) is values[3]
    assert values[5:] == [None, None]  # an empty explanation is evidence for nothing
    assert dict(small_judge.ask(questions)) == raw
    turned = dict(small_judge.ask(questions[::-1]))
    assert [turned[6 - k] for k in range(7)] == [raw[k] for k in range(7)]


# --------------------------------------------------------------------------- HTTP


class Server:
    """An OpenAI-compatible server on loopback. `fault(prompt, attempt)` names a way to fail."""

    def __init__(self, port: int = 0) -> None:
        self.attempts: Counter[str] = Counter()
        self.good: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.sends: dict[str, str] = {}
        self.asked: list[dict[str, Any]] = []
        self.says = b""  # the body of a fault
        self.parted: dict[str, str | None] = {}  # of the message, beside or instead of its content
        self.faults: Counter[str] = Counter()
        self.most = self.active = 0
        self.delay = 0.0
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.start(port)

    def start(self, port: int) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.handle(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, prompt: str, attempt: int) -> str:
        return ""

    def said(self, prompt: str) -> tuple[str, str]:
        """Content and finish reason of a good answer."""
        return ("yes" if number(prompt) % 2 else "no"), "stop"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.lock:
            self.attempts[prompt] += 1
            self.headers.append(dict(request.headers))
            self.asked.append(body)
            self.active += 1
            self.most = max(self.most, self.active)
            fault = self.fault(prompt, self.attempts[prompt])
            self.faults[fault] += 1
        time.sleep(self.delay)
        with self.lock:
            self.active -= 1  # before the answer, after which the client may ask at once
        with suppress(OSError):  # the client has gone
            self.respond(request, prompt, fault)

    def respond(self, request: BaseHTTPRequestHandler, prompt: str, fault: str) -> None:
        content, reason = self.said(prompt)
        message = {"role": "assistant", "content": content} | self.parted
        answer = json.dumps({"choices": [{"message": message, "finish_reason": reason}]}).encode()
        status = 200
        if fault == "hang":
            self.released.wait(20)
            return
        if fault.isdecimal():
            # The body says the opposite of the truth: nobody may read it.
            status = int(fault)
        if fault in ("500", "429"):
            answer = answer.replace(b"yes", b"YES!").replace(b"no", b"yes").replace(b"YES!", b"no")
        if fault and self.says:
            answer = self.says
        if fault == "garbage":
            answer = b"<html>yes</html>"
        if fault == "shape":
            answer = b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}'
        if fault == "reset":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            request.connection.close()
            return
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(answer)))
        for name, value in self.sends.items():
            request.send_header(name, value)
        request.end_headers()
        if fault == "cut":
            request.wfile.write(answer[: len(answer) // 2])
            return
        if fault == "drip":
            for byte in answer:
                request.wfile.write(bytes([byte]))
                request.wfile.flush()
                if self.released.wait(0.3):
                    return
        request.wfile.write(answer)
        if status == 200 and not fault:
            with self.lock:
                self.good[prompt] += 1


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.released.set()
    one.stop()


def judge_at(server: Server, **changes: Any) -> HttpJudge:
    settings = {"timeout": 2, "patience": 30} | changes
    return HttpJudge(server.url, "a-model", **settings)


def truth(numbers: Sequence[int]) -> list[str]:
    return ["yes" if k % 2 else "no" for k in numbers]


def test_two_hundred_faults_and_a_restart_cost_nothing(server: Server, tmp_path: Path) -> None:
    kinds = ["500", "hang", "cut", "garbage", "shape", "429", "reset", "drip"]
    server.fault = (  # type: ignore[method-assign]
        lambda prompt, attempt: kinds[number(prompt) % len(kinds)] if attempt == 1 else ""
    )
    questions = [detection(k) for k in range(200)]
    once = AskOnce(judge_at(server, parallel=32), tmp_path / "answers.sqlite")
    done: list[list[str | None]] = []
    asking = threading.Thread(target=lambda: done.append(once.answers(questions)))
    asking.start()
    while server.good.total() < 60:
        time.sleep(0.01)
    server.stop()  # the server dies, and comes back later
    time.sleep(0.5)
    server.start(server.port)
    asking.join(100)
    assert done and done[0] == truth(range(200))  # no question lost, none from a broken answer
    assert sum(server.faults[kind] for kind in kinds) == 200
    assert len(server.good) == 200 and set(server.good.values()) == {1}  # none asked twice
    attempts = server.attempts.total()
    assert once.answers(questions) == done[0]
    assert server.attempts.total() == attempts  # all remembered


def test_a_question_that_always_fails_costs_only_itself(server: Server) -> None:
    def fault(prompt: str, attempt: int) -> str:
        return {3: "500", 5: "400"}.get(number(prompt), "")

    server.fault = fault  # type: ignore[method-assign]
    judge = judge_at(server, tries=3, parallel=1)
    with pytest.warns(UserWarning, match="answer 2 of 8 questions; the last because: 400 Bad Requ"):
        answers = dict(judge.ask([detection(k) for k in range(8)]))
    assert answers[3] is None and answers[5] is None
    assert [answers[k] for k in (0, 1, 2, 4, 6, 7)] == truth((0, 1, 2, 4, 6, 7))
    assert server.attempts[detection(3).prompt] == 3
    assert server.attempts[detection(5).prompt] == 1  # a prompt that it refuses is not repeated


def test_requests_run_in_parallel_up_to_the_limit(server: Server) -> None:
    server.delay = 0.1
    started = time.monotonic()
    assert len(dict(judge_at(server, parallel=8).ask([detection(k) for k in range(40)]))) == 40
    assert server.most <= 8
    assert time.monotonic() - started < 0.5 * 40 * 0.1


def test_a_server_that_stays_away_stops_with_a_sentence(tmp_path: Path) -> None:
    gone = Server()
    gone.stop()
    judge = judge_at(gone, patience=0.2)
    with pytest.raises(JudgeError, match=r"no answer for 0 s \(.*refused\): start it and run"):
        AskOnce(judge, tmp_path / "a.sqlite").answers([detection(1)])


def test_a_server_that_says_later_for_ever_is_heard(server: Server) -> None:
    server.fault = lambda prompt, attempt: "429"  # type: ignore[method-assign]
    server.says = b'{"error": {"message": "You exceeded your quota"}}'
    with pytest.raises(JudgeError, match=r"\(429 Too Many Requests: You exceeded your quota\)"):
        dict(judge_at(server, patience=0.2).ask([detection(k) for k in range(9)]))


def test_a_wrong_model_name_stops_at_once(server: Server) -> None:
    server.fault = lambda prompt, attempt: "404"  # type: ignore[method-assign]
    with pytest.raises(JudgeError, match=r"answered 404 Not Found: .*a-model"):
        dict(judge_at(server, parallel=2).ask([detection(k) for k in range(100)]))
    assert server.attempts.total() <= 4


def test_the_budget_counts_repeated_requests(server: Server, tmp_path: Path) -> None:
    server.fault = lambda prompt, attempt: "500" if attempt == 1 else ""  # type: ignore[method-assign]
    once = AskOnce(judge_at(server, budget=9, parallel=1), tmp_path / "a.sqlite")
    with pytest.raises(JudgeError, match="budget"):
        once.answers([detection(k) for k in range(20)])
    assert server.attempts.total() == 9
    assert len(kept(tmp_path / "a.sqlite")) == 4


def test_the_key_comes_from_the_environment_and_stays_there(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(0)
    monkeypatch.setenv(http.KEY_VARIABLE, "secret-7f3a")
    judge = judge_at(server)
    AskOnce(judge, tmp_path / "answers.sqlite").answers([detection(1)])
    assert server.headers[0]["Authorization"] == "Bearer secret-7f3a"
    assert "secret-7f3a" not in json.dumps(judge.identity) + repr(vars(judge))
    for path in tmp_path.iterdir():
        assert b"secret-7f3a" not in path.read_bytes()
    with pytest.raises(JudgeError, match="without TLS") as error:
        HttpJudge("http://judge.example/v1")
    server.fault = lambda prompt, attempt: "404"  # type: ignore[method-assign]
    with pytest.raises(JudgeError, match="METASAE_JUDGE_KEY") as refused:
        dict(judge.ask([detection(2)]))
    server.says = b'{"error": {"message": "Bearer secret-7f3a may not do that"}}'
    with pytest.raises(JudgeError, match=r"Bearer \(the key\) may not") as repeated:
        dict(judge.ask([detection(2)]))
    server.fault = lambda prompt, attempt: ""  # type: ignore[method-assign]
    server.said = lambda prompt: ("secret-7f3a", "stop")  # type: ignore[method-assign]
    assert dict(judge.ask([detection(3)])) == {0: "(the key)"}
    for raised in (error, refused, repeated):
        assert "secret-7f3a" not in "".join(traceback.format_exception(raised.value))
    assert "secret-7f3a" not in caplog.text


WRONG_ADDRESSES = (
    "ftp://127.0.0.1", "127.0.0.1:8000", "http://127.0.0.1:99999/v1", "http://127.0.0.1:0",
    "http://127.0.0.1:8o", "http://[::1/v1", "http://:80", f"http://{'a' * 70}.org", "http://a..b",
)  # fmt: skip


def test_addresses_are_checked() -> None:
    assert HttpJudge().url.hostname == "127.0.0.1"
    for url in (*WRONG_ADDRESSES, "http://name:word@127.0.0.1", "http://127.0.0.1/v1?key=word"):
        with pytest.raises(JudgeError, match="address cannot be asked: give http") as error:
            HttpJudge(url)
        with pytest.raises(ProfileError, match=r"autointerp\.url must be http") as refused:
            Profile.load("tiny", overrides={"autointerp.url": url})
        assert "word" not in f"{error.value}{refused.value}".replace("password", "")


def test_an_explanation_that_was_cut_off_is_none(server: Server) -> None:
    def asked(content: str, task: Any) -> str | None:
        server.said = lambda prompt: (content, "length")  # type: ignore[method-assign]
        ((_, answer),) = judge_at(server).ask([Question(task, "", (example("text number 1"),) * 2)])
        return answer

    assert asked("They all are about", "explain") == ""
    assert asked("They are words. And", "explain") == "They are words. And"
    assert asked("A because the", "fuzzing") == "A because the"


@pytest.mark.parametrize("status", ["307", "401", "403", "405"])
def test_what_is_the_same_for_every_question_stops_at_once(server: Server, status: str) -> None:
    server.fault = lambda prompt, attempt: status  # type: ignore[method-assign]
    server.sends = {"Location": f"{server.url}/elsewhere"}  # nobody goes there
    with pytest.raises(JudgeError, match=rf"answered {status} \w+.*: check its address"):
        dict(judge_at(server, parallel=1).ask([detection(k) for k in range(100)]))
    assert server.attempts.total() <= 2


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_a_question_that_is_rejected_has_no_answer(server: Server, status: str) -> None:
    server.fault = lambda prompt, attempt: status if number(prompt) else ""  # type: ignore[method-assign]
    server.says = b'{"object": "error", "message": "This prompt is\\ntoo long"}'
    with pytest.warns(
        UserWarning, match=f"1 of 1 questions; .*{status} .*: This prompt is too lon"
    ):
        assert list(judge_at(server).ask([detection(1)])) == [(0, None)]
    assert server.attempts[detection(1).prompt] == 1


def test_a_server_that_asks_for_a_pause_gets_it(server: Server) -> None:
    server.fault = lambda prompt, attempt: "429" if attempt == 1 else ""  # type: ignore[method-assign]
    server.sends = {"Retry-After": "2"}
    started = time.monotonic()
    assert list(judge_at(server, tries=1).ask([detection(1)])) == [(0, "yes")]  # costs no try
    assert time.monotonic() - started > 2  # its own first pause is half a second at most


def test_a_server_that_is_still_loading_is_waited_for(server: Server) -> None:
    server.fault = lambda prompt, attempt: "503" if attempt == 1 else ""  # type: ignore[method-assign]
    assert list(judge_at(server, tries=1).ask([detection(1)])) == [(0, "yes")]


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (
            b'{"error": {"message": "temperature 0 is not supported", "code": 3}}',
            "temperature 0 is",
        ),
        (b'{"detail": [{"loc": ["body"], "msg": "seed: not permitted"}]}', "seed: not permitted"),
        (b'{"error": "no \\ud83d such\\u0000 thing"}', "no \ufffd such\ufffd thing"),
        (b"<html><h1>The plain HTTP request</h1></html>", "The plain HTTP request"),
        (b"\xff[" * 9999, "\ufffd"),
        (b"{}", "{}"),
    ],
)
@pytest.mark.parametrize(("status", "tries"), [("400", 6), ("500", 1)])
def test_a_server_that_refuses_every_question_is_heard(
    server: Server, status: str, tries: int, says: bytes, words: str
) -> None:
    server.fault = lambda prompt, attempt: status  # type: ignore[method-assign]
    server.says = says
    with pytest.raises(JudgeError, match=rf"answers nothing \({status} [\w ]+: ") as error:
        dict(judge_at(server, tries=tries).ask([detection(k) for k in range(50)]))
    assert words in str(error.value)
    assert server.attempts.total() == 2 and len(str(error.value)) < 500


def test_what_is_no_judge_is_heard(server: Server) -> None:
    server.fault = lambda prompt, attempt: "garbage"  # type: ignore[method-assign]
    with pytest.raises(JudgeError, match=r"answers nothing \(no answer, but: yes\)"):
        dict(judge_at(server, tries=1).ask([detection(1)]))


def test_no_such_host_and_no_tls_stop_at_once(server: Server) -> None:
    tls = f"https://127.0.0.1:{server.port}/v1"
    for url, words in (("http://judge.invalid", r"\[Errno -"), (tls, r"\[SSL: ")):
        started = time.monotonic()
        with pytest.raises(JudgeError, match=rf"cannot be reached \({words}.*\): check its name"):
            dict(HttpJudge(url).ask([detection(k) for k in range(50)]))
        assert time.monotonic() - started < 10


def test_a_server_that_knows_the_newer_limit_alone_gets_it(server: Server) -> None:
    newer = "max_completion_tokens"
    server.fault = lambda prompt, attempt: "" if newer in server.asked[-1] else "400"  # type: ignore[method-assign]
    server.says = f'{{"error": {{"message": "Use \'{newer}\' instead."}}}}'.encode()
    asked = [detection(k) for k in range(5)]
    assert dict(judge_at(server, parallel=1).ask(asked)) == dict(enumerate(truth(range(5))))
    assert server.attempts.total() == 6 and "max_tokens" not in server.asked[-1]


@pytest.mark.parametrize("reason", ["eos_token", "stop_sequence", None])
def test_other_words_for_the_end_of_an_answer(server: Server, reason: Any) -> None:
    server.said = lambda prompt: ("yes", reason)  # type: ignore[method-assign]
    assert list(judge_at(server).ask([detection(1)])) == [(0, "yes")]


def test_an_answer_holds_only_what_can_be_kept(server: Server, tmp_path: Path) -> None:
    server.said = lambda prompt: ("Words \ud83d like\0 these.", "stop")  # type: ignore[method-assign]
    question = Question("explain", "", (example("text number 1"),))
    once = AskOnce(judge_at(server), tmp_path / "a.sqlite")
    assert once.answers([question]) == ["Words \ufffd like\ufffd these."]
    assert kept(tmp_path / "a.sqlite")[0][2] == "Words \ufffd like\ufffd these."


# Tokens of thoughts, how many it takes to close them, and the fields in which servers send them.
Sends = Callable[[bool], tuple[str | None, dict[str, str]]]
THINKING: dict[str, Sends] = {
    "marked": lambda done: ("<think>\nNo, or" + "</think>\n\nyes" * done, {}),
    "opened by the template": lambda done: ("No, or. So" + "</think>\n\nyes" * done, {}),
    "parted": lambda done: ("yes" if done else None, {"reasoning_content": "No, or"}),
    "parted by vLLM": lambda done: ("yes" if done else None, {"reasoning": "No, or"}),
    "hidden": lambda done: ("yes" * done, {}),
}


@pytest.mark.parametrize("sends", THINKING.values(), ids=THINKING)
def test_a_judge_that_thinks_first_gets_room_and_is_read(server: Server, sends: Sends) -> None:
    def said(prompt: str) -> tuple[Any, str]:
        done = server.asked[-1]["max_tokens"] > 1000
        content, server.parted = sends(done)  # type: ignore[assignment]
        return content, "stop" if done else "length"

    server.said = said  # type: ignore[method-assign]
    asked = [detection(k) for k in range(3)]
    answers = dict(judge_at(server, parallel=1).ask(asked))
    assert [parse(q, answers[k]) for k, q in enumerate(asked)] == [True] * 3
    assert server.attempts.total() == 4  # only the first was asked twice


# One that a template opened, and nothing closes, looks like an answer with many words.
@pytest.mark.parametrize("how", sorted(THINKING.keys() - {"opened by the template"}))
def test_a_judge_that_never_ends_its_thoughts_is_named(server: Server, how: str) -> None:
    def said(prompt: str) -> tuple[Any, str]:
        content, server.parted = THINKING[how](False)  # type: ignore[assignment]
        return content, "length"

    server.said = said  # type: ignore[method-assign]
    with pytest.raises(JudgeError, match=r"cut off in its thoughts.*chat_template_kwargs"):
        dict(judge_at(server).ask([detection(k) for k in range(50)]))
    assert server.attempts.total() == 2


def test_thoughts_without_room_for_them_are_named_too(server: Server) -> None:
    server.said = lambda prompt: ("<think>No", "length")  # type: ignore[method-assign]
    server.fault = lambda prompt, attempt: "400" if server.asked[-1]["max_tokens"] > 99 else ""  # type: ignore[method-assign]
    with pytest.raises(JudgeError, match="cut off in its thoughts"):
        dict(judge_at(server).ask([detection(k) for k in range(50)]))


def test_long_words_on_a_server_that_is_slow_are_asked_for_once(server: Server) -> None:
    server.said = lambda prompt: ("They are words. And", "length")  # type: ignore[method-assign]
    server.fault = lambda prompt, attempt: "hang" if server.asked[-1]["max_tokens"] > 999 else ""  # type: ignore[method-assign]
    asked = [Question("explain", "", (example(f"text number {k}"),) * 2) for k in range(3)]
    answers = dict(judge_at(server, timeout=0.5).ask(asked))
    assert answers == dict.fromkeys(range(3), "They are words. And")
    assert server.attempts.total() == 4


def test_one_answer_that_is_cut_off_in_thoughts_is_none(server: Server) -> None:
    server.said = lambda prompt: (  # type: ignore[method-assign]
        ("yes", "stop") if number(prompt) == 0 else ("<think>No", "length")
    )
    with pytest.warns(UserWarning, match="2 of 3 questions; .*thoughts.*chat_template_kwargs"):
        answers = dict(judge_at(server).ask([detection(k) for k in range(3)]))
    assert answers == {0: "yes", 1: None, 2: None}


def test_nothing_else_of_the_environment_reaches_the_server(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "secret-91cd")
    monkeypatch.setenv(
        "OPENAI_CUSTOM_HEADERS", "Authorization: Bearer secret-91cd\nX-A: secret-91cd"
    )
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert list(judge_at(server).ask([detection(1)])) == [(0, "yes")]
    assert "secret-91cd" not in repr(server.headers)
    assert "Authorization" not in server.headers[0]


def test_a_key_is_stripped_and_checked_at_the_door(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(http.KEY_VARIABLE, " secret-7f3a\n")
    assert list(judge_at(server).ask([detection(1)])) == [(0, "yes")]
    assert server.headers[0]["Authorization"] == "Bearer secret-7f3a"
    for broken in ("secret 7f3a", "secret\n7f3a", "secret-7f3ä"):
        monkeypatch.setenv(http.KEY_VARIABLE, broken)
        with pytest.raises(JudgeError, match="what no key can hold") as error:
            judge_at(server)
        assert "7f3" not in "".join(traceback.format_exception(error.value))
