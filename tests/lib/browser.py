"""A headless browser: what a page shows once it is loaded, and which of its images, files and links
are broken."""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--allow-file-access-from-files", "--virtual-time-budget=10000",
]  # fmt: skip
# Before anything else of the page: note what fails to load. At its end: write down what came out.
AT_START = """<script>window.failed = [];
window.addEventListener("error", e => failed.push(
  (e.target && (e.target.src || e.target.href)) || e.message
), true);</script>"""
AT_END = """<script>window.addEventListener("load", async () => {
const images = [...document.images];
images.forEach(image => { image.loading = "eager"; });
await Promise.all(images.map(image => image.complete || new Promise(
  done => { image.onload = image.onerror = done; }
)));
const seen = {
  title: document.title, text: document.body.innerText, failed: window.failed,
  images: images.map(image => [
    image.getAttribute("src").slice(0, 200), image.naturalWidth, image.getBoundingClientRect().width
  ]),
  links: [...document.querySelectorAll("a[href]")].map(a => a.href),
  ids: [...document.querySelectorAll("[id]")].map(e => e.id),
  width: [document.documentElement.scrollWidth, window.innerWidth],
};
const out = document.createElement("script");
out.type = "application/json"; out.id = "seen-by-the-test";
out.textContent = JSON.stringify(seen).replace(/</g, "\\\\u003c");
document.body.append(out);
});</script>"""


def find_browser() -> str:
    """The browser's program. Without one the test is skipped, but never in CI, where it must have
    run."""
    for name in NAMES:
        if (program := shutil.which(name)) is not None:
            return program
    if os.environ.get("CI"):
        pytest.fail(f"no headless browser, needed in CI: {' | '.join(NAMES)}")
    pytest.skip(f"no headless browser: {' | '.join(NAMES)}")


@dataclass(frozen=True)
class Seen:
    """A loaded page. `images`: (source, own width, width on the page); `links`: whole addresses;
    `failed`: what did not load."""

    title: str
    text: str
    failed: list[str]
    images: list[tuple[str, int, float]]
    links: list[str]
    ids: list[str]
    width: tuple[int, int]

    @property
    def broken_images(self) -> list[str]:
        return [source for source, own, shown in self.images if not own or not shown]


def visit(page: Path, folder: Path) -> Seen:
    """Load a local page; `folder` is for the browser's own files."""
    text = page.read_text(encoding="utf-8")
    head = text.index(">", text.index("<head")) + 1
    end = text.rindex("</body>")
    copy = page.with_name(f"seen-{page.name}")  # beside it, so that relative addresses hold
    copy.write_text(text[:head] + AT_START + text[head:end] + AT_END + text[end:], encoding="utf-8")
    try:
        command = [find_browser(), *FLAGS, f"--user-data-dir={folder}", "--dump-dom", copy.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    finally:
        copy.unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    _, found, rest = done.stdout.partition('id="seen-by-the-test">')
    assert found, f"{page.name} did not load: {done.stdout[:500]}"
    seen = json.loads(html.unescape(rest.partition("</script>")[0]))
    seen["links"] = [link.replace(copy.name, page.name) for link in seen["links"]]
    return Seen(**seen)


def broken_links(pages: dict[Path, Seen]) -> list[str]:
    """Links of these pages to local files that are not there, or to anchors that the page they lead
    to does not have."""
    broken = []
    for page, seen in pages.items():
        for link in seen.links:
            parts = urlsplit(link)
            if parts.scheme != "file":
                continue
            target = Path(unquote(parts.path))
            if not target.is_file():
                broken.append(f"{page.name}: {link}")
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].ids
            ):
                broken.append(f"{page.name}: {link} (no such place)")
    return broken
