"""A browser without a screen, for tests that look and click."""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Browser]:
    """That of this machine. Where there is none the test is skipped, or fails in CI."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        missing = "no browser: install Debian's package chromium, or Google Chrome"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    as_root = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=as_root)
        try:
            yield browser
        finally:
            browser.close()


def keep(page: Page, name: str) -> None:
    """What is in sight, as a small picture in the folder that LMSAT_SCREENSHOTS names, if any."""
    if folder := os.environ.get("LMSAT_SCREENSHOTS"):
        page.wait_for_timeout(1000)
        shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        shown.thumbnail((1280, 1280))
        shown.quantize(64, dither=Image.Dither.NONE).save(
            Path(folder) / f"{name}.png", optimize=True
        )
