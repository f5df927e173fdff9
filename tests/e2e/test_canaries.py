"""Secrets planted wherever a system is given one, and looked for in everything that comes out of it."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.console.shells import environment
from tests.e2e.plain import Plain
from tests.e2e.running import children, command

from dspex.bus.server import Server

PROGRAM = '''
from dspex import Private, Program, ProgramFailed, Schema, Secret, effect, http, reveal

@effect(private=True)
async def hidden(word: str) -> str:
    return word + "!"

class Keeper(Program):
    """Handles secrets."""
    class Input(Schema):
        url: str
        ssn: Private[str]
        token: Secret
        do: str = ""
    class Output(Schema):
        status: int
        said: Private[str]
    async def predict(self, input):
        reply = await http("POST", input.url, headers={"Authorization": Secret("env:CANARY_ENV"), "X-Other": input.token})
        if input.do == "raise":
            raise ValueError(f"{input.ssn} and {reveal(input.token)}")
        if input.do == "missing":
            await http("POST", input.url, headers={"Authorization": Secret("env:NOT_THERE")})
        return self.Output(status=reply.status, said=await hidden(input.ssn))
'''
PLANTED = {name: f"CANARY-{name}-5e1f" for name in ("url", "env", "file", "master-0123456789-0123456789-01", "private", "header")}
SEEN: list[dict[str, str]] = []


class Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        SEEN.append({name.lower(): value for name, value in self.headers.items()})
        self.send_response(204)
        self.end_headers()

    def log_message(self, *words: Any) -> None:
        pass


def forms(secret: str) -> list[bytes]:
    """As it is, and in base64 whatever it begins at."""
    raw = secret.encode()
    return [raw, *(base64.b64encode(b"x" * shift + raw)[4 if shift else 0 : -4] for shift in range(3))]


def planted_in(texts: dict[str, bytes]) -> list[tuple[str, str]]:
    return [
        (name, where) for name, secret in PLANTED.items() for where, text in texts.items()
        if any(form in text for form in forms(secret))
    ]  # fmt: skip


def below(pid: int) -> list[int]:
    return [each for child in children(pid) for each in (child, *below(child))]


async def _work(url: str, body: dict[str, Any], said: dict[str, bytes]) -> list[str]:
    """Tasks through every door, good and bad; what is answered."""
    tasks = []
    async with await Plain.connect(url) as plain:
        # A value that is private is answered to who asks for it; the rest of what comes back is for everybody.
        assert (await plain.ask("keeper", body)).json["said"] == f"{PLANTED['private']}!"
        headers = {"Authorization": PLANTED["header"], "Dspex-Key": "k"}
        for more in ({"do": "raise"}, {"do": "missing"}, {"token": PLANTED["file"]}, {"ssn": [PLANTED["private"]]}):
            reply = await plain.ask("keeper", body | more)
            assert reply.code
            said[f"ask {more.get('do') or list(more)}"] = reply.body + repr(reply.headers).encode()
        task = await plain.submit("keeper", body, headers=headers)
        tasks.append(str(task))
        await plain.final("keeper", task)
        wrong = await plain.submit("keeper", body | {"token": PLANTED["file"]})
        reply = await plain.final("keeper", wrong)
        said["a secret in its reference's place"] = reply.body + repr(reply.headers).encode()
        said["discovery"] = json.dumps([await plain.discover(verb) for verb in ("STATS", "INFO", "PING")]).encode()
        for position in (task, wrong):  # what came in the open goes when its task has ended
            async with asyncio.timeout(60):
                while b'"error"' not in (await _message(plain, position)):
                    await asyncio.sleep(0.05)
    return tasks


async def _message(plain: Plain, position: int) -> bytes:
    return (await plain.nc.request("$JS.API.STREAM.MSG.GET.DSPEX", json.dumps({"seq": position}).encode(), timeout=30)).data


@pytest.mark.timeout(300)
def test_no_secret_comes_out_anywhere(tmp_path: Path) -> None:
    web = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    (tmp_path / "rules.conf").write_text(f'authorization {{ user: system, password: "{PLANTED["url"]}" }}\n')
    token = tmp_path / "token"
    token.write_text(PLANTED["file"])
    token.chmod(0o600)
    (tmp_path / "keeper.py").write_text(PROGRAM)
    (tmp_path / "dspex.toml").write_text('[privacy]\nkey = "env:CANARY_MASTER"\n[programs.keeper]\napp = "keeper.py"\nagents = 2\n')
    where = environment(CANARY_ENV=PLANTED["env"], CANARY_MASTER=PLANTED["master-0123456789-0123456789-01"])
    texts: dict[str, bytes] = {}

    def dspex(*arguments: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-m", "dspex", *arguments], cwd=tmp_path, env=where, capture_output=True, text=True, check=False
        )
        texts[f"dspex {arguments}"] = (ran.stdout + ran.stderr).encode()
        return ran.stdout

    with Server(tmp_path / "nats", access=tmp_path / "rules.conf") as server:
        url = server.url.replace("//", f"//system:{PLANTED['url']}@")
        with (tmp_path / "up.err").open("wb") as errors:
            up = subprocess.Popen(
                [sys.executable, "-m", "dspex", "up", "--nats", url, "--json"], cwd=tmp_path, env=where,
                stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        try:
            assert up.stdout
            texts["ready"] = up.stdout.readline()
            assert json.loads(texts["ready"])["nats"] == server.url
            body = {"url": f"http://127.0.0.1:{web.server_port}", "ssn": PLANTED["private"], "token": f"file:{token}"}
            tasks = asyncio.run(_work(url, body, texts))
            assert SEEN[0]["authorization"] == PLANTED["env"] and SEEN[0]["x-other"] == PLANTED["file"], "they were used"
            pids = [up.pid, *below(up.pid)]
            titles = [command(pid) for pid in pids]
            assert len([title for title in titles if title.startswith("dspex: agent keeper-")]) == 2, titles
            assert {title.split("-")[0] for title in titles} >= {"dspex: root", "dspex: supervisor", "dspex: registrar"}
            texts["titles"] = "\n".join(titles).encode()
            for arguments in (("ps",), ("events", tasks[0]), ("tasks",), ("doctor",), ("vars", "keeper"), ("dlq", "ls")):
                dspex(*arguments, "--nats", url, "--json")
            dspex("ask", "keeper", "text=x", "--nats", url.replace("system:", "nobody:"))
            dspex("up", "--nats", url, "--port", "4222")
            texts["system.json"] = (tmp_path / ".dspex" / "system.json").read_bytes()
        finally:
            up.send_signal(signal.SIGTERM)
            assert up.wait(60) == 0
            web.shutdown()
            web.server_close()
        assert up.stdout
        texts["stdout"] = up.stdout.read()
        up.stdout.close()
    kept = [file for folder in (".dspex", "nats") for file in (tmp_path / folder).rglob("*") if file.is_file()]
    for file in [*kept, tmp_path / "up.err"]:
        if file.name != "nats.conf":  # the server's own, with its own password
            texts[str(file.relative_to(tmp_path))] = file.read_bytes()
    assert any(name.endswith("archive.db") for name in texts) and any("DSPEX" in name for name in texts)
    assert planted_in(texts) == []
