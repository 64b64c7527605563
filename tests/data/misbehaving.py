"""A web server that serves a folder, and behaves as badly as it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Answer:
    """What the server sends for one request; tests change it."""

    status: int
    headers: dict[str, str]
    body: bytes
    stall: bool = False  # whether it then stays silent instead of closing the connection


@dataclass
class Server:
    """`behave(path, number, answer)` may change an answer; `number` counts the requests, from 0."""

    folder: Path
    address: str = ""
    behave: Callable[[str, int, Answer], object] = lambda path, number, answer: None
    ranges: bool = True
    validators: bool = True
    chunked: bool = False
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        file = self.folder / Path(path).name
        if not file.is_file():
            return Answer(404, {}, b"")
        content = file.read_bytes()
        version = f'"{hash(content)}"'
        found = {"ETag": version} if self.validators else {}
        begin = int(headers.get("Range", "bytes=0-")[6:-1])
        if not self.ranges or not begin or headers.get("If-Range", version) != version:
            return Answer(200, {**found, "Content-Length": str(len(content))}, content)
        if begin >= len(content):
            return Answer(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"}, b"")
        found["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        return Answer(206, {**found, "Content-Length": str(len(content) - begin)}, content[begin:])


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            headers = {key.title(): value for key, value in self.headers.items()}
            number = len([method for method, _ in server.requests if method != "HEAD"])
            server.requests.append((self.command, headers))
            answer = server.answer(self.command, self.path, headers)
            if self.command == "GET":
                server.behave(self.path, number, answer)
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(answer.body)
                self.wfile.flush()
            if answer.stall:
                server.released.wait(60)

        do_HEAD = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are part of the test
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        server.address = f"http://127.0.0.1:{running.server_port}"
        yield server
        server.released.set()
        running.shutdown()
