"""The timeline of a run: busy seconds, its files, and the trace that viewers open."""

import itertools
import json
import threading
import time

import pytest

from rlad_megatron.observe import timeline as timeline_module
from rlad_megatron.observe.timeline import KEEP_STEPS, Timeline, idle_shares


@pytest.fixture
def clock(monkeypatch):
    """Sets the wall clock: `clock(12.5)`."""
    now = [0.0]
    monkeypatch.setattr(timeline_module.time, "time", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def trace(run_dir):
    Timeline(run_dir).merge()
    assert [path.name for path in run_dir.iterdir() if path.is_file()] == ["timeline.json"]
    return json.loads((run_dir / "timeline.json").read_text())["traceEvents"]


def threads(events):
    """Spans as (name, ts, dur), by the name of their thread."""
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    found = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            found[names[event["tid"]]].append((event["name"], event["ts"], event["dur"]))
    return found


def nested(spans):
    """Whether any two spans (name, ts, dur) are disjoint, or one holds the other."""
    ends = sorted((ts, -(ts + dur)) for _, ts, dur in spans)
    return all(later >= -end or -later_end <= -end for (_, end), (later, later_end) in itertools.combinations(ends, 2))


def steps_of(events):
    return sorted(event["args"]["step"] for event in events if event["ph"] == "X")


# ---------------------------------------------------------------- busy


def test_busy_counts_overlapping_spans_once(tmp_path):
    timeline = Timeline(tmp_path)
    for start, end in [(14.0, 15.0), (10.0, 13.0), (11.0, 12.0), (12.5, 13.5), (0.0, 1.0)]:
        timeline.add("rewards", "score", start, end)
    assert timeline.busy("rewards", 0.0, 20.0) == 1.0 + 3.5 + 1.0
    assert timeline.busy("rewards", 12.0, 14.25) == 1.5 + 0.25, "cut at both ends"
    assert timeline.busy("rewards", 5.0, 6.0) == 0.0
    assert timeline.busy("teacher", 0.0, 20.0) == 0.0, "a row without events"


def test_busy_while_a_counter_is_above_zero(tmp_path, clock):
    timeline = Timeline(tmp_path)
    for at, value in [(10.0, 1), (11.0, 5), (13.0, 0), (15.0, 0), (16.0, 2)]:
        clock(at)
        timeline.count("server 0", "requests in flight", value)
    assert timeline.busy("server 0", 0.0, 12.0) == 2.0
    assert timeline.busy("server 0", 12.0, 20.0) == 1.0 + 4.0, "across both ends: above 0 before and after"
    timeline.add("server 0", "push", 12.0, 14.0)
    assert timeline.busy("server 0", 0.0, 20.0) == 4.0 + 4.0, "together with the row's spans"


def test_a_counter_keeps_its_value_from_step_to_step(tmp_path, clock):
    timeline = Timeline(tmp_path)
    clock(10.0)
    timeline.count("server 0", "requests in flight", 3)
    timeline.add("server 0", "push", 1.0, 2.0)
    timeline.write(1)
    assert timeline.busy("server 0", 20.0, 25.0) == 5.0
    timeline.write(2)
    clock(31.0)
    timeline.count("server 0", "requests in flight", 0)
    assert timeline.busy("server 0", 30.0, 35.0) == 1.0
    timeline.write(3)
    assert timeline.busy("server 0", 40.0, 45.0) == 0.0


def test_a_span_of_a_block_that_raises(tmp_path, clock):
    timeline = Timeline(tmp_path)
    clock(5.0)
    with pytest.raises(KeyError), timeline.span("teacher", "score"):
        clock(7.0)
        raise KeyError
    assert timeline.busy("teacher", 0.0, 10.0) == 2.0


def test_an_event_is_not_lost_to_a_write_in_another_thread(tmp_path, monkeypatch):
    timeline = Timeline(tmp_path)
    writer = threading.Thread(target=timeline.write, args=(1,))

    class SlowSpan(timeline_module.Span):
        def __init__(self, *fields):
            writer.start()
            writer.join(0.2)  # the lock keeps it waiting for this event
            super().__init__(*fields)

    monkeypatch.setattr(timeline_module, "Span", SlowSpan)
    timeline.add("rewards", "score", 0.0, 1.0)
    writer.join()
    assert steps_of(trace(tmp_path)) == [1]


# ---------------------------------------------------------------- idle shares


def test_idle_shares_by_hand():
    shares = idle_shares(10.0, waiting=4.0, servers=[10.0, 5.0], teacher=2.5)
    assert shares == {"idle/trainer": 0.4, "idle/servers": 0.25, "idle/teacher": 0.75}
    assert idle_shares(10.0, waiting=0.0) == {"idle/trainer": 0.0}
    assert idle_shares(10.0, waiting=10.1, servers=[10.1]) == {"idle/trainer": 1.0, "idle/servers": 0.0}


# ---------------------------------------------------------------- files


def test_rows_of_several_processes_are_merged(tmp_path, clock):
    first, second = Timeline(tmp_path), Timeline(tmp_path)
    first.add("trainer rank 0", "update", 1000.5, 1001.0)
    clock(1000.25)
    first.count("server 0", "requests in flight", 7)
    second.add("trainer rank 1", "update", 1000.75, 1002.0)
    for timeline in (first, second):
        timeline.write(1)
    events = trace(tmp_path)
    assert threads(events) == {
        "server 0": [],
        "trainer rank 0": [("update", 250_000, 500_000)],
        "trainer rank 1": [("update", 500_000, 1_250_000)],
    }
    (counter,) = [event for event in events if event["ph"] == "C"]
    assert (counter["name"], counter["ts"], counter["args"]) == ("server 0", 0, {"requests in flight": 7})
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert sorted(processes.values()) == ["servers", "trainer ranks"]
    assert processes[counter["pid"]] == "servers"


def test_rows_are_in_the_order_of_their_numbers(tmp_path):
    timeline = Timeline(tmp_path)
    rows = [f"trainer rank {rank}" for rank in range(12)]
    for row in rows:
        timeline.add(row, "update", 1.0, 2.0)
    timeline.write(1)
    assert list(threads(trace(tmp_path))) == rows


def test_a_row_of_no_kind_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="ranks 0"):
        Timeline(tmp_path).add("ranks 0", "update", 1.0, 2.0)


