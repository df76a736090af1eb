"""Shared test helpers: golden vectors, and no network for anything."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of a hub client

import numpy as np
import pytest

import focuslib  # noqa: F401  before any test imports a class of transformers that imports torchvision

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> tuple[dict, dict]:
    """Arrays and meta data of one golden file."""
    with np.load(GOLDEN / f"{name}.npz") as data:
        arrays = {key: data[key] for key in data.files if key != "meta"}
        return arrays, json.loads(str(data["meta"])) if "meta" in data.files else {}


@pytest.fixture
def golden():
    return load_golden
