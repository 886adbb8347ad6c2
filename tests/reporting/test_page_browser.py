"""The report page in a browser, where one is installed: widths, colour schemes, switching, and no complaints."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm.reporting.page.page import write_report
from tests.helpers.html_pages import LAYERS, log_lines, write_full_run, write_lines, write_masks

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=5000",
    "--window-size=1400,1000",
]  # fmt: skip
# a window is never narrower than 500 pixels, a frame is; the page's own policy lets no test script in
FRAME = """<!DOCTYPE html><iframe id="frame" src="report.html" width="{width}" height="900" style="border:0"></iframe>
<pre id="found"></pre><script>
document.getElementById("frame").addEventListener("load", (event) => {{
  const view = event.target.contentWindow, page = view.document;
  const found = () => ({{
    wide: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    panels: [...page.querySelectorAll(".panel")].filter((e) => e.offsetParent).map((e) => e.className),
    ground: view.getComputedStyle(page.body).backgroundColor,
    beyond: [...page.querySelectorAll("main *")].filter((e) => e.getBoundingClientRect().right > {width} + 1
      && e.getBoundingClientRect().width && !e.closest(".scroll")).map((e) => e.outerHTML.slice(0, 80)),
    covered: [...page.querySelectorAll(".chart")].flatMap((chart) => {{
      const boxes = [...chart.querySelectorAll(".end")].map((e) => e.getBoundingClientRect()).filter((b) => b.width);
      return boxes.filter((a, i) => boxes.slice(i + 1).some((b) => a.top < b.bottom - 1 && b.top < a.bottom - 1));
    }}).length,
    ends: [...page.querySelectorAll(".panel .end")].filter((e) => e.getBoundingClientRect().width).length,
    first: [".flops-whole .chart", "#runs table", "#runs thead th"]
      .map((name) => page.querySelector(name).getBoundingClientRect())
      .map((box) => [box.left, box.top, box.right, box.bottom]),
    small: [...page.querySelectorAll("svg text")].map((e) => e.getBoundingClientRect().height)
      .filter((height) => height && height < 9).length,
  }});
  const before = found();
  page.getElementById("x-tokens").click();
  page.getElementById("z-half").click();
  for (const details of page.querySelectorAll("details")) details.open = true;
  const chart = page.querySelector(".tokens-half .chart"), box = chart.getBoundingClientRect();
  const move = new view.PointerEvent("pointermove", {{ clientX: box.right, clientY: box.top + 5 }});
  chart.dispatchEvent(move);
  const read = page.querySelector(".tokens-half output").textContent;
  document.getElementById("found").textContent = JSON.stringify({{ before, after: found(), read }});
}});
</script>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page of a run of long names and of one that is broken."""
    folder = tmp_path_factory.mktemp("browser")
    run = write_full_run(folder / ("a-run-whose-name-is-long-" * 6), command="x" * 400)
    names = {f"{name}.{'branches.' * 3}0": value for name, value in LAYERS.items()}
    write_masks(run, names=names)
    broken = write_full_run(folder / "broken")
    write_lines(broken / "metrics.jsonl", [{**line, "loss": float("nan")} for line in log_lines(40)])
    (broken / "summary.json").write_text("{" * 300)
    write_report([run, broken], folder / "report.html")
    return folder


def look(folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """What a frame of that width shows."""
    assert CHROMIUM is not None
    (folder / "frame.html").write_text(FRAME.format(width=width))
    profile = folder / f"profile-{width}-{dark}"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={int(not dark)}"]
    command += ["--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    text = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)[0]
    found: dict[str, Any] = json.loads(html.unescape(text))
    return found


@pytest.mark.parametrize(("width", "dark"), [(320, False), (390, True), (1440, False)])
def test_the_page_in_a_browser(folder: Path, width: int, dark: bool) -> None:
    found = look(folder, width, dark)
    for state in (found["before"], found["after"]):
        assert state["wide"] == 0
        assert state["beyond"] == []
        assert state["small"] == 0
        assert state["covered"] == 0
        assert state["ends"] == 2
        assert state["ground"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    assert found["before"]["panels"] == ["panel flops-whole"]
    assert found["after"]["panels"] == ["panel tokens-half"]
    last = [line for line in log_lines() if "loss" in line][-1]
    assert f"step 6: training loss {last['loss']:.6g}" in found["read"]


def test_what_the_first_screen_shows(tmp_path: Path) -> None:
    runs = [write_full_run(tmp_path / name) for name in ("dense", "sparse")]
    summary = json.loads((runs[1] / "summary.json").read_text())
    numbers = {key: 2 * value for key, value in summary.items() if isinstance(value, int | float)}
    (runs[1] / "summary.json").write_text(json.dumps({**summary, **numbers, "step": 6}))  # as many rows as there can be
    write_report(runs, tmp_path / "report.html")
    chart, table, ratio = look(tmp_path, 1440, False)["before"]["first"]
    assert table[2] <= chart[0]  # side by side
    assert max(table[3], chart[3]) <= 900
    chart, table, ratio = look(tmp_path, 390, False)["before"]["first"]
    assert chart[1] > table[3]  # below each other, the curve wide enough to be read
    assert chart[2] - chart[0] > 390 / 2
    assert ratio[2] < 390 / 2  # the ratio needs no scrolling


def test_complaints_are_noticed(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    try:
        (folder / "report.html").write_text(
            page.replace("</main>", "<p>" + "x" * 900 + "</p><script>1</script></main>")
        )
        with pytest.raises(AssertionError, match="CONSOLE"):  # the policy forbids a script that is not the page's
            look(folder, 380, False)
    finally:
        (folder / "report.html").write_text(page, encoding="utf-8")
