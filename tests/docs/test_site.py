# SPDX-License-Identifier: Apache-2.0
"""The site, as `.ci/docs` builds it: without a warning, and readable on a phone and on a desktop.

Needs the extra `docs` and what the doors of frameworks need; Chromium, for how pages look.
"""

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENS = {"phone": (390, 844), "desktop": (1280, 800)}

if not (ROOT / ".ci/docs").exists():
    pytest.skip("no site beside the tests", allow_module_level=True)
for package in ("sphinx", "furo", "myst_parser", "numpydoc", "torch", "transformers", "jax"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site, without proxies: whatever asks for the network fails."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [ROOT / ".ci/docs", folder],
        env=os.environ | dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_every_public_name_has_a_place(site):
    modules = [path.stem for path in (ROOT / "docs/api").glob("fastattn*.md")]
    packages = {path.name.removesuffix(".py") for path in (ROOT / "python/fastattn").glob("[a-z]*")}
    doors = {f"fastattn.{x}" for x in packages - {"bench", "kv_cache", "py.typed"}}
    assert set(modules) == doors | {"fastattn"}  # the caches are in fastattn, bench is a command
    for name in modules:
        text = (site / f"docs/api/{name}.html").read_text()
        names = getattr(importlib.import_module(name), "__all__", ["attention"])
        absent = [x for x in names if f'id="{name}.{x}"' not in text and not x.startswith("__")]
        assert absent == (["reference"] if name == "fastattn" else [])  # has a page of its own


@pytest.mark.parametrize("screen", SCREENS)
def test_no_page_is_wider_than_the_screen_or_asks_for_anything(screen, site, browser):
    width, height = SCREENS[screen]
    page = browser.new_page(viewport={"width": width, "height": height})
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    for path in site.rglob("*.html"):
        if "_modules" not in path.parts and path != site / "index.html":  # it leads on at once
            page.goto(path.as_uri(), wait_until="load")
            if page.evaluate("document.documentElement.scrollWidth") > width:
                wrong.append(f"{path.relative_to(site)} is wider")
    page.close()
    assert not wrong
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]


@pytest.mark.parametrize("screen", SCREENS)
def test_first_screen_says_what_it_is_how_to_install_it_and_which_door(screen, site, browser):
    width, height = SCREENS[screen]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto((site / "index.html").as_uri())
    page.wait_for_url("**/docs/index.html")
    for text in ("Exact softmax attention", "pip install .", "fastattn --help"):
        box = page.locator("article").get_by_text(text).first.bounding_box()
        assert box, text
        assert box["x"] + box["width"] <= width, text
        assert box["y"] + box["height"] <= height, text
    page.close()
