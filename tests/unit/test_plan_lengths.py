"""Lengths of responses that a plan counts with: drawn, given by the user, and those that a run has kept."""

import json
from dataclasses import replace

import pytest

from rlad_megatron.config.recipe import load_run
from rlad_megatron.data.samples import samples_from_rollout_files
from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.plan.lengths import Lengths, expected_lengths


def test_the_same_seed_gives_the_same_lengths():
    lengths = Lengths(longest=1000, prompt=10, mean=300, spread=0.7)
    assert lengths.draw(50, 1) == lengths.draw(50, 1) != lengths.draw(50, 2)
    drawn = replace(lengths, longest=10**6).draw(20_000, 0)
    assert sum(drawn) / len(drawn) == pytest.approx(300, rel=0.02)
    assert max(lengths.draw(1000, 0)) <= 1000
    for mean, spread in ((100, 0.7), (600, 0.7), (900, 1.5), (5, 0.5)):
        cut = replace(lengths, mean=mean, spread=spread).draw(20_000, 0)
        assert sum(cut) / len(cut) == pytest.approx(mean, rel=0.02), "the mean is that after the cut"
    assert set(replace(lengths, spread=0.0).draw(9, 0)) == {300}


def test_lengths_of_a_run_and_of_the_user(tmp_path):
    config = load_run("kk_tiny_cpu", [])
    folder = tmp_path / "rollouts"
    folder.mkdir()
    rows = [([1] * 20, [2] * 5, 0.0), ([1] * 30, [2] * 8, 1.5)]
    names = ("prompt_tokens", "response_tokens", "advantage")
    said = {"text": "one\u2028two\u0085three", "log_probs": [0.0]}  # separators of str.splitlines
    objects = [dict(zip(names, row, strict=True)) | said for row in rows]
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)
    (folder / "step_00000001.jsonl").write_text(text, encoding="utf-8")
    found = expected_lengths(config, str(tmp_path))
    assert (found.kept, found.mean, found.prompt, found.trained) == ((5, 8), 6.5, 25, 0.5)
    assert len(samples_from_rollout_files(folder)) == 2
    for every in ("objective.name=kdrl", "objective.name=on_policy_kl", "objective.reference_kl=0.1"):
        assert expected_lengths(load_run("kk_tiny_cpu", [every]), str(tmp_path)).trained == 1
    shorter = expected_lengths(load_run("kk_tiny_cpu", ["rollout.sampling.max_tokens=6"]), str(tmp_path))
    assert (shorter.kept, shorter.mean) == ((5, 6), 5.5)
    with (folder / "step_00000002.jsonl").open("w") as half:
        half.write('{"prompt_tokens": [1, ')
    with pytest.raises(ConfigError, match="step_00000002.jsonl has a line that is not whole"):
        expected_lengths(config, str(tmp_path))
    with pytest.raises(DataError, match="step_00000002.jsonl: a line is not whole"):
        samples_from_rollout_files(folder)
    given = expected_lengths(config, "40,0.5")
    assert (given.mean, given.spread, given.longest) == (40, 0.5, 96)
    assert expected_lengths(config).mean == 32
    for wrong in ("x", "0", "97", "40,-1", "40,inf", "nan", str(folder)):
        with pytest.raises(ConfigError, match="--responses="):
            expected_lengths(config, wrong)
