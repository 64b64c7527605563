from __future__ import annotations

import base64
import hashlib
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import urllib3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import fetch as fetching
from data.cli import DataError, Progress
from data.corpora import Archive
from data.fetch import content_length
from tests.data.made_up import files_below
from tests.data.misbehaving import Answer, Server, serving

CONTENT = random.Random(1).randbytes(200_000)
NAME = "a.tar.gz"
WANTED = Archive(NAME, len(CONTENT), hashlib.md5(CONTENT).hexdigest())
OF_UNKNOWN_SIZE = Archive(NAME, 0, WANTED.md5)


def fetch(
    wanted: Archive,
    mirrors: list[str],
    target: Path,
    progress: Progress = lambda count: None,
    stop: threading.Event | None = None,
) -> tuple[str, str]:
    return fetching.fetch(wanted, mirrors, target, progress, stop)


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


def leave_partial(target: Path, content: bytes) -> None:
    """What a killed download leaves behind."""
    target.with_name(NAME + ".part").write_bytes(content)


@pytest.mark.parametrize("wanted", [WANTED, OF_UNKNOWN_SIZE])
def test_an_archive_arrives_with_its_sums(server: Server, target: Path, wanted: Archive) -> None:
    told: list[int] = []
    assert fetch(wanted, [server.address], target, told.append) == (
        hashlib.md5(CONTENT).hexdigest(),
        hashlib.sha256(CONTENT).hexdigest(),
    )
    assert is_complete(target)
    assert sum(told) == len(CONTENT)
    assert len(server.requests) == 1


@pytest.mark.parametrize("wanted", [WANTED, OF_UNKNOWN_SIZE])
@pytest.mark.parametrize("validators", [True, False])
def test_connections_cut_at_random_bytes_are_resumed(
    server: Server, target: Path, wanted: Archive, validators: bool
) -> None:
    server.validators = validators
    server.behave = cut(lambda number: random.Random(number).randrange(1, 40_000))
    fetch(wanted, [server.address], target)
    assert is_complete(target)
    ranges = [headers.get("Range") for _, headers in server.requests]
    assert ranges[0] is None and all(ranges[1:]) and len(ranges) > 4


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, len(CONTENT)), max_size=8), st.booleans(), st.booleans())
def test_wherever_connections_are_cut_the_archive_is_whole(
    server: Server, target: Path, sizes: list[int], ranges: bool, validators: bool
) -> None:
    server.ranges, server.validators = ranges, validators
    first = len(server.requests)
    server.behave = cut(lambda number: ([*sizes, len(CONTENT)] + [len(CONTENT)] * 20)[number - first])
    target.unlink(missing_ok=True)
    try:
        fetch(WANTED, [server.address], target)
    except DataError as error:
        # Without ranges, every request begins again: one that never comes further than before is a failure.
        assert not ranges and "given up after 6 attempts" in str(error)
    else:
        assert is_complete(target)


def test_a_server_without_ranges_is_read_from_the_beginning(server: Server, target: Path) -> None:
    server.ranges = False
    server.behave = cut(lambda number: 50_000 if number == 0 else len(CONTENT))
    told: list[int] = []
    fetch(WANTED, [server.address], target, told.append)
    assert is_complete(target)
    assert sum(told) == len(CONTENT)


@pytest.mark.parametrize("validators", [True, False])
def test_a_file_that_changes_between_attempts_is_never_mixed(server: Server, target: Path, validators: bool) -> None:
    server.validators = validators
    (server.folder / NAME).write_bytes(bytes(len(CONTENT)))

    def behave(path: str, number: int, answer: Answer) -> None:
        if number == 0:
            answer.body = answer.body[:70_000]
            (server.folder / NAME).write_bytes(CONTENT)

    server.behave = behave
    fetch(WANTED, [server.address], target)
    assert is_complete(target)


def test_a_download_of_another_day_goes_on_at_its_last_byte(server: Server, target: Path) -> None:
    leave_partial(target, CONTENT[:150_000])
    fetch(WANTED, [server.address], target)
    assert is_complete(target)
    assert [headers["Range"] for _, headers in server.requests] == ["bytes=150000-"]


@pytest.mark.parametrize("rest", [CONTENT, CONTENT[:-1], CONTENT + b"more", bytes(100_000), bytes(len(CONTENT))])
@pytest.mark.parametrize("wanted", [WANTED, OF_UNKNOWN_SIZE])
def test_whatever_an_earlier_run_left_the_archive_is_whole(
    server: Server, target: Path, rest: bytes, wanted: Archive
) -> None:
    leave_partial(target, rest)
    fetch(wanted, [server.address], target)
    assert is_complete(target)


