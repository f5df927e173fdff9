"""A real foreign client: JavaScript with the libraries from npm, sharing no code with dspex."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tests.e2e.plain import Plain
from tests.e2e.running import HERE, Running

PLANS = [("Nap", 2)]

JS = HERE / "js"
FILES = ("package.json", "package-lock.json", "client.mjs")


def give_up(why: str) -> NoReturn:
    """Skip, unless the environment says that node has to be there."""
    if os.environ.get("DSPEX_REQUIRE_NODE") == "1":
        pytest.fail(f"{why}, and DSPEX_REQUIRE_NODE is 1")
    pytest.skip(f"{why}: the client in JavaScript is not tested")


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest) -> Path:
    """`client.mjs` beside its libraries: as installed by hand, else once in a cache."""
    if not shutil.which("node"):
        give_up("node is not installed")
    if (JS / "node_modules").is_dir():
        return JS / "client.mjs"
    assert request.config.cache
    given = os.environ.get("DSPEX_JS_MODULES")
    folder = Path(given) if given else Path(request.config.cache.mkdir("dspex-js"))
    folder.mkdir(parents=True, exist_ok=True)
    lock = (JS / "package-lock.json").read_bytes()
    installed = folder / "node_modules"
    fresh = installed.is_dir() and (folder / "package-lock.json").is_file()
    if not fresh or (folder / "package-lock.json").read_bytes() != lock:
        if not shutil.which("npm"):
            give_up("npm is not installed")
        for name in FILES:
            shutil.copy(JS / name, folder / name)
        command = ["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
        if done.returncode:
            shutil.rmtree(installed, ignore_errors=True)
            give_up(f"npm could not install the libraries ({done.stderr.strip()[-300:]})")
    shutil.copy(JS / "client.mjs", folder / "client.mjs")
    return folder / "client.mjs"


@pytest.fixture(scope="module")
def seen(client: Path, shared: Running) -> dict[str, Any]:
    """What the client saw in one run."""
    run = subprocess.run(["node", str(client), shared.url], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_it_submits_and_reads_the_result(seen: dict[str, Any]) -> None:
    assert seen["submitted"]["stream"] == "DSPEX"
    result = seen["result"]
    assert result["body"]["n"] == 41
    assert result["task"] == str(seen["submitted"]["task"]) and not result.get("code")


def test_its_key_is_one_run(seen: dict[str, Any]) -> None:
    first, second = seen["byKey"]
    assert first == second and first["task"] in map(str, seen["keyed"])


def test_it_asks(seen: dict[str, Any]) -> None:
    assert seen["asked"]["body"]["n"] == 7 and seen["asked"]["task"]


def test_it_is_told_what_is_wrong(seen: dict[str, Any]) -> None:
    refused = seen["refused"]
    assert refused["code"] == "400" and refused["body"]["error"]["message"] == refused["error"]
    assert "n:" in refused["error"]
    assert seen["rubbish"]["code"] == "400" and "not JSON" in seen["rubbish"]["error"]
    assert (seen["unknown"]["code"], seen["unknown"]["body"]["error"]["type"]) == ("404", "NotFound")


def test_it_learns_at_once_that_a_program_is_not_there(seen: dict[str, Any]) -> None:
    for name in ("nobody", "nowhere"):
        assert seen[name]["name"] in ("NoRespondersError", "RequestError", "JetStreamNotEnabled")


def test_it_scores_a_task_and_reads_its_story(seen: dict[str, Any]) -> None:
    types = [event["type"] for event in seen["story"]]
    assert types == ["TaskSubmitted", "TaskClaimed", "TaskCompleted", "OutcomeReported"]
    assert seen["story"][-1]["position"] == seen["scored"]
    assert seen["story"][-1]["data"]["outcome"]["feedback"] == "from JavaScript"
    assert seen["story"][0]["data"]["input"] == {"n": 41}


def test_it_reads_the_log(seen: dict[str, Any]) -> None:
    page = seen["page"]
    assert page["events"][0]["position"] == seen["submitted"]["task"]
    assert page["next"] > 0 and page["head"] <= seen["head"]["head"] and page["epoch"] == seen["head"]["epoch"]


def test_it_finds_the_agents_and_their_schemas(seen: dict[str, Any]) -> None:
    assert {answer["name"] for answer in seen["ping"]} == {"nap", "dspex-registrar", "dspex-archivist"}
    assert len(seen["info"]) == 2
    (ask,) = [endpoint for endpoint in seen["info"][0]["endpoints"] if endpoint["name"] == "ask"]
    assert json.loads(ask["metadata"]["input_schema"])["properties"]["n"]["type"] == "integer"


async def test_the_log_agrees_with_what_it_saw(seen: dict[str, Any], plain: Plain) -> None:
    story = await plain.until_ended("nap")
    story.check_once("nap", [seen["submitted"]["task"], *seen["keyed"]])
    assert story.outputs("nap")[seen["submitted"]["task"]] == seen["result"]["body"]


async def test_many_of_them_at_once(client: Path, shared: Running, seen: dict[str, Any]) -> None:
    async def run() -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            "node", str(client), shared.url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        found: dict[str, Any] = json.loads(out)
        return found

    for other in await asyncio.gather(run(), run(), run()):
        assert other["byKey"][0]["body"] == seen["byKey"][0]["body"]
