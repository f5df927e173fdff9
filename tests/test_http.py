"""HTTP as an effect, against a server of our own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dspex import EffectFailed, Secret, http
from dspex.compose.http import MAX_REPLY
from dspex.core.effects import Performing
from dspex.core.request import request_of

SEEN: list[dict[str, str]] = []


class Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        SEEN.append({name.lower(): value for name, value in self.headers.items()})
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status = 404 if self.path == "/missing" else 200
        if self.path == "/large":
            body = b"x" * (MAX_REPLY + 1)
        self.send_response(status)
        self.send_header("X-Kind", "echo")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


async def test_the_answer_has_status_headers_and_body(url: str) -> None:
    reply = await http("post", f"{url}/x", body="grüß")
    assert (reply.status, reply.body, reply.headers["x-kind"]) == (200, "grüß", "echo")
    assert (await http("POST", f"{url}/missing", body=b"\xff")).status == 404


async def test_a_repeat_carries_the_same_key(url: str) -> None:
    performing = Performing("7/0", "p.http#0")
    for _ in range(2):
        with performing:
            await http("POST", url, body="")
    assert [seen["idempotency-key"] for seen in SEEN[-2:]] == [performing.idempotency_key] * 2


def test_a_secret_is_looked_up_inside(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPEX_TEST_TOKEN", "hush")
    headers = {"Authorization": Secret("env:DSPEX_TEST_TOKEN")}
    http("POST", url, body="", headers=headers)
    assert SEEN[-1]["authorization"] == "hush"
    before = request_of("http", ("POST", url), {"headers": headers})
    monkeypatch.setenv("DSPEX_TEST_TOKEN", "other")
    assert request_of("http", ("POST", url), {"headers": headers}) == before
    assert http._hidden == [(2, "headers")], "a header may hold what no log should"
    with pytest.raises(EffectFailed, match="no secret at env:DSPEX_NOT_SET"):
        http("POST", url, headers={"A": Secret("env:DSPEX_NOT_SET")})


@pytest.mark.parametrize(
    ("address", "words"),
    [("file:///etc/passwd", "no http"), ("http://127.0.0.1:9/", "got no answer"), ("{url}/large", "more than 524,288")],
)
def test_what_gives_no_answer_is_a_failed_effect(url: str, address: str, words: str) -> None:
    with pytest.raises(EffectFailed, match=words):
        http("POST", address.format(url=url), body="", timeout=2)
