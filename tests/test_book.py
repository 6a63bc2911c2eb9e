"""The HTML book, built with warnings as errors and opened page by page in headless Chromium."""

import functools
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import build
import pytest
import torch
from playwright.sync_api import expect

import chapters

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(path.stem for path in (ROOT / "chapters").glob("*.ipynb"))
PAGES = [path.stem for path in sorted((ROOT / "book").glob("*.md"))]
PAGES += [f"chapters/{name}" for name in CHAPTERS]
FORMULAE = "document.querySelectorAll('.math')"
ALL_RENDERED = f"[...{FORMULAE}].every(formula => formula.querySelector('mjx-container'))"
IMAGES = """[...document.querySelectorAll('article img')].map(
    image => ({width: image.naturalWidth, height: image.naturalHeight, alt: image.alt}))"""
# the text of a page without its code and its formulae: nothing in it may be left unrendered
PROSE = """(() => {
    const article = document.querySelector('article').cloneNode(true);
    article.querySelectorAll('pre, code, .math, script').forEach(node => node.remove());
    return article.textContent;
})()"""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and prints nothing."""

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Path:
    """The folder of the built book; the build fails on any warning."""
    output = tmp_path_factory.mktemp("book")
    command = [sys.executable, str(ROOT / "book" / "build.py"), str(output)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return output / "html"


@pytest.fixture(scope="session")
def address(book):
    """The book's address on a server of this process."""
    handler = functools.partial(QuietHandler, directory=str(book))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def page(chromium, address):
    """A new page that reports, when it closes, every error and every request to another host."""
    faults = []

    def guard(route):
        if urlsplit(route.request.url).netloc in {urlsplit(address).netloc, ""}:
            route.continue_()
        else:
            faults.append(f"asks another host for {route.request.url}")
            route.abort()

    def answered(response):
        if response.status >= 400:
            faults.append(f"{response.status}: {response.url}")

    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.route("**/*", guard)
    opened = context.new_page()
    opened.on("console", lambda message: message.type == "error" and faults.append(message.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("response", answered)
    yield opened
    context.close()
    assert faults == []


def test_a_chapter_is_stored_with_its_provenance_which_the_page_tells(tmp_path):
    source = tmp_path / "chapters" / "01_toy.py"
    source.parent.mkdir()
    source.write_text("# %% [markdown]\n# # 1 Toy\n#\n# {{measured}}\n\n# %%\nprint(1 + 1)\n")
    chapters.build(source)
    results = json.loads((tmp_path / "data" / "results" / "chapters.json").read_text())
    about = results["01_toy"]
    assert about["command"] == "python book/chapters.py chapters/01_toy.py"
    assert about["cores"] == chapters.usable_cores() and about["seconds"] > 0
    line = build.machines(results)
    assert about["cpu"] in line and "python 3." in line and f"torch {torch.__version__[:3]}" in line


def test_changed_prose_keeps_outputs_and_changed_code_does_not(tmp_path):
    source = tmp_path / "chapters" / "01_toy.py"
    source.parent.mkdir()
    text = "# %% [markdown]\n# # 1 Toy\n#\n# {{measured}}\n\n# %%\nprint(1 + 1)\n"
    source.write_text(text)
    assert chapters.main([str(source), "--prose"]) == 1  # it never ran
    assert chapters.main([str(source)]) == 0
    source.write_text(text.replace("Toy", "Game"))
    assert chapters.main([str(source), "--prose"]) == 0
    stored = json.loads(source.with_suffix(".ipynb").read_text())
    assert "Game" in "".join(stored["cells"][0]["source"]) and stored["cells"][1]["outputs"]
    assert chapters.differences(source) == []
    source.write_text(text.replace("1 + 1", "1 + 2"))
    assert chapters.main([str(source), "--prose"]) == 1


@pytest.mark.parametrize("name", PAGES)
def test_page_is_whole(page, address, name):
    page.goto(f"{address}/{name}.html", wait_until="load")
    page.wait_for_function(ALL_RENDERED, timeout=60_000)
    assert page.locator("mjx-merror, mjx-container [data-mjx-error]").count() == 0
    assert page.locator("mjx-container [mathcolor='red']").count() == 0
    prose = page.evaluate(PROSE)
    for unrendered in ("$", "{cite", "{{", "</details>", "<summary>"):
        assert unrendered not in prose
    for image in page.evaluate(IMAGES):
        assert image["width"] > 0
        assert image["height"] > 0
        assert image["alt"].strip()


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_has_formulae_figures_and_folded_solutions(page, address, name):
    page.goto(f"{address}/chapters/{name}.html", wait_until="load")
    page.wait_for_function(f"{FORMULAE}.length > 0 && {ALL_RENDERED}", timeout=60_000)
    assert page.evaluate(IMAGES)
    solution = page.locator("details", has=page.get_by_text("Solution", exact=True)).first
    code = solution.locator("pre").first
    expect(code).to_be_hidden()
    solution.locator("summary").click()
    expect(code).to_be_visible()


def test_search_finds_a_word(page, address):
    page.goto(f"{address}/search.html?q=bilinear", wait_until="load")
    expect(page.locator("#search-results li a").first).to_be_visible()


def test_dark_mode_is_dark(page, address):
    brightness = """() => getComputedStyle(document.body).backgroundColor
        .match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3"""
    page.emulate_media(color_scheme="light")
    page.goto(f"{address}/index.html", wait_until="load")
    assert page.evaluate(brightness) > 200
    page.emulate_media(color_scheme="dark")
    page.reload(wait_until="load")
    assert page.evaluate(brightness) < 60
