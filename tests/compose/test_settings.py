"""Settings: which one wins, and what is said of one that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspex.compose.settings import DEFAULT_URL, Settings, find_server, load_settings
from dspex.core.doors import Marks
from dspex.core.errors import ConfigurationError
from dspex.core.supervision import Intensity
from dspex.core.upkeep import Named, Upkeep


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and no context of the nats command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("NATS_CONTEXT", raising=False)
    return tmp_path


def load(environment: dict[str, str] | None = None, **flags: object) -> Settings:
    return load_settings(flags, environment=environment or {})


def test_without_anything_the_defaults() -> None:
    settings = load()
    assert (settings.data, settings.nats, settings.durability, settings.agents) == (Path(".dspex"), None, "power", 1)


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(here: Path) -> None:
    assert load().prefix == "dspex"
    (here / "dspex.toml").write_text('prefix = "file"\nagents = 3\n')
    assert load().prefix == "file"
    assert load({"DSPEX_PREFIX": "env"}).prefix == "env"
    assert load({"DSPEX_PREFIX": "env"}, prefix="flag").prefix == "flag"
    assert load({"DSPEX_PREFIX": ""}, prefix=None).prefix == "file"
    assert load().agents == 3


def test_where_the_log_is_can_be_set_everywhere(here: Path) -> None:
    assert load().log == "jetstream"
    (here / "dspex.toml").write_text('log = "sqlite"\n')
    assert load().log == "sqlite"
    assert load({"DSPEX_LOG": "papyrus"}).log == "papyrus"
    assert load({"DSPEX_LOG": "papyrus"}, log="jetstream").log == "jetstream"
    with pytest.raises(ConfigurationError, match=r"--log: log = '\.\./etc'"):
        load(log="../etc")


def test_programs_are_named_in_the_file(here: Path) -> None:
    (here / "dspex.toml").write_text('[programs.qa]\napp = "qa.py:QA"\nagents = 2\n')
    assert load().programs["qa"].agents == 2


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ('colour = "red"', "colour is not a setting"), ("agents = 0", "agents = 0"), ('durability = "some"', "durability"),
        ("[programs.qa]\nagents = 2", "programs.qa.app is missing"), ("agents = ", "dspex.toml"), ('prefix = "A B"', "prefix"),
        ('[programs.qa]\napp = "x"\ncolour = 1', "programs.qa.colour is not a setting"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_sentence_that_names_it(here: Path, file: str, words: str) -> None:
    (here / "dspex.toml").write_text(file)
    with pytest.raises(ConfigurationError) as refused:
        load()
    assert words in str(refused.value) and "dspex.toml" in str(refused.value) and "\n" not in str(refused.value)


def test_a_mistake_says_where_it_came_from() -> None:
    with pytest.raises(ConfigurationError, match="DSPEX_AGENTS: agents = 'many'"):
        load({"DSPEX_AGENTS": "many"})
    with pytest.raises(ConfigurationError, match="--agents: agents = 0"):
        load(agents=0)


def test_a_file_that_was_named_has_to_be_there(here: Path) -> None:
    with pytest.raises(ConfigurationError, match="no file"):
        load_settings({}, file=here / "other.toml", environment={})


def test_a_command_finds_the_server_that_is_named_then_the_one_that_is_here(here: Path) -> None:
    assert find_server(load()) == (DEFAULT_URL, "dspex")
    (here / "config" / "nats" / "context").mkdir(parents=True)
    (here / "config" / "nats" / "context.txt").write_text("mine\n")
    (here / "config" / "nats" / "context" / "mine.json").write_text(json.dumps({"url": "nats://context:4222"}))
    assert find_server(load())[0] == "nats://context:4222"
    (here / ".dspex").mkdir()
    note = {"nats": "nats://127.0.0.1:23456", "pid": 1, "prefix": "other"}
    (here / ".dspex" / "system.json").write_text(json.dumps(note))
    assert find_server(load()) == ("nats://127.0.0.1:23456", "other")
    assert find_server(load({"NATS_URL": "nats://env:4222"}))[0] == "nats://env:4222"
    assert find_server(load({"NATS_URL": "nats://env:4222"}, nats="nats://flag:4222"))[0] == "nats://flag:4222"


@pytest.mark.parametrize("rubbish", [b"", b"\xff", b"[]", b"{}", b'{"url": 5}', b"null"])
def test_a_context_or_a_note_that_is_rubbish_is_passed_over(here: Path, rubbish: bytes) -> None:
    (here / ".dspex").mkdir()
    (here / ".dspex" / "system.json").write_bytes(rubbish)
    (here / "config" / "nats" / "context").mkdir(parents=True)
    (here / "config" / "nats" / "context.txt").write_text("mine")
    (here / "config" / "nats" / "context" / "mine.json").write_bytes(rubbish)
    url, prefix = find_server(load())
    assert url in (DEFAULT_URL, "5") and prefix == "dspex"


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ('restart = "sometimes"', "programs.steady.restart = 'sometimes': input should be 'permanent', 'transient' or"),
        ('intensity = "often"', "programs.steady.intensity = 'often': value error, write it as restarts and seconds"),
        ('memory = "1MiB"', "[programs.steady]: memory = 1048576 bytes: an idle agent needs up to 64 MiB"),
        ('shutdown = "2h"', "[programs.steady]: shutdown = 7200: it is between 0 and 3600 s"),
        ("blocked_after = 0.5", "[programs.steady]: blocked_after = 0.5: agents beat once a second; take 2"),
        ('recycle_memory = "2GiB"\nmemory = "1GiB"', "at memory = 1073741824 an agent is ended before that"),
        ('[supervisors.a]\nchildren = ["nobody"]', "[supervisors.a]: there is no program nobody; there are steady"),
        ('[supervisors.steady]\nchildren = ["steady"]', "[supervisors.steady]: a program has this name already"),
        ('[supervisors.a]\nchildren = ["steady", "steady"]', "steady is under a twice; a child has one place"),
        ('[supervisors.a]\nchildren = ["b"]\n[supervisors.b]\nchildren = ["a"]', "a tree has no cycles"),
        ('intensity = "2/5s"\n[supervisors.a]\nchildren = ["steady"]', "intensity is not its own, because [supervisors.a]"),
        ("[supervisors.a]\nchildren = []", "[supervisors.a]: it has no children"),
    ],
)  # fmt: skip
def test_supervision_that_cannot_be_is_refused_with_a_sentence(tmp_path: Path, toml: str, sentence: str) -> None:
    file = tmp_path / "dspex.toml"
    file.write_text(f'[programs.steady]\napp = "qa.py"\n{toml}\n')
    with pytest.raises(ConfigurationError) as refused:
        settings = load_settings({}, file=file, environment={})
        settings.upkeep("steady")
        settings.named()
    assert sentence in str(refused.value)


def test_supervision_as_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "dspex.toml"
    file.write_text(
        '[programs.qabot]\napp = "qa.py"\nrestart = "transient"\nmemory = "512MiB"\ncpu = 1.5\nshutdown = "1m"\n'
        'recycle_after = "10000 tasks"\nrecycle_memory = "300MiB"\nblocked_after = "30s"\n'
        '[programs.reader]\napp = "qa.py"\nintensity = "3/10s"\n'
        '[supervisors.pair]\nstrategy = "rest_for_one"\nchildren = ["qabot"]\nintensity = "2/5s"\n'
    )
    settings = load_settings({}, file=file, environment={})
    assert settings.upkeep("qabot") == Upkeep(
        restart="transient", memory=512 << 20, cpu=1.5, shutdown=60.0, recycle_after=10_000, recycle_memory=300 << 20,
        blocked_after=30.0,
    )  # fmt: skip
    assert settings.upkeep("reader").intensity == Intensity(3, 10)
    assert settings.named() == (Named("pair", ("qabot",), "rest_for_one", Intensity(2, 5)),)


def test_the_doors_table_says_when_new_tasks_are_refused(here: Path) -> None:
    assert load().doors.marks() == Marks()
    (here / "dspex.toml").write_text(
        '[doors]\nhigh_water = "90%"\nmax_bytes = "1.5 GiB"\nroom = "64 MiB"\nmax_open = 500\n'
        '[programs.qabot]\napp = "qa.py"\nmax_queue = 20\n'
    )
    settings = load()
    marks = settings.doors.marks()
    assert (marks.high_water, marks.max_bytes, marks.room, marks.max_open) == (0.9, 3 << 29, 64 << 20, 500)
    assert marks.low_water < 0.9, "what is not said follows what is"
    assert settings.programs["qabot"].max_queue == 20


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('high_water = "120%"', "doors.high_water"), ('low_water = "85%"', "low_water 85% and high_water 80%"),
        ('room = "1 mile"', "doors.room"), ("max_open = 0", "doors.max_open"),
    ],
)  # fmt: skip
def test_marks_that_make_no_sense_are_refused_with_their_name(here: Path, line: str, words: str) -> None:
    (here / "dspex.toml").write_text(f"[doors]\n{line}\n")
    with pytest.raises(ConfigurationError, match=words):
        load()
