"""A web server that serves a folder, and whose answers a test may change."""

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
    body: bytes = b""
    stall: bool = False  # whether it then stays silent instead of closing the connection

    def become(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.status, self.body = status, body
        self.headers = {"Content-Length": str(len(body)), **(headers or {})}


@dataclass
class Server:
    """`behave(path, number, answer)` may change an answer; `number` counts the requests, from 0."""

    folder: Path
    address: str = ""
    behave: Callable[[str, int, Answer], object] = lambda path, number, answer: None
    ranges: bool = True
    requests: list[dict[str, str]] = field(default_factory=list)  # their headers
    released: threading.Event = field(default_factory=threading.Event)

    def answer(self, path: str, headers: dict[str, str]) -> Answer:
        file = self.folder / Path(path).name
        if not file.is_file():
            return Answer(404, {})
        content = file.read_bytes()
        begin = int(headers.get("Range", "bytes=0-")[6:-1])
        if not self.ranges or not begin:
            return Answer(200, {"Content-Length": str(len(content))}, content)
        if begin >= len(content):
            return Answer(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
        found = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        return Answer(206, {**found, "Content-Length": str(len(content) - begin)}, content[begin:])


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            headers = {key.title(): value for key, value in self.headers.items()}
            server.requests.append(headers)
            answer = server.answer(self.path, headers)
            server.behave(self.path, len(server.requests) - 1, answer)
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(answer.body)
            self.wfile.flush()
            if answer.stall:
                server.released.wait(60)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are part of the test
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        server.address = f"http://127.0.0.1:{running.server_port}"
        yield server
        server.released.set()
        running.shutdown()
