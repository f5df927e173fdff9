"""Servers for tests: each on a free port, in a folder of its own, taken down afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How fast examples are made and run says something about the machine, and nothing about the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

pytest.register_assert_rewrite("dspex.store.contract", "tests.e2e.plain", "tests.e2e.running")

from tests.clusters import Cluster  # noqa: E402  (assertions first)

from dspex.bus.server import Server  # noqa: E402

LONG = {
    "test_soak", "test_chaos", "test_cluster", "test_reload", "test_resize", "test_limits", "test_poison", "test_upkeep",
    "test_clients", "test_workflows", "test_least_privilege", "test_secured_private", "test_rules_reload",
    "test_fuzzed_doors", "test_breakers", "test_backpressure", "test_stopping", "test_letters",
}  # fmt: skip
"""Files that take longest. They begin first, so that nobody waits for one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests of a module; tests keep apart by subject prefix."""
    server = Server(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.stop(grace=3.0)
    shutil.rmtree(server.data, ignore_errors=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of one's own, to be killed if need be."""
    server = Server(tmp_path / "nats")
    server.start()
    yield server
    server.stop(grace=3.0)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Makes servers, each in a folder under the test's; all are stopped afterwards."""
    made: list[Server] = []

    def make(folder: str = "nats", **options: Any) -> Server:
        made.append(Server(tmp_path / folder, **options))
        return made[-1]

    yield make
    for server in made:
        server.stop(grace=3.0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes small disks, each a folder of so many bytes under the test's; they are taken away afterwards."""
    made: list[Path] = []

    def make(size: int) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(mount, check=False).returncode:
            pytest.skip("a small disk needs root")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three for all tests of a module; tests keep apart by subject prefix."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.start()
    yield cluster
    cluster.stop()
    shutil.rmtree(cluster.data, ignore_errors=True)
