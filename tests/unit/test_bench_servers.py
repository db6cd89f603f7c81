"""`rlad bench --servers-only` with a server whose times are known."""

import json
from itertools import count

import pytest

from rlad_megatron.bench_servers import bench_servers
from rlad_megatron.config.bench import SERVERS_RESULT, decode_lengths, servers_bench_config
from rlad_megatron.config.recipe import load_run
from rlad_megatron.servers import decoding


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


class Fleet:
    """Takes 20 ms for prompts, 1 ms for each of their tokens, and 2 ms and one for each response for a later step."""

    def __init__(self, config, **options):
        assert config.rollout.servers == 1 and options["eos_ids"] == ()
        self.longest = options["max_model_len"]
        self.seen, self.rounds = set(), set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def generate(self, prompts, group_size, sampling, *, batch):
        assert batch not in self.rounds, "the same seeds"
        self.rounds.add(batch)
        decoding.time.now += 0.02
        for prompt in prompts:
            assert prompt.tokens not in self.seen, "its keys and values are in the cache"
            assert len(prompt.tokens) + sampling.max_tokens <= self.longest
            self.seen.add(prompt.tokens)
            decoding.time.now += 1e-3 * len(prompt.tokens)
        decoding.time.now += 1e-3 * (2 + len(prompts) * group_size) * (sampling.max_tokens - 1)


def test_times_of_a_step_do_not_hold_the_prompts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(decoding, "time", Clock())
    monkeypatch.setattr(decoding, "ServerFleet", Fleet)
    config = servers_bench_config(load_run("kk_tiny_cpu", [f"runs_dir={tmp_path}", "rollout.servers=2"]), 2)
    config.run_dir.mkdir(parents=True)
    bench_servers(config)
    found = json.loads((config.run_dir / SERVERS_RESULT).read_text())
    figures = found["figures"]
    assert figures.pop("prefill/tokens_per_s") == pytest.approx(1000)
    assert figures.pop("prefill/request_s") == pytest.approx(0.02)
    assert figures == pytest.approx({f"decode/step_s/{n}": 1e-3 * (2 + n) for n in (8, 64, 256)})
    assert all(len(values) == 2 for values in found["rounds"].values()), "one round warms up"
    assert "256 responses, tokens/s" in capsys.readouterr().out


def test_lengths_fit_the_response(monkeypatch):
    assert decode_lengths(96) == (96 // 2 + 24 + 1, 64)
    assert all(decode_lengths(longest)[1] >= 2 for longest in range(1, 100))
    numbers = count()
    monkeypatch.setattr(decoding, "time", Clock())
    monkeypatch.setattr(decoding, "ServerFleet", Fleet)
    for longest in ("1", "7"):
        few = ["rollout.max_concurrency=3", f"rollout.sampling.max_tokens={longest}", f"name=run{next(numbers)}"]
        (line,) = decoding.measure_decoding(servers_bench_config(load_run("kk_tiny_cpu", few), 0))
        assert set(line) == {"decode/step_s/3", "prefill/tokens_per_s", "prefill/request_s"}