def test_a_killed_run_leaves_its_steps_and_a_resumed_one_has_each_once(tmp_path):
    killed = Timeline(tmp_path)
    for step in (0, 1, 2, 3):
        for row in ("trainer rank 0", "rewards"):
            killed.add(row, "work", step, step + 0.5)
        killed.write(step)
    with (tmp_path / "timeline/rewards.jsonl").open("a") as file:
        file.write('{"row": "rewards", "st')
    assert steps_of(trace(tmp_path)) == [0, 0, 1, 1, 2, 2, 3, 3]
    resumed = Timeline(tmp_path)
    resumed.truncate_after(1)
    for step in (2, 3, 4):
        resumed.add("rewards", "work", step + 10.0, step + 10.5)
        resumed.write(step)
    events = trace(tmp_path)
    assert steps_of(events) == [0, 0, 1, 1, 2, 3, 4]
    assert max(event["ts"] for event in events if event["ph"] == "X") == 14_000_000
    resumed.truncate_after(-1)
    assert trace(tmp_path) == []
    Timeline(tmp_path / "no_run").truncate_after(1)


def test_files_hold_only_the_newest_steps(tmp_path):
    timeline = Timeline(tmp_path)
    timeline.add("teacher", "score", 0.0, 1.0)  # in one step only
    for step in range(1, 2 * KEEP_STEPS + 8):
        timeline.add("rewards", "score", step, step + 0.5)
        timeline.write(step)
    newest = step
    steps = [json.loads(line)["step"] for line in (tmp_path / "timeline/rewards.jsonl").read_text().splitlines()]
    assert steps == list(range(KEEP_STEPS + 1, newest + 1))
    assert not (tmp_path / "timeline/teacher.jsonl").read_text()
    events = trace(tmp_path)
    assert steps_of(events) == list(range(newest - KEEP_STEPS + 1, newest + 1))
    assert min(event["ts"] for event in events if event["ph"] == "X") == 0


def test_merging_is_atomic(tmp_path, monkeypatch):
    timeline = Timeline(tmp_path)
    timeline.merge()
    before = (tmp_path / "timeline.json").read_bytes()
    timeline.add("teacher", "score", 0.0, 1.0)
    timeline.write(1)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        timeline.merge()
    assert (tmp_path / "timeline.json").read_bytes() == before


# ---------------------------------------------------------------- the trace event format


def test_overlapping_spans_get_threads_on_which_they_nest(tmp_path):
    timeline = Timeline(tmp_path)
    for name, start, end in [("d", 5, 7), ("a", 0, 4), ("in a", 1, 2), ("b", 3, 6), ("after a", 4, 5)]:
        timeline.add("rewards", name, start, end)
    timeline.write(1)
    found = threads(trace(tmp_path))
    names = {row: [name for name, _, _ in spans] for row, spans in found.items()}
    assert names == {"rewards": ["a", "in a", "after a", "d"], "rewards (2)": ["b"]}
    assert all(map(nested, found.values()))


def test_a_trace_keeps_to_the_format(tmp_path):
    """The fields that viewers need, and what Perfetto asks for: spans nest, and ids of threads are nothing else's."""
    timeline, now = Timeline(tmp_path), time.time()
    for step, row in itertools.product((1, 2), ("teacher", "trainer rank 0", "trainer rank 1", "rewards")):
        start = now + step / 3
        timeline.add(row, "step", start, start + 7 / 47)
        for part in range(7):  # the ends are no whole microseconds
            timeline.add(row, "part", start + part / 47, start + (part + 1) / 47)
        timeline.count("server 0", "requests in flight", step)
        timeline.write(step)
    events = trace(tmp_path)
    assert set(json.loads((tmp_path / "timeline.json").read_text())) == {"traceEvents", "displayTimeUnit"}
    names = [event for event in events if event["ph"] == "M"]
    spans = [event for event in events if event["ph"] == "X"]
    counters = [event for event in events if event["ph"] == "C"]
    assert (len(names), len(spans), len(counters)) == (4 + 5, 2 * 4 * 8, 2 * 4) and len(events) == 9 + 64 + 8
    assert {event["name"] for event in names} == {"process_name", "thread_name"}
    assert all(isinstance(event["args"]["name"], str) for event in names)
    for event in spans + counters:
        assert all(isinstance(event[field], int) and event[field] >= 0 for field in ("pid", "tid", "ts"))
    assert all(isinstance(event["dur"], int) and event["dur"] >= 0 for event in spans)
    assert all(isinstance(value, int | float) for event in counters for value in event["args"].values())
    ids = [(event["pid"], event["tid"]) for event in names if event["name"] == "thread_name"]
    assert {(event["pid"], event["tid"]) for event in spans + counters} == set(ids)
    tids = {tid for _, tid in ids}
    assert len(tids) == len(ids) == 5 and not tids & {event["pid"] for event in events}
    assert all(map(nested, threads(events).values()))
