"""The report in a real browser, where there is one: nothing is fetched, nothing runs, and the page fits a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest

from secateur.reporting.report import report
from test_report import HOSTILE, write_costs, write_model, write_profile, write_scores

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@dataclass(frozen=True)
class Visit:
    """What a browser did with a page: console messages, addresses that the page asked for, and its DOM at the end."""

    console: list[str]
    requests: list[str]
    dom: str


def visit(page: Path, scratch: Path, width: int = 1200) -> Visit:
    log = scratch / "net.json"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={scratch / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr"]
    command += [f"--window-size={width},900", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    text = log.read_text()
    events = json.loads(text if text.rstrip().endswith("}") else text.rstrip().rstrip(",") + "]}")["events"]
    # The browser's own requests, for updates and the like, say that they come from no origin.
    asked = [e["params"] for e in events if {"url", "initiator"} <= (e.get("params") or {}).keys()]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(console, [item["url"] for item in asked if item["initiator"] != "not an origin"], done.stdout)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which every name that comes from data is hostile."""
    run = tmp_path_factory.mktemp("browser") / "run"
    script, quotes, turned = HOSTILE[0].replace("/", ""), HOSTILE[1], HOSTILE[2]
    write_profile(run, "tiny")
    names = ["tiny-8-healed", "tiny-6-healed", "tiny-2-healed"]
    for name in names:
        write_model(run, name, int(name[5]), healed=True, base_model=quotes)
    write_model(run, f"{script}-4-healed", 4, healed=True, base_model=HOSTILE[0])
    write_costs(run, names)
    tasks = ((HOSTILE[0], turned, quotes, 9), ("n" * 10_000, HOSTILE[5], turned, 9))
    for name in names:
        write_scores(run, name, tasks=tasks)
    write_scores(run, "hostile", (0.3, 0.4), tasks)
    (run / "study.yaml").write_text("\n".join(HOSTILE[:6]))
    return report(run)


def test_a_page_that_fetches_and_complains_is_seen_to(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("complaint")</script>')
    seen = visit(bad, tmp_path)
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert "complaint" in " ".join(seen.console)


def test_the_report_opens_without_a_request_or_a_word_on_the_console(page: Path, tmp_path: Path) -> None:
    seen = visit(page, tmp_path)
    assert seen.requests == []
    assert seen.console == []
    assert not re.search(r'<(script|iframe)\b|<img (?!src="data:image/png;)', seen.dom)
    assert html.escape(HOSTILE[0], quote=False) in seen.dom
    links = re.findall(r'href="(models/[^"]*)"', seen.dom)
    assert links
    assert all((page.parent / unquote(link)).is_dir() for link in links)


MEASURE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("header *, main *")].filter(
    (e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre, .long, .skip"));
  document.title = JSON.stringify({scroll: document.documentElement.scrollWidth, width: innerWidth,
    wide: wide.map((e) => e.outerHTML.slice(0, 80))});
})</script>"""


def test_on_a_phone_only_tables_and_code_scroll_sideways(page: Path, tmp_path: Path) -> None:
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    measured = tmp_path / "measured.html"
    measured.write_text(source.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    title = re.search("<title>(.*?)</title>", visit(measured, tmp_path, width=390).dom, re.DOTALL)
    assert title is not None
    found = json.loads(html.unescape(title[1]))
    assert found["wide"] == []
    assert found["scroll"] <= found["width"]
