"""Data as it is published, in a whole run without conversion: nested prompts and ground truth.

The student has experts, on two ranks: from its checkpoint through updates to a real server.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from small_run import RLAD, SMALL, external_server
from tiny_models import EXPERTS, make_model

from rlad_megatron.cli import main
from rlad_megatron.config.recipe import load_run
from rlad_megatron.data.prompts import build_prompts, build_traces
from rlad_megatron.data.tokenizers import load_tokenizer
from rlad_megatron.generate import _Partial

pytestmark = pytest.mark.e2e

TOKENIZER = Path(__file__).parents[2] / "recipes" / "assets" / "kk_tiny_student" / "tokenizer.model"
SIZES = {"vocab_size": 87, "hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 32}
EXPERT_PARALLEL = ["student.layout.tensor_parallel=1", "student.layout.expert_parallel=2"]
NAMES = ["Zoey", "Oliver", "Emma", "Liam", "Noah", "Ava"]
SAID = [f"{a} says {b} is a {role} ." for a in NAMES for b in NAMES for role in ("knight", "knave")]
# The models know only the words of the puzzles, so a reward of their own lets some responses differ.
REWARD = """
from rlad_megatron.rewards.registry import RewardResult


def long(prompt, text):
    assert prompt.answer == "72" and prompt.metadata == {"style": "rule"}
    return RewardResult(float(len(text)), solved="<answer>" in text)
"""
# As DAPO's: nested.
ROWS = [
    {
        "data_source": "math_dapo",
        "prompt": [{"content": said, "role": "user"}],
        "reward_model": {"ground_truth": "72", "style": "rule"},
        "extra_info": {"index": f"{i:08d}"},
    }
    for i, said in enumerate(SAID)
]
COLUMNS = [
    "data.columns={prompt: prompt.0.content, answer: reward_model.ground_truth, id: extra_info.index}",
    "data.columns.style=reward_model.style",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for all runs here: its address, the file with its secret, and the student."""
    folder = tmp_path_factory.mktemp("server")
    student = make_model(folder / "student", "qwen3_moe", **EXPERTS | SIZES)
    shutil.copy(TOKENIZER, student)
    with external_server(folder, student) as server:
        yield [*server, f"student.path={student}", *EXPERT_PARALLEL]


def test_generated_traces_are_the_same_after_an_interruption_and_fine_tuning_reads_them(
    server, tmp_path, monkeypatch, capsys
):
    """Before the runs below, which push other weights to the server."""
    *server, student = server[:3]
    model = student.removeprefix("student.path=")
    words = [model, "kk_tiny_cpu", *server, f"runs_dir={tmp_path}", "rollout.group_size=2", "eval.teacher=false"]
    command = ["generate", *words, "data.train_size=64", "data.eval_size=32", "--keep=all", "--prompts=40"]
    assert main([*command, f"--output={tmp_path / 'whole.jsonl'}"]) == 0
    assert main([*command, f"--output={tmp_path / 'whole.jsonl'}"]) == 2
    output = tmp_path / "cut.jsonl"
    partial = tmp_path / "cut.jsonl.partial"
    append = _Partial.append

    def cut(self, lines):
        if partial.stat().st_size > 10_000:
            with partial.open("a") as file:
                file.write(lines[0][:20])
            raise KeyboardInterrupt
        append(self, lines)

    with monkeypatch.context() as patch:
        patch.setattr(_Partial, "append", cut)
        assert main([*command, f"--output={output}"]) == 130
    assert not output.exists()
    capsys.readouterr()
    assert main([*command, f"--output={output}", "rollout.sampling.temperature=0.5"]) == 2
    assert f"{partial} was begun with another rollout; delete it" in capsys.readouterr().err
    assert main([*command, f"--output={output}"]) == 0
    said = capsys.readouterr().out
    assert "32 of 40 prompts are done" in said and not partial.exists()
    counts = {name: int(re.search(rf"{name} *│ +(\d+)", said)[1]) for name in ("cut off, left out", "written")}
    assert sum(counts.values()) == 80 and 0 < counts["written"] == len(output.read_text().splitlines()) < 80
    assert output.read_text() == (tmp_path / "whole.jsonl").read_text()

    known = [line for line in output.read_text().splitlines() if "\u2047" not in line]  # the unknown token
    output.write_text("\n".join(known))
    config = load_run("kk_tiny_cpu", [f"sft.traces={output}", "data.train_size=64", "data.eval_size=32"])
    tokenizer = load_tokenizer(model)
    prompts = {prompt.id: prompt for prompt in build_prompts(config.data, tokenizer, "train")[:40]}
    rows = [json.loads(line) for line in known]
    traces = build_traces(config.data, config.sft, tokenizer)
    assert 10 < len(rows) < 80, "a random model ends most of its responses"
    for row, (prompt, response) in zip(rows, traces, strict=True):
        assert (prompt.tokens, prompt.answer) == (prompts[row["id"]].tokens, prompts[row["id"]].answer)
        assert response[-1] == tokenizer.eos_ids[0] and not row["solved"]


def test_published_data_trains_without_conversion(server, tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    (tmp_path / "long_reward.py").write_text(REWARD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    arguments = [*SMALL, "train.steps=2", f"runs_dir={tmp_path}", "name=published", "data.eval_size=4"]
    arguments += [*server, *COLUMNS, f"data.source={tmp_path / 'train.parquet'}", "data.reward=long_reward:long"]
    process = subprocess.run([*RLAD, "train", *arguments], capture_output=True, text=True, timeout=550)
    assert process.returncode == 0, process.stdout + process.stderr
    run = tmp_path / "published"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[2]["tokens/train"] > 0
    assert 0 < lines[2]["mismatch/abs_max"] < 1e-3 and lines[2]["grad_norm"] > 0  # nats, float32 against float32
    assert "000000" in (run / "rollouts" / "step_00000001.jsonl").read_text()


def test_a_bad_row_that_only_rank_0_sees_ends_the_run_with_its_line(server, tmp_path):
    """It is beyond the rows that are checked before the start."""
    good = [{"prompt": said, "answer": "72"} for said in SAID]
    rows = [good[i % len(good)] for i in range(5200)] + [{"prompt": "Zoey says", "answer": None}]
    path = tmp_path / "large.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = [*SMALL, f"runs_dir={tmp_path}", "name=bad", *server, f"data.source={path}", "data.reward=math"]
    process = subprocess.run([*RLAD, "train", *arguments], capture_output=True, text=True, timeout=300)
    assert process.returncode == 2, process.stdout + process.stderr
    (error,) = [line for line in process.stderr.splitlines() if line.startswith("rlad: ") and "stopped" not in line]
    assert f'{path}:5201: "answer" is null' in error and "Traceback" not in process.stderr
