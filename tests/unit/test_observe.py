"""Timers, metrics file, guard and report."""

import base64
import builtins
import hashlib
import io
import itertools
import json
import math
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from fake_run import HOSTILE, config_of, fake_metrics, fake_run
from rich.console import Console

from rlad_megatron.errors import DataError, TrainingError
from rlad_megatron.observe import rollout_index
from rlad_megatron.observe import timers as timers_module
from rlad_megatron.observe.checks import NonFiniteGuard
from rlad_megatron.observe.metrics import MetricsWriter, read_metrics
from rlad_megatron.observe.panels import PANELS, phase_seconds
from rlad_megatron.observe.report import MAX_TOKENS, REPORT_STEPS, write_report
from rlad_megatron.observe.rollouts import step_line
from rlad_megatron.observe.summary import summary_rows, summary_table
from rlad_megatron.observe.timeline import Timeline
from rlad_megatron.observe.timers import PhaseTimers

# ---------------------------------------------------------------- timers


def phases_by_hand(monkeypatch, **others):
    """Timers whose clocks advance by the seconds that the test asks for."""
    clock = SimpleNamespace(now=100.0)
    for name in ("perf_counter", "time"):
        monkeypatch.setattr(timers_module.time, name, lambda: clock.now)

    def work(seconds):
        clock.now += seconds

    return PhaseTimers(synchronize=lambda: None, **others), work


def test_the_phases_of_a_step_add_up_to_it(monkeypatch):
    timers, work = phases_by_hand(monkeypatch)
    for _ in range(2):
        with timers("step"):
            work(1.0)
            with timers("rollout"):
                work(4.0)
            with timers("update"):
                work(2.0)
                with timers("teacher"):  # within another phase
                    work(0.5)
                work(8.0)
            work(0.25)
    with timers("eval"):
        work(16.0)
    seconds = timers.pop()
    assert seconds == {
        "time/rollout": 8.0,
        "time/teacher": 1.0,
        "time/update": 20.0,
        "time/other": 2.5,
        "time/step": 31.5,
        "time/eval": 16.0,
    }
    whole = seconds["time/step"]
    assert sum(phase_seconds([{"step": 1, **seconds}]).values()) == whole, "what the report stacks"


def test_phases_are_spans_of_their_row(monkeypatch, tmp_path):
    timeline = Timeline(tmp_path)
    timers, work = phases_by_hand(monkeypatch, timeline=timeline, row="trainer rank 3")
    with timers("step"):
        work(1.0)
        with pytest.raises(KeyError), timers("update"):
            work(2.0)
            raise KeyError
    timeline.write(step=1)
    lines = [json.loads(line) for line in (tmp_path / "timeline/trainer_rank_3.jsonl").read_text().splitlines()]
    assert [(line["name"], line["start"], line["end"]) for line in lines] == [
        ("update", 101.0, 103.0),
        ("step", 100.0, 103.0),
    ]