def test_a_partial_that_is_complete_needs_no_network(target: Path) -> None:
    leave_partial(target, CONTENT)
    fetch(WANTED, ["http://127.0.0.1:1"], target)
    assert is_complete(target)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_failure_is_retried(server: Server, target: Path, status: int) -> None:
    def behave(path: str, number: int, answer: Answer) -> None:
        if number < 3:
            answer.status, answer.headers, answer.body = status, {"Content-Length": "0"}, b""

    server.behave = behave
    fetch(WANTED, [server.address], target)
    assert is_complete(target)
    assert len(server.requests) == 4


def test_retry_after_is_honored(server: Server, target: Path) -> None:
    def behave(path: str, number: int, answer: Answer) -> None:
        if number == 0:
            answer.status, answer.headers, answer.body = 503, {"Content-Length": "0", "Retry-After": "1"}, b""

    server.behave = behave
    started = time.monotonic()
    fetch(WANTED, [server.address], target)
    assert time.monotonic() - started > 0.95


def test_a_mirror_that_asks_to_wait_for_hours_is_left(server: Server, target: Path, tmp_path: Path) -> None:
    def behave(path: str, number: int, answer: Answer) -> None:
        if path.startswith("/busy/"):
            answer.status, answer.headers, answer.body = 429, {"Content-Length": "0", "Retry-After": "7200"}, b""

    server.behave = behave
    fetch(WANTED, [f"{server.address}/busy", server.address], target)
    assert is_complete(target)


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_a_mirror_that_refuses_is_left_at_once(
    server: Server, target: Path, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(path: str, number: int, answer: Answer) -> None:
        if path.startswith("/bad/"):
            answer.status, answer.headers, answer.body = status, {"Content-Length": "0"}, b""

    server.behave = behave
    fetch(WANTED, [f"{server.address}/bad", server.address], target)
    assert is_complete(target)
    assert len(server.requests) == 2
    assert f"warning: {server.address}/bad/{NAME}: HTTP status {status}" in capsys.readouterr().err


def test_a_stalled_connection_is_dropped_and_resumed(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT_S", urllib3.Timeout(connect=20, read=0.3))

    def behave(path: str, number: int, answer: Answer) -> None:
        if number < 2:
            answer.body, answer.stall = answer.body[:60_000], True

    server.behave = behave
    fetch(WANTED, [server.address], target)
    assert is_complete(target)
    assert [headers.get("Range") for _, headers in server.requests] == [None, "bytes=60000-", "bytes=120000-"]


def test_redirects_are_followed_with_the_range(server: Server, target: Path) -> None:
    leave_partial(target, CONTENT[:50_000])

    def behave(path: str, number: int, answer: Answer) -> None:
        if path.startswith("/old/"):
            answer.status, answer.body = 302, b""
            answer.headers = {"Location": f"{server.address}/{NAME}", "Content-Length": "0"}

    server.behave = behave
    fetch(WANTED, [f"{server.address}/old"], target)
    assert is_complete(target)
    assert server.requests[-1][1]["Range"] == "bytes=50000-"


def test_endless_redirects_are_an_error(server: Server, target: Path) -> None:
    def behave(path: str, number: int, answer: Answer) -> None:
        answer.status, answer.body = 302, b""
        answer.headers = {"Location": f"{server.address}/{NAME}", "Content-Length": "0"}

    server.behave = behave
    with pytest.raises(DataError, match="too many redirects"):
        fetch(WANTED, [server.address], target)
    assert len(server.requests) <= 6  # one attempt


def test_a_certificate_that_is_not_trusted_is_an_error_at_once(target: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*line, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)

        def serve() -> None:
            with suppress(OSError):
                context.wrap_socket(listening.accept()[0], server_side=True)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(DataError, match=r"certificate verify failed"):
            fetch(WANTED, [f"https://127.0.0.1:{listening.getsockname()[1]}"], target)


def test_a_login_in_an_address_is_sent_and_never_printed(
    server: Server, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(path: str, number: int, answer: Answer) -> None:
        if path.startswith("/bad/") or number == 1:
            answer.status, answer.headers, answer.body = (404 if number == 0 else 503), {"Content-Length": "0"}, b""

    server.behave = behave
    address = server.address.replace("//", "//me:secret%21@")
    fetch(WANTED, [f"{address}/bad", address], target)
    assert is_complete(target)
    login = "Basic " + base64.b64encode(b"me:secret!").decode()
    assert [headers.get("Authorization") for _, headers in server.requests] == [login] * 3
    said = capsys.readouterr().err
    assert f"warning: {server.address}/bad/{NAME}: HTTP status 404" in said
    assert f"{server.address}/{NAME}: HTTP status 503; resuming in" in said and "secret" not in said


def spoil(path: str, number: int, answer: Answer) -> None:
    if path.startswith("/wrong-sum/"):
        answer.body = bytes(len(answer.body))
    elif path.startswith("/short/"):
        answer.body = answer.body[:1000]
        answer.headers["Content-Length"] = "1000"
    elif path.startswith("/long/"):
        answer.body += b"more"
        answer.headers["Content-Length"] = str(len(answer.body))
    elif path.startswith("/long-unannounced/"):
        answer.body += b"more"
        del answer.headers["Content-Length"]


@pytest.mark.parametrize(
    ("mirror", "message"),
    [
        ("wrong-sum", f"has MD5 {hashlib.md5(bytes(len(CONTENT))).hexdigest()}, expected {WANTED.md5}"),
        ("short", "has 1000 bytes, 200000 were published"),
        ("long", "has 200004 bytes, 200000 were published"),
        ("long-unannounced", "(200004 bytes) has MD5"),
    ],
)
def test_a_mirror_with_another_file_is_reported_and_left(
    server: Server, target: Path, mirror: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave = spoil
    fetch(WANTED, [f"{server.address}/{mirror}", server.address], target)
    assert is_complete(target)
    assert message in capsys.readouterr().err
    target.unlink()
    with pytest.raises(DataError, match=r"no mirror delivered a.tar.gz: http.*"):
        fetch(WANTED, [f"{server.address}/{mirror}"], target)
    assert not target.exists()
    fetch(WANTED, [server.address], target)
    assert is_complete(target)


def test_pieces_of_a_bad_mirror_do_not_spoil_the_good_one(server: Server, target: Path) -> None:
    def behave(path: str, number: int, answer: Answer) -> None:
        if path.startswith("/bad/"):
            answer.body = bytes(100_000)  # and then the connection ends
            if number > 0:
                answer.status, answer.headers, answer.body = 404, {"Content-Length": "0"}, b""

    server.behave = behave
    fetch(WANTED, [f"{server.address}/bad", server.address], target)
    assert is_complete(target)


def test_a_body_without_announced_length_is_read_to_its_end(server: Server, target: Path) -> None:
    server.behave = lambda path, number, answer: answer.headers.pop("Content-Length", None)
    fetch(WANTED, [server.address], target)
    assert is_complete(target)


def test_a_dead_mirror_is_left_after_some_attempts_and_its_bytes_are_kept(server: Server, target: Path) -> None:
    server.behave = lambda path, number, answer: setattr(answer, "body", answer.body[: 80_000 if number == 0 else 0])
    with pytest.raises(DataError, match=r"no mirror delivered a.tar.gz: .*given up after 6 attempts"):
        fetch(WANTED, [server.address], target)
    assert target.with_name(NAME + ".part").read_bytes() == CONTENT[:80_000]
    server.behave = lambda path, number, answer: None
    fetch(WANTED, [server.address], target)
    assert is_complete(target)


def test_a_mirror_that_comes_further_after_a_bad_beginning_is_not_left(server: Server, target: Path) -> None:
    leave_partial(target, bytes(180_000))
    step = len(CONTENT) // 20
    server.behave = lambda path, number, answer: setattr(answer, "body", answer.body[: step if number else None])
    fetch(WANTED, [server.address], target)
    assert is_complete(target)
    assert len(server.requests) > 20


@pytest.mark.parametrize("mirror", ["http://[bad", "http://", "http://host:port"])
def test_a_mirror_that_is_no_address_is_an_error_at_once(mirror: str, target: Path) -> None:
    with pytest.raises(DataError, match="no mirror delivered") as raised:
        fetch(WANTED, [mirror], target)
    assert "attempts" not in str(raised.value)
    assert content_length([mirror], NAME) == 0


def test_an_at_sign_in_a_path_is_no_login(server: Server, target: Path) -> None:
    asked: list[str] = []
    server.behave = lambda path, number, answer: asked.append(path)
    fetch(WANTED, [f"{server.address}/a//b@c"], target)
    assert asked == [f"/a//b@c/{NAME}"]


def test_a_refused_connection_is_an_error_that_says_so(target: Path) -> None:
    with socket.socket() as unused:  # bound but not listening
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match="refused"):
            fetch(WANTED, [f"http://127.0.0.1:{unused.getsockname()[1]}"], target)


def test_a_download_that_is_told_to_stop_stops_while_it_waits(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "BACKOFF_S", 60.0)
    server.behave = cut(lambda number: 1000)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(DataError, match="stopped"):
        fetch(WANTED, [server.address], target, stop=stop)


def test_a_proxy_of_the_environment_is_used_but_not_for_hosts_that_it_excepts(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.address.replace("http://", "http://user:p%40ss@"))
    monkeypatch.setenv("no_proxy", "")
    fetch(WANTED, ["http://speech.example/resources"], target)  # a name that only the proxy could look up
    assert is_complete(target)
    assert server.requests[0][1]["Proxy-Authorization"] == "Basic dXNlcjpwQHNz"
    target.unlink()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fetch(WANTED, [server.address], target)
    assert is_complete(target)


def test_the_size_of_an_archive_is_asked_for_without_fetching_it(server: Server) -> None:
    assert content_length(["http://127.0.0.1:1", f"{server.address}"], NAME) == len(CONTENT)
    assert content_length([server.address], "absent") == 0
    assert {method for method, _ in server.requests} == {"HEAD"}
