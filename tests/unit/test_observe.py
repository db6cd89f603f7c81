"""Timers, metrics file, guard and report."""

import builtins
import io
import json
import math
import re
import xml.dom.minidom
from types import SimpleNamespace

import pytest
from rich.console import Console

from rlad_megatron.config import LayoutConfig, ModelConfig, RunConfig
from rlad_megatron.errors import DataError, TrainingError
from rlad_megatron.observe import timers as timers_module
from rlad_megatron.observe.checks import NonFiniteGuard
from rlad_megatron.observe.metrics import MetricsWriter, read_metrics
from rlad_megatron.observe.plots import GRID, MAX_POINTS, PLOTS, TEXT, draw, phase_seconds
from rlad_megatron.observe.report import write_report
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
    for broken in ("nonsense", "[2]", "{}"):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{broken}\n{{"step": 2}}\n')
        with pytest.raises(DataError, match='line 2 is not JSON with a "step"'):
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


# ---------------------------------------------------------------- summary, plots, report


def fake_metrics(steps):
    lines = [{"step": 0, "eval/accuracy": 0.25, "eval/teacher_accuracy": 0.9}]
    for step in range(1, steps + 1):
        line = {"step": step, "reward/mean": step / steps, "reward/solved": 0.5, "loss/policy": 0.01}
        line |= {"ratio/clip_fraction": 0.1, "trrd/clamp_fraction": 0.2, "trrd/teacher_gap_mean": -0.1}
        line |= {"mismatch/abs_mean": 1e-4, "mismatch/abs_max": 1e-2, "sync/probe_abs_max": 0.0}
        line |= {"sync/seconds": 0.2, "sync/pause_seconds": 0.1}
        line |= {"tokens/rollout": 100, "tokens/train": 90, "tokens/padding_share": 0.02}
        line |= {"grad_norm": math.nan if step == 2 else 1.0}
        line |= {"time/rollout": 3.0, "time/other": 1.0, "time/step": 5.0, "memory/peak_gb": 1.0}
        line |= {"time/update": 1.0} if step > 1 else {"time/other": 2.0}
        line |= {"idle/trainer": 0.6, "idle/servers": 0.4, "idle/teacher": 0.9}
        lines.append(line)
    lines.append({"step": steps, "eval/accuracy": 0.75})
    return lines


def fake_run(run_dir, steps=3):
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for line in fake_metrics(steps):
            writer.write(line["step"], line)
    (run_dir / "rollouts").mkdir()
    for step in (1, steps):
        lines = [
            {
                "step": step,
                "prompt": f"Who is <knave> at {step}?",
                "response": f"answer {i}",
                "reward": i,
                "solved": i > 0,
            }
            for i in range(5)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run_dir / "rollouts" / f"step_{step:06d}.jsonl").write_text(text + '{"step": 1, "pro')


def config_of(run_dir):
    student = ModelConfig("/models/small", LayoutConfig(tensor_parallel=2))
    return RunConfig(name=run_dir.name, runs_dir=str(run_dir.parent), student=student)


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


def test_every_plot_is_drawn_with_labels():
    metrics = fake_metrics(5)
    for plot in PLOTS:
        axes = draw(plot, metrics).axes[0]
        assert axes.get_xlabel() == "step" and axes.get_ylabel() == plot.unit
        assert axes.lines or axes.collections, plot.title
        assert draw(plot, [{"step": 1}]) is None


def test_stacked_times_add_up_to_the_step():
    plot = next(plot for plot in PLOTS if plot.stacked)
    axes = draw(plot, fake_metrics(5)).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["rollout", "update", "other"]
    assert axes.collections[-1].get_paths()[0].vertices[:, 1].max() == pytest.approx(5.0)


def test_long_runs_are_binned():
    axes = draw(PLOTS[0], fake_metrics(3000)).axes[0]
    assert max(len(line.get_xdata()) for line in axes.lines) <= MAX_POINTS


def test_idle_shares_have_a_line_each():
    plot = next(plot for plot in PLOTS if plot.title == "Idle")
    axes = draw(plot, fake_metrics(5)).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["trainer", "servers", "teacher"]


@pytest.mark.parametrize("with_timeline", [False, True])
def test_report_names_the_timeline_if_there_is_one(tmp_path, with_timeline):
    if with_timeline:
        Timeline(tmp_path).merge()
    page = write_report(config_of(tmp_path), []).read_text()
    assert ("timeline.json" in page, "https://ui.perfetto.dev" in page) == (with_timeline, with_timeline)


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_report_is_one_file_with_everything_in_it(tmp_path, steps):
    fake_run(tmp_path / "my_run", steps)
    path = write_report(config_of(tmp_path / "my_run"), [("Held-out <accuracy>, after", "0.75")])
    page = path.read_text()
    assert path == tmp_path / "my_run/report.html" and not list(path.parent.glob("*.tmp"))
    for text in ("<h1>my_run</h1>", "Held-out &lt;accuracy&gt;", "trrd (α = 0.5)", "small (bf16, TP 2 PP 1)", "0.75"):
        assert text in page, text
    assert f"Who is &lt;knave&gt; at {steps}?" in page, "sample rollouts"
    assert "objective:\n  name: trrd" in page, "resolved configuration"
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) == len(PLOTS)
    for svg in svgs:
        xml.dom.minidom.parseString(svg)


def test_report_needs_no_network_and_follows_the_theme(tmp_path):
    fake_run(tmp_path)
    page = write_report(config_of(tmp_path), []).read_text()
    assert not re.findall(r'(?:src|href)="(?!#)|url\((?!#)|@import|<script|<link', page)
    assert TEXT not in page and GRID not in page and "currentColor" in page and "prefers-color-scheme: dark" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "ids of different plots collide"
    assert set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_report_of_an_empty_run(tmp_path):
    page = write_report(config_of(tmp_path), []).read_text()
    assert "No metrics were written." in page and "Sample rollouts" not in page
