import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data import fetch as fetching
from data.cli import UserError
from data.corpora import Archive
from data.fetch import Download, read_checksums
from tests.data.made_up import files_below
from tests.data.misbehaving import Answer, Server, serving

CONTENT = fetching.GZIP + random.Random(1).randbytes(199_998)
OTHER = fetching.GZIP + bytes(199_998)
NAME = "a.tar.gz"
WANTED = Archive(NAME, len(CONTENT), hashlib.md5(CONTENT).hexdigest())
OF_UNKNOWN_SIZE = Archive(NAME, 0, WANTED.md5)
PAGE = b"<html>Please log in</html>"


def fetch(mirrors: str | list[str], target: Path, wanted: Archive = WANTED) -> Path:
    download = Download(wanted, target, lambda count: None, threading.Event())
    return download.complete([mirrors] if isinstance(mirrors, str) else mirrors)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "BACKOFF_S", 0.001)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / NAME).write_bytes(CONTENT)
    with serving(tmp_path / "served") as running:
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "fetched").mkdir()
    return tmp_path / "fetched" / NAME


def is_complete(target: Path) -> bool:
    return target.read_bytes() == CONTENT and files_below(target.parent) == [NAME]


def cut(size: Callable[[int], int]) -> Callable[[str, int, Answer], None]:
    """Behavior that ends the body of request `number` after `size(number)` bytes."""

    def behave(path: str, number: int, answer: Answer) -> None:
        answer.body = answer.body[: size(number)]

    return behave


@pytest.mark.parametrize("wanted", [WANTED, OF_UNKNOWN_SIZE])
def test_connections_cut_at_random_bytes_are_resumed(server: Server, target: Path, wanted: Archive) -> None:
    server.behave = cut(lambda number: random.Random(number).randrange(1, 40_000))
    sizes: list[int] = []
    assert Download(wanted, target, sizes.append, threading.Event()).complete([server.address]) == target
    assert is_complete(target) and sum(sizes) == len(CONTENT)
    ranges = [headers.get("Range") for headers in server.requests]
    assert ranges[0] is None and all(ranges[1:]) and len(ranges) > fetching.RETRIES + 1


@pytest.mark.parametrize(
    "left", [CONTENT[:150_000], CONTENT, CONTENT[:-1], CONTENT + b"more", bytes(100_000), bytes(len(CONTENT))]
)
@pytest.mark.parametrize("wanted", [WANTED, OF_UNKNOWN_SIZE])
def test_whatever_an_earlier_run_left_the_archive_is_whole(
    server: Server, target: Path, left: bytes, wanted: Archive
) -> None:
    target.write_bytes(left)
    fetch(server.address, target, wanted)
    assert is_complete(target)
    if CONTENT.startswith(left) and len(left) < len(CONTENT):
        assert [headers["Range"] for headers in server.requests] == [f"bytes={len(left)}-"]
    elif left == CONTENT and wanted is WANTED:
        assert server.requests == []


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_passing_failure_is_retried(server: Server, target: Path, status: int) -> None:
    server.behave = lambda path, number, answer: answer.become(status) if number < 3 else None
    fetch(server.address, target)
    assert is_complete(target) and len(server.requests) == 4


def test_a_stalled_connection_is_cut_and_resumed(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.3)

    def behave(path: str, number: int, answer: Answer) -> None:
        if number < 2:
            answer.body, answer.stall = answer.body[:60_000], True

    server.behave = behave
    fetch(server.address, target)
    assert is_complete(target)
    assert [headers.get("Range") for headers in server.requests] == [None, "bytes=60000-", "bytes=120000-"]


def test_redirects_are_followed_with_the_range_but_not_without_end(server: Server, target: Path) -> None:
    target.write_bytes(CONTENT[:50_000])
    moved = {"Location": f"/new/{NAME}"}
    server.behave = lambda path, number, answer: answer.become(302, moved) if path.startswith("/old/") else None
    fetch(f"{server.address}/old", target)
    assert is_complete(target) and server.requests[-1]["Range"] == "bytes=50000-"
    target.unlink()
    server.behave = lambda path, number, answer: answer.become(302, {"Location": f"/{NAME}"})
    with pytest.raises(UserError, match="HTTP status 302"):
        fetch(server.address, target)


