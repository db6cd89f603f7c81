"""The page of `rlad watch` and the report, in a real browser (Debian's Chromium; `make browser-deps`)."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from fake_run import HOSTILE, config_of, fake_metrics, fake_run, rollout_line, write_rollout_file

from rlad_megatron.config.recipe import to_yaml
from rlad_megatron.observe.metrics import MetricsWriter
from rlad_megatron.observe.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (make browser-deps)"),
]
DEADLINE_MS = 60_000  # for a machine several times slower


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox refuses root, who runs the tests in a container.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=os.getuid() != 0)
        yield browser
        browser.close()


@pytest.fixture
def watched(tmp_path):
    """Starts `rlad watch` on a folder; returns the address that it prints."""
    processes = []

    def start(run_dir):
        command = [sys.executable, "-m", "rlad_megatron.cli", "watch", str(run_dir), "--port=0"]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return re.search(r"http://127.0.0.1:\d+/\S+/", processes[-1].stdout.readline())[0]

    yield start
    for process in processes:
        process.terminate()
        process.wait(30)
        process.stdout.close()


@pytest.fixture
def page(browser, watched):
    """A page that fails the test for anything on the console, and for a request that would leave the machine.

    watched: it is closed before those servers end, of which it would complain.
    """
    said, asked = [], []
    context = browser.new_context()
    context.set_default_timeout(DEADLINE_MS)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    context.close()
    assert said == []
    allowed = ("http://127.0.0.1:", "file:///", "data:", "blob:")
    assert asked and not [url for url in asked if not url.startswith(allowed)]


def points_of(page, title):
    """x and y of the first curve of a figure that has been drawn."""
    return page.evaluate(
        """title => {
            const figures = [...document.querySelectorAll("#plots figure")];
            const plot = figures.find((it) => it.querySelector("h3").textContent === title)?.querySelector(".plot");
            return plot?.data ? [plot.data[0].x, plot.data[0].y] : null;
        }""",
        title,
    )


def wait_until(fact):
    deadline = time.monotonic() + DEADLINE_MS / 1000
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_page_follows_a_run_as_it_writes(page, watched, tmp_path):
    run_dir = tmp_path / "my_run"
    page.goto(watched(run_dir))
    page.get_by_text("not begun").wait_for()
    page.get_by_text("No step has been written yet.").wait_for()
    run_dir.mkdir()
    (run_dir / "lock").write_text("{}")
    (run_dir / "config.yaml").write_text(to_yaml(config_of(run_dir)))
    lines = fake_metrics(3)
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for line in lines[:2]:
            writer.write(line["step"], line)
        write_rollout_file(run_dir, 1, [rollout_line(1, 0)])
        page.get_by_text("running").wait_for()
        page.get_by_text("trrd (α = 0.5)").wait_for()
        wait_until(lambda: points_of(page, "Reward") == [[1], [1 / 3]] or points_of(page, "Reward") == [[1], [0.33333]])
        page.get_by_text("1 rollout", exact=True).wait_for()
        # A line of which half is there when the page asks.
        metrics = run_dir / "metrics.jsonl"
        text = json.dumps(lines[2] | {"grad_norm": 1.0, "rollout/cut_fraction": 0.9}) + "\n"
        with page.expect_request(re.compile("/news")) as asked, metrics.open("a") as file:
            file.write(text[:40])
        asked.value.response().finished()
        assert points_of(page, "Reward")[0] == [1]
        with metrics.open("a") as file:
            file.write(text[40:])
        write_rollout_file(run_dir, 2, [rollout_line(2, 0), rollout_line(2, 1)])
        wait_until(lambda: points_of(page, "Reward")[0] == [1, 2])
        page.get_by_text("3 rollouts", exact=True).wait_for()
        page.get_by_text("50% of the responses are cut off").wait_for()
        assert page.locator("#detail").get_by_text("kk/1/0").is_visible(), "the reader's choice stays"
        writer.truncate_after(1)  # a resume
        wait_until(lambda: points_of(page, "Reward")[0] == [1])
        writer.truncate_after(0)
        wait_until(lambda: "Reward" not in page.locator("#plots h3").all_inner_texts())
    (run_dir / "lock").unlink()
    page.get_by_text("stopped").wait_for()


def test_ten_thousand_rollouts_stay_usable(page, watched, tmp_path):
    run_dir = tmp_path / "my_run"
    fake_run(run_dir, 2)
    for step in range(1, 626):
        write_rollout_file(run_dir, step, [rollout_line(step, number) for number in range(16)])
    (run_dir / "config.yaml").write_text(to_yaml(config_of(run_dir)))
    write_rollout_file(run_dir, 300, [rollout_line(300, 0, response="a needle", solved=True)] * 16)
    page.goto(watched(run_dir))
    page.get_by_text("10,000 rollouts").wait_for()
    rows = page.locator("#rows li")
    assert rows.count() == 50 and rows.first.inner_text().startswith("Step 625")
    page.get_by_role("button", name="Older").click()
    page.get_by_text("51–100").wait_for()
    assert page.evaluate("document.querySelectorAll('*').length") < 3000, "only a page of them is in the document"
    for fill, value, found in (
        ("text", "NEEDLE", "16 rollouts"),
        ("text", "", "10,000 rollouts"),
        ("step", "7", "16 rollouts"),
    ):
        page.locator(f"[name={fill}]").fill(value)
        page.locator("#found", has_text=re.compile(f"^{found}$")).wait_for()
    page.locator("[name=step]").fill("1.5")
    page.wait_for_function("!document.getElementById('filters').checkValidity()")
    time.sleep(0.5)  # an answer that refuses it would be on the console
    assert page.locator("#found").inner_text() == "16 rollouts"
    page.locator("[name=step]").fill("7")
    page.locator("[name=solved]").select_option("false")
    page.locator("#found", has_text=re.compile("^1 rollout$")).wait_for()
    page.locator("[name=subset]").select_option("PPL3")
    page.locator("#found", has_text=re.compile("^0 rollouts$")).wait_for()


def colours(page):
    return page.eval_on_selector_all(".tokens span", "spans => spans.map((it) => it.style.backgroundColor)")


def test_tokens_are_coloured_and_tell_their_figures(page, tmp_path):
    fake_run(tmp_path, 1)
    write_rollout_file(tmp_path, 2, [{key: value for key, value in rollout_line(2, 0).items() if key in KEPT}])
    page.goto(write_report(config_of(tmp_path)).as_uri())
    page.get_by_text("Not trained on, so there is no such figure").wait_for()
    page.get_by_role("button", name="Advantage").click()
    assert colours(page) == [""] * 3, "also of its advantage, which no update used"
    page.get_by_role("button", name="Teacher gap").click()
    page.locator("#rows button").nth(1).click()
    page.get_by_text("kk/1/0").wait_for()
    spans = page.locator(".tokens span")
    assert spans.all_inner_texts() == ["answer", " 0", "▯"]
    assert page.get_by_text("beyond the clamp of 1 nats").count() == 1
    words = page.evaluate("VIEWS.gap.legend({}).map((it) => it[2]).join()")
    assert "beyond the clamp" not in words, "an objective without one"
    first, second, third = colours(page)
    assert first != second and third == "", "the third has no gap"
    assert [span.get_attribute("class") or "" for span in spans.all()] == ["", "mark", "unseen"]
    page.get_by_role("button", name="Clip state").click()
    assert colours(page)[0] == colours(page)[2] != colours(page)[1]
    page.get_by_text("clipped: the ratio has passed its bound").wait_for()
    page.get_by_role("button", name="Advantage").click()
    assert len(set(colours(page))) == 1
    page.get_by_role("button", name="Mismatch").click()
    assert colours(page)[2] == "" != colours(page)[1]
    spans.nth(1).hover()
    tip = page.locator("#tip").inner_text()
    for text in ('" 0", id 6', "2 of 3", "-1.9, clamped", "0.61, clipped", "-0.002", "-2.002"):
        assert text in tip, text


KEPT = (
    "step",
    "id",
    "prompt",
    "response",
    "reward",
    "advantage",
    "solved",
    "subset",
    "response_tokens",
    "response_pieces",
    "log_probs",
)


def test_a_response_stays_text(page, watched, tmp_path):
    fake_run(tmp_path, 1)
    hostile = HOSTILE | {"prompt": HOSTILE["response"], "id": "<b>id</b>", "subset": "<i>s</i>", "step": 2}
    hostile |= {"response_pieces": [HOSTILE["response"], "<script>alert(1)</script>", "&lt;"]}
    write_rollout_file(tmp_path, 2, [hostile])
    (tmp_path / "config.yaml").write_text(to_yaml(config_of(tmp_path)))
    report = write_report(config_of(tmp_path)).as_uri()
    for address in (watched(tmp_path), report):
        page.goto(address)
        page.locator("#detail").get_by_text("<b>id</b>").wait_for()
        assert page.locator(".tokens").inner_text() == "".join(hostile["response_pieces"])
        assert page.locator("#detail pre").first.inner_text() == hostile["prompt"]
        assert page.locator("#rows li").first.inner_text().endswith("<img src=x onerror=alert(1)>")
        assert page.title() == tmp_path.name and page.locator("img").count() == 0


def test_a_server_that_has_ended_is_told(browser, watched, tmp_path):
    """Without the fixture's check: a failed request is on the console."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(watched(tmp_path))
    page.get_by_text("not begun").wait_for(timeout=DEADLINE_MS)
    page.route("**/news*", lambda route: route.abort())
    page.get_by_text("no connection: `rlad watch` has ended").wait_for(timeout=DEADLINE_MS)
    page.unroute("**/news*")
    page.route("**/news*", lambda route: route.fulfill(status=404, body="Not Found"))
    page.get_by_text("open the address that it prints now").wait_for(timeout=DEADLINE_MS)
    context.close()
