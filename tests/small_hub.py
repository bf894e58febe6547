"""A model hub on loopback: models and datasets out of folders, at commits that a test can move."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

STALL = 0.4  # seconds without a word


class SmallHub:
    """`repositories`: folder of each `models/owner/name` or `datasets/owner/name`. `asked`: the
    path of every request, in order. `fault`: given the path of a request for a file's content, what
    goes wrong: `cut` (half of it comes), `stall` (nothing comes), `503`, `401`, or nothing.
    `faults`: how many did. `token`: where there is one, no file is given without it, as of a
    gated repository."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.asked: list[str] = []
        self.url = ""
        self.fault: Callable[[str], str] = lambda path: ""
        self.faults = 0
        self.token = ""

    def commit(self, repository: str) -> str:
        """40 hex digits out of the names and contents of a repository's files."""
        folder = self.repositories[repository]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        content = b"".join(path.name.encode() + path.read_bytes() for path in files)
        return hashlib.sha1(content).hexdigest()

    @contextmanager
    def serving(self) -> Iterator[SmallHub]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path).strip("/")
                hub.asked.append(path)
                found = hub._answer(path)
                named = self.headers.get("Authorization") == f"Bearer {hub.token}"
                if hub.token and "/resolve/" in path and not named:
                    self.send_response(401)
                    self.send_header("X-Error-Code", "GatedRepo")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if found is None:
                    self.send_response(404)
                    known = any(name.removeprefix("models/") in path for name in hub.repositories)
                    self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content, commit = found
                fault = hub.fault(path) if self.command == "GET" and "/resolve/" in path else ""
                hub.faults += bool(fault)
                if fault == "stall":
                    time.sleep(STALL)
                    return
                if fault.isdigit():
                    self.send_response(int(fault))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                span = range(len(content))
                if given := self.headers.get("Range"):
                    first, _, last = given.removeprefix("bytes=").partition("-")
                    span = span[int(first) : int(last) + 1 if last else None]
                self.send_response(206 if given else 200)
                self.send_header("Content-Length", str(len(span)))
                self.send_header("ETag", f'"{_oid(content)}"')
                self.send_header("X-Repo-Commit", commit)
                self.send_header("Accept-Ranges", "bytes")
                if given:
                    place = f"bytes {span.start}-{span.stop - 1}/{len(content)}"
                    self.send_header("Content-Range", place)
                self.end_headers()
                if self.command != "HEAD":
                    sent = content[span.start : span.stop]
                    self.wfile.write(sent[: len(sent) // 2] if fault == "cut" else sent)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def _answer(self, path: str) -> tuple[bytes, str] | None:
        """Content and commit of a path of the hub's interface."""
        for repository, folder in self.repositories.items():
            commit, bare = self.commit(repository), repository.removeprefix("models/")
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            if path in (f"api/{repository}", f"api/{repository}/revision/main",
                        f"api/{repository}/revision/{commit}"):  # fmt: skip
                siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
                name = repository.partition("/")[2]
                return json.dumps(
                    {"id": name, "sha": commit, "siblings": siblings}
                ).encode(), commit
            listing = (f"api/{repository}/tree/{commit}", f"api/{repository}/paths-info/{commit}")
            if path.startswith(listing):
                entries = [
                    {"type": "file", "path": file.relative_to(folder).as_posix(),
                     "size": file.stat().st_size, "oid": _oid(file.read_bytes())}
                    for file in files
                ]  # fmt: skip
                return json.dumps(entries).encode(), commit
            if path.startswith(start := f"{bare}/resolve/{commit}/"):
                file = folder / path.removeprefix(start)
                return (file.read_bytes(), commit) if file.is_file() else None
        return None


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
