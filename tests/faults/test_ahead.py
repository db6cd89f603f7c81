"""A run whose servers work ahead, killed and resumed: no prompt is lost, and none is used twice."""

import json
import os
import random
import signal
import time

import pytest
from faults.runs import STUDENT, run
from ports import free_port
from small_run import SMALL

from rlad_megatron.config.recipe import load_run
from rlad_megatron.data.prompts import PromptSource, build_prompts
from rlad_megatron.data.tokenizers import load_tokenizer

pytestmark = pytest.mark.faults

STEPS, PROMPTS = 5, 8
AHEAD = [
    *["checkpoint.export_hf=false", "data.eval_size=16", f"train.steps={STEPS}", "checkpoint.every=1"],
    *["rollout.schedule=ahead", "rollout.ahead=2", "rollout.overprovision=2", f"rollout.prompts_per_step={PROMPTS}"],
    *["objective.mismatch_correction=truncated_is", "objective.name=grpo", f"observe.rollouts_per_step={PROMPTS}"],
    *["train.ranks_per_node=1", "student.layout.tensor_parallel=1"],  # starts sooner
]


@pytest.mark.timeout(1200)
def test_a_killed_run_that_works_ahead_loses_no_prompt_and_uses_none_twice(tmp_path):
    words = [*AHEAD, f"rollout.port={free_port()}"]
    wait_s = random.Random(int(os.environ.get("RLAD_KILL_SEED", "0"))).uniform(0.0, 3.0)
    with run(tmp_path, "ahead", *words, verb=["train", *SMALL]) as killed:
        killed.wait_for_step(1)
        time.sleep(wait_s)
        assert killed.process.poll() is None
        killed.process.send_signal(signal.SIGKILL)
        assert killed.end()[0] == -signal.SIGKILL
        assert killed.left() == []
    with run(tmp_path, "ahead", *words, "resume=true", verb=["train", *SMALL]) as resumed:
        code, out, err = resumed.end(600)
        assert code == 0, out + err

    used = []
    for step in range(1, STEPS + 1):
        lines = (resumed.folder / "rollouts" / f"step_{step:08d}.jsonl").read_text().splitlines()
        assert len(lines) == PROMPTS
        used += [json.loads(line)["id"] for line in lines]
    assert len({*used}) == len(used) == STEPS * PROMPTS
    saved = json.loads((resumed.folder / "checkpoints" / f"step_{STEPS:08d}" / "run.json").read_text())
    state = saved["loop"]["prompts"]
    assert state["rounds"] == {}
    config = load_run(SMALL[0], [*SMALL[1:], *words])
    source = PromptSource(build_prompts(config.data, load_tokenizer(STUDENT), "train"), config.train.seed)
    drawn = [prompt.id for prompt in source.next_batch(state["position"])]
    assert state["epoch"] == 0 and sorted(used + state["deferred"]) == sorted(drawn)
    lags = [line["rollout/version_lag_max"] for line in resumed.metrics() if "rollout/version_lag_max" in line]
    assert 1 <= max(lags) <= 2
