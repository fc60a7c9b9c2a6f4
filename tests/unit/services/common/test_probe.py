from __future__ import annotations

import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from services.common import probe

ANSWERS = {
    "/healthz": (200, b"{}"),
    "/readyz": (
        503,
        json.dumps({"ready": False, "code": "stored_bytes_corrupt", "message": "seal:\n broken"}).encode(),
    ),
    "/text": (500, b"Internal Server Error"),
    "/list": (500, b"[1]"),
    "/moved": (302, b""),
    "/readyz?deep=1": (200, b""),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = ANSWERS.get(self.path, (404, b""))
        self.send_response(status)
        self.send_header("Location", "/healthz")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def run(*arguments: str, program: str = "", **environ: str) -> tuple[int, str]:
    """Exit code and standard error of the program."""
    command = [sys.executable, *(("-c", program) if program else ("-m", "services.common.probe")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ or None)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_200_is_success_and_silent(url: str) -> None:
    assert run(f"{url}/healthz") == (0, "")
    assert run(f"{url}/readyz?deep=1") == (0, "")
    assert run(f"{url}/healthz", http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9") == (0, "")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/readyz", "503 Service Unavailable: stored_bytes_corrupt: seal: broken"),
        ("/text", "500 Internal Server Error"),
        ("/list", "500 Internal Server Error"),
        ("/moved", "302 Found"),
        ("/absent", "404 Not Found"),
        ("", "404 Not Found"),
    ],
)
def test_everything_else_is_one_line(url: str, path: str, line: str) -> None:
    assert run(url + path) == (1, f"{url}{path}: {line}\n")


@pytest.mark.parametrize("wrong", ["https://127.0.0.1/", "127.0.0.1:80", "http://", "http://a:b/", "http://[::1", ""])
def test_what_is_no_address_is_said(wrong: str) -> None:
    code, text = run(wrong)
    assert (code, text.count("\n")) == (1, 1)


def test_a_closed_port_and_wrong_usage_fail() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    code, text = run(f"http://127.0.0.1:{port}/")
    assert code == 1
    assert "ConnectionRefusedError" in text
    assert text.count("\n") == 1
    assert run() == (1, "usage: python -m services.common.probe URL\n")


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 200 OK\r\nX-A: ", b"nonsense\r\n\r\n"])
def test_a_server_that_does_not_answer_is_given_up(greeting: bytes) -> None:
    """One that says nothing, one that goes on and on, and one that speaks another protocol."""
    over = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(greeting)
            try:
                while not over.wait(0.02):
                    connection.sendall(b"a" if greeting else b"")
            except OSError:
                return

    patience = (
        "import sys; from services.common import probe; probe.TIMEOUT_S = 0.3; sys.exit(probe.main(sys.argv[1:]))"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        code, text = run(f"http://127.0.0.1:{listener.getsockname()[1]}/", program=patience)
        over.set()
        thread.join()
    assert (code, text.count("\n")) == (1, 1)
    assert ("TimeoutError" in text) or ("BadStatusLine" in text)


def test_it_waits_three_seconds_and_loads_nothing_heavy() -> None:
    assert probe.TIMEOUT_S == 3.0
    program = "import sys; from services.common import probe; sys.stderr.write(' '.join(sorted(sys.modules)))"
    _, text = run(program=program)
    heavy = {"grpc", "google", "pydantic", "yaml", "structlog", "anyio", "numpy", "shelora", "asyncio", "logging"}
    assert not heavy & set(text.split())
    ours = {name for name in text.split() if name.startswith("services")}
    assert ours == {"services", "services.common", "services.common.probe"}
