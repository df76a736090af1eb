"""A headless Chromium, and a folder that keeps what it saw."""

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "browser"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip

sys.path.insert(0, str(ROOT / "tests"))  # the helpers beside the other tests


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e .[browser]"
    )
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium, or say where it is in CHROMIUM")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page_of(browser):
    """Open a page of 1280 × 800; at the end of the test no error may have been written to its console."""
    pages, errors = [], []

    def open_page(**options):
        page = browser.new_context(viewport={"width": 1280, "height": 800}, **options).new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert errors == []


@pytest.fixture(scope="session")
def vlm():
    """The embedded model; an untrained one where it is not there."""
    from tiny_models import untrained_vlm

    from focuslib.models import TinyOnevision

    return TinyOnevision.load(TinyOnevision.checkpoint) if Path(TinyOnevision.checkpoint).is_dir() else untrained_vlm()
