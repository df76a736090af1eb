"""Shared test helpers: golden vectors, and no network for anything."""

import json
import os
import socket
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of a hub client

import numpy as np
import pytest

import focuslib  # noqa: F401  before any test imports a class of transformers that imports torchvision

GOLDEN = Path(__file__).parent / "golden"
LOCAL = {None, "", "localhost", "127.0.0.1", "0.0.0.0", "::1", "::"}
network_calls: list[str] = []


def load_golden(name: str) -> tuple[dict, dict]:
    """Arrays and meta data of one golden file."""
    with np.load(GOLDEN / f"{name}.npz") as data:
        arrays = {key: data[key] for key in data.files if key != "meta"}
        return arrays, json.loads(str(data["meta"])) if "meta" in data.files else {}


@pytest.fixture
def golden():
    return load_golden


def _refuse_network() -> None:
    """Let this process look up and connect to nothing but itself, and note every attempt."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def refuse(host) -> None:
        if (host.decode() if isinstance(host, bytes) else host) not in LOCAL:
            network_calls.append(str(host))
            raise OSError(f"a test called {host}")

    def local_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(address[0])
        return connect(self, address)

    def local_look_up(host, *arguments, **options):
        refuse(host)
        return look_up(host, *arguments, **options)

    socket.socket.connect, socket.getaddrinfo = local_connect, local_look_up


_refuse_network()


@pytest.fixture(autouse=True)
def no_network():
    """A test that tries to call out fails, also where the code under test survives the refusal."""
    network_calls.clear()
    yield
    assert network_calls == []


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory):
    """Name of tiny_families.CHECKPOINTS, layers of its tower → its folder, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("families")

    def checkpoint(name: str, tower: int | None = None) -> Path:
        from tiny_families import write_checkpoint

        if name == "smolvlm":
            pytest.importorskip("num2words")
        path = folder / name if tower is None else folder / f"tower{tower}" / name
        return path if path.exists() else write_checkpoint(name, path, tower)

    return checkpoint