def test_timers_accumulate_and_reset(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr(timers_module.time, "perf_counter", lambda: next(clock))
    synchronized = []
    timers = PhaseTimers(synchronize=lambda: synchronized.append(True))
    for _ in range(2):
        with timers("rollout"):
            pass
    with pytest.raises(KeyError), timers("update"):
        raise KeyError("a failing phase is timed too, and its error goes on")
    assert timers.pop() == {"time/rollout": 5.0, "time/update": 0.5}
    assert timers.pop() == {}
    assert len(synchronized) == 6


# ---------------------------------------------------------------- guard


def test_guard_stops_after_too_many_in_a_row():
    guard = NonFiniteGuard(max_in_a_row=3)
    for step, skipped in enumerate([True, True, False, True, True]):
        guard.update(skipped, step)
    with pytest.raises(TrainingError, match=r"3 steps in a row, up to step 5: lower optimizer\.lr"):
        guard.update(True, 5)


# ---------------------------------------------------------------- metrics


def strict_lines(run_dir):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_metrics_are_valid_json_and_flushed(tmp_path):
    writer = MetricsWriter(tmp_path / "run", tensorboard=False)
    writer.write(1, {"reward/mean": 0.5, "grad_norm": math.nan, "loss/policy": math.inf, "tokens/train": 7})
    # Read while the writer is still open.
    want = {"step": 1, "reward/mean": 0.5, "grad_norm": None, "loss/policy": None, "tokens/train": 7}
    assert strict_lines(tmp_path / "run") == [want]
    assert math.isnan(read_metrics(tmp_path / "run")[0]["grad_norm"])
    writer.close()


def test_half_written_last_line_is_ignored_and_then_removed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "rew')
    assert read_metrics(tmp_path) == [{"step": 1}]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.truncate_after(1)
        writer.write(2, {})
    assert strict_lines(tmp_path) == [{"step": 1}, {"step": 2}]


def test_broken_line_in_the_middle_is_named(tmp_path):
    for broken in ("nonsense", "[2]", "{}", '{"step": 2, "x": "1"}'):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{broken}\n{{"step": 2}}\n')
        with pytest.raises(DataError, match='line 2 is not JSON of numbers with a "step"'):
            read_metrics(tmp_path)
    assert read_metrics(tmp_path / "no_such_run") == []


def test_resume_drops_later_steps(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, {"x": float("nan")})
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.truncate_after(3)
        writer.write(4, {"x": 1.0})
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncation_is_atomic(tmp_path, monkeypatch):
    """Interrupted before the move, the old file is whole."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2):
            writer.write(step, {})
        before = (tmp_path / "metrics.jsonl").read_bytes()
        monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            writer.truncate_after(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_hides_steps_after_the_resumed_one(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"reward/mean": float(step)})
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.truncate_after(1)
        writer.write(2, {"reward/mean": 20.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 1.0), (2, 20.0)]


def test_wandb_is_imported_only_when_asked_for(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_wandb(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError("wandb asked for")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_wandb)
    MetricsWriter(tmp_path, tensorboard=False).close()
    with pytest.raises(ImportError, match="wandb asked for"):
        MetricsWriter(tmp_path, tensorboard=False, wandb_project="p")


# ---------------------------------------------------------------- summary, report


def test_the_line_of_a_step():
    first, last = fake_metrics(20)[:2]
    assert step_line(0, 20, first) == "step  0/20  held-out 0.250  teacher 0.900"
    assert step_line(1, 20, last).startswith("step  1/20  reward 0.050  solved 0.500  loss 0.0100  grad 1.000  mis")


def test_summary_by_hand():
    rows = dict(summary_rows(fake_metrics(20)))
    assert rows["Held-out accuracy, before (step 0)"] == "0.250"
    assert rows["Held-out accuracy, after (step 20)"] == "0.750"
    assert rows["Held-out accuracy, teacher"] == "0.900"
    assert rows["Mean reward, first and last tenth"] == "0.075 → 0.975"
    assert rows["Time per step, mean"] == "5.00 s" and rows["– rollout"] == "3.00 s, 60%"
    assert summary_rows([]) == []
    assert summary_rows([{"step": 0, "eval/teacher_accuracy": 0.5}]) == [("Held-out accuracy, teacher", "0.500")]
    output = io.StringIO()
    summary_table("Run", list(rows.items()), Console(file=output, width=100))
    assert "3.00 s, 60%" in output.getvalue()


class Page(HTMLParser):
    """A page's elements, as a browser sees them: scripts and styles by their text, the others by their attributes."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data

    def of(self, tag):
        return [(attrs, text) for (name, attrs), text in zip(self.elements, self.texts, strict=True) if name == tag]

    @property
    def data(self):
        return json.loads(next(text for attrs, text in self.of("script") if attrs.get("id") == "data"))


@pytest.mark.parametrize("steps", [1, 40])
def test_report_is_one_file_with_everything_in_it(tmp_path, steps):
    fake_run(tmp_path / "my_run", steps)
    path = write_report(config_of(tmp_path / "my_run"))
    data = Page(path.read_text()).data
    facts, news = data["answer"]["facts"], data["answer"]["news"]
    assert path == tmp_path / "my_run/report.html" and not list(path.parent.glob("*.tmp"))
    assert ["Objective", "trrd (α = 0.5)"] in facts["shown"] and "small (bf16, TP 2 PP 1)" in dict(
        facts["shown"]
    ).values()
    assert "objective:\n  name: trrd" in facts["config"] and facts["steps"] == 100 and facts["clamp"] == 1.0
    assert facts["state"] == "unfinished", "of 100 steps"
    assert news["metrics"]["reward/mean"][1:-1] == [pytest.approx(i / steps, rel=1e-4) for i in range(1, steps + 1)]
    assert news["metrics"]["grad_norm"][2] is None and ["Held-out accuracy, teacher", "0.900"] in news["summary"]
    assert [panel["title"] for panel in data["panels"]] == [panel.title for panel in PANELS]
    assert len(data["rollouts"]) == (5 if steps == 1 else 10), "of the first step and of the last"
    assert data["rollouts"][0]["rollout"]["prompt"] == f"Who is <knave> at {steps}?"


def test_report_needs_no_network_and_runs_only_its_own_scripts(tmp_path):
    fake_run(tmp_path)
    (tmp_path / "rollouts" / "step_00000009.jsonl").write_text(json.dumps(HOSTILE) + "\n")
    text = write_report(config_of(tmp_path)).read_text()
    page = Page(text)
    assert not [attrs for tag, attrs in page.elements if "src" in attrs or attrs.get("href", "data:,") != "data:,"]
    assert page.data["rollouts"][0]["rollout"]["response"] == HOSTILE["response"]
    policy = next(attrs["content"] for attrs, _ in page.of("meta") if attrs.get("http-equiv"))
    scripts = [script for attrs, script in page.of("script") if "id" not in attrs]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert f"script-src {' '.join(f'{chr(39)}sha256-{digest}{chr(39)}' for digest in digests)}" in policy
    assert "default-src 'none'" in policy and len(scripts) == 6


def test_report_holds_a_bounded_sample_of_long_responses(tmp_path, monkeypatch):
    clock = itertools.count(step=60.0)  # a slow disk: the report waits for it, unlike a page that is watched
    monkeypatch.setattr(rollout_index.time, "monotonic", lambda: next(clock))
    fake_run(tmp_path, 1)
    long = HOSTILE | {"step": 2, "response_tokens": [7] * 5000, "log_probs": [-1.0] * 5000, "response": "é" * 9000}
    for step in range(2, 40):
        (tmp_path / "rollouts" / f"step_{step:08d}.jsonl").write_text(json.dumps(long | {"step": step}) + "\n")
    data = Page(write_report(config_of(tmp_path)).read_text()).data
    rollouts = data["rollouts"]
    assert len({it["entry"]["step"] for it in rollouts}) == REPORT_STEPS
    assert data["answer"]["news"]["rollouts"] < 38, "the files of the other steps are not read"
    first = rollouts[0]["rollout"]
    assert first["step"] == 39 and len(first["log_probs"]) == MAX_TOKENS and len(first["response"]) < 4100
    assert first["shortened"] == "the first 1,500 of 5,000 tokens; `rlad watch` shows all"


def test_report_leaves_out_a_file_that_cannot_be_read_and_says_so(tmp_path):
    fake_run(tmp_path, 1)
    bad = json.dumps(HOSTILE).replace('"log_probs": [', '"log_probs": [x')
    (tmp_path / "rollouts" / "step_00000009.jsonl").write_text(bad + "\n")
    data = Page(write_report(config_of(tmp_path)).read_text()).data
    assert len(data["rollouts"]) == 5
    assert any("step_00000009.jsonl, line 1 is no rollout" in text for text in data["answer"]["news"]["advisories"])


@pytest.mark.parametrize("with_timeline", [False, True])
def test_report_of_an_empty_run_names_the_timeline_if_there_is_one(tmp_path, with_timeline):
    if with_timeline:
        Timeline(tmp_path).merge()
    data = Page(write_report(config_of(tmp_path)).read_text()).data
    assert data["answer"]["news"]["timeline"] == ("timeline.json" if with_timeline else "") and not data["rollouts"]