def test_a_login_page_costs_nothing_that_was_downloaded_and_is_named(
    server: Server, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target.write_bytes(CONTENT[:150_000])

    def behave(path: str, number: int, answer: Answer) -> None:
        if path.startswith("/login"):
            answer.become(200, {"Content-Type": "text/html"}, PAGE)
        elif path.startswith("/portal/"):
            answer.become(302, {"Location": "/login?token=secret"})

    server.behave = behave
    for wanted in (WANTED, OF_UNKNOWN_SIZE):
        with pytest.raises(UserError, match=r"text/html, not a \.tar\.gz .*/login$"):
            fetch(f"{server.address}/portal", target, wanted)
        assert target.read_bytes() == CONTENT[:150_000]
    fetch([f"{server.address}/login", server.address], target)
    assert is_complete(target) and server.requests[-1]["Range"] == "bytes=150000-"
    assert "secret" not in capsys.readouterr().err


def test_a_server_without_ranges_starts_again(server: Server, target: Path) -> None:
    target.write_bytes(CONTENT[:150_000])
    server.ranges = False
    server.behave = cut(lambda number: 100_000 if number < 2 else len(CONTENT))
    fetch(server.address, target)
    assert is_complete(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: answer.become(200, body=OTHER), f"has md5 {hashlib.md5(OTHER).hexdigest()}, expected"),
        (lambda answer: answer.become(200, body=OTHER[:1000]), "has 1000 bytes, 200000 were published"),
        (lambda answer: answer.become(200, body=CONTENT + b"more"), "has 200004 bytes, 200000 were published"),
        (lambda answer: answer.become(403), "HTTP status 403"),
        (lambda answer: answer.become(410), "HTTP status 410"),
    ],
)
def test_a_mirror_with_another_file_is_left_at_once_and_by_name(
    server: Server, target: Path, change: Callable[[Answer], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave = lambda path, number, answer: change(answer) if path.startswith("/bad/") else None
    fetch([f"{server.address}/bad", server.address], target)
    assert is_complete(target) and len(server.requests) == 2
    said = capsys.readouterr().err
    assert f"{server.address}/bad/{NAME}: " in said and message in said


def test_a_dead_mirror_is_left_after_some_attempts(server: Server, target: Path) -> None:
    server.behave = cut(lambda number: 0 if number else 80_000)
    with pytest.raises(UserError, match="no mirror delivered"):
        fetch(server.address, target)
    assert target.read_bytes() == CONTENT[:80_000] and len(server.requests) == fetching.RETRIES + 1


def test_a_download_that_is_told_to_stop_stops_while_it_waits(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "BACKOFF_S", 500)
    server.behave = lambda path, number, answer: answer.become(503)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(UserError, match="stopped"):
        Download(WANTED, target, lambda count: None, stop).complete([server.address])


def test_a_proxy_of_the_environment_is_used_but_not_for_hosts_that_it_excepts(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.address.replace("http://", "http://user:p%40ss@"))
    monkeypatch.setenv("no_proxy", "")
    fetch("http://speech.example/resources", target)  # a name that only the proxy could look up
    assert is_complete(target)
    assert server.requests[0]["Proxy-Authorization"] == "Basic dXNlcjpwQHNz"
    target.unlink()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fetch(server.address, target)
    assert is_complete(target)


def test_a_login_in_an_address_is_sent_to_that_alone_and_never_printed(
    server: Server, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(path: str, number: int, answer: Answer) -> None:
        if server.requests[number].get("Authorization") != "Basic bWU6cEBzcw==":
            answer.become(401, {"WWW-Authenticate": 'Basic realm="speech"'})
        elif number < 3:
            answer.become(503)

    server.behave = behave
    fetch(server.address.replace("http://", "http://me:p%40ss@"), target)
    assert is_complete(target) and len(server.requests) == 4
    target.unlink()
    with serving(tmp_path / "served") as other, pytest.raises(UserError) as raised:
        other.behave = lambda path, number, answer: answer.become(302, {"Location": f"{server.address}/{NAME}"})
        wrong = [server.address.replace("http://", f"http://me:{password}@") for password in ("wr/ng", "wr ng")]
        fetch([*wrong, "http://me:p%40ss@[1", other.address.replace("http://", "http://me:p%40ss@")], target)
    assert str(raised.value).count("HTTP status 401") == 3
    assert not [word for word in ("me:", "p%40ss", "p@ss", "wr") if word in capsys.readouterr().err + str(raised.value)]


@pytest.mark.parametrize("line", ["hello world", "d41d8cd98f00b204e9800998ecf8427e", "z" * 32 + "  a.tar.gz"])
def test_a_checksums_file_of_another_format_is_an_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "md5sum.txt").write_text(f"{line}\n")
    with pytest.raises(UserError, match="not an md5sum line"):
        read_checksums(tmp_path / "md5sum.txt")
