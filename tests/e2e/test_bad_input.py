"""What bad input gets: exit code 2 and one line that names the field, the value and the remedy, before anything starts.

All cases run in one separate process, to see what they import.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from ports import free_port
from safetensors.torch import load_file, save_file

from rlad_megatron.config import LayoutConfig
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.models.shard_plan import build_shard_plan, fingerprint

ASSETS = Path(__file__).parents[2] / "recipes" / "assets"
STUDENT, TEACHER = ASSETS / "kk_tiny_student", ASSETS / "kk_tiny_teacher"

RUN_CASES = """
import contextlib, io, json, sys
from rlad_megatron import cli
results = {}
for name, arguments in json.loads(sys.stdin.read()).items():
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        code = cli.main(arguments)
    results[name] = [code, out.getvalue()]
assert "megatron.core" not in sys.modules  # takes seconds to import, and no check needs it
print(json.dumps(results))
"""


def edited_model(folder, source, **changes):
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("bad")
    prompts = tmp / "prompts.jsonl"
    good = json.dumps({"prompt": "A says B lies .", "answer": "x"})
    prompts.write_text("\n".join([good, '{"prompt": "no answer here"}', good]) + "\n")

    table, empty = tmp / "table.parquet", tmp / "empty.jsonl"
    empty.write_text("\n")
    said = [{"prompt": "Zoey says Oliver is a knight .", "answer": "72"}] * 20
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(said), table)

    truncated = edited_model(tmp / "truncated", STUDENT)
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    no_weights = edited_model(tmp / "no_weights", STUDENT)
    (no_weights / "model.safetensors").unlink()
    unknown = edited_model(tmp / "unknown", STUDENT, model_type="mamba")
    experts = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    }
    gelu = edited_model(tmp / "gelu", STUDENT, hidden_act="gelu")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    dynamic = edited_model(tmp / "dynamic", TEACHER, rope_parameters=rope)
    moe = edited_model(tmp / "moe", STUDENT, model_type="qwen3_moe", **experts)

    rows = json.loads((STUDENT / "config.json").read_text())["vocab_size"] + 1
    wider = edited_model(tmp / "wider", STUDENT, vocab_size=rows)
    tensors = load_file(wider / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.cat(
        [tensors["model.embed_tokens.weight"], torch.zeros(1, 128, dtype=torch.bfloat16)]
    )
    save_file(tensors, wider / "model.safetensors")

    megatron = edited_model(tmp / "megatron", STUDENT)
    (megatron / "latest_checkpointed_iteration.txt").write_text("release")

    other_tokens = edited_model(tmp / "other_tokens", TEACHER)
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((other_tokens / "tokenizer.model").read_bytes())
    model.pieces[20].piece, model.pieces[21].piece = model.pieces[21].piece, model.pieces[20].piece
    (other_tokens / "tokenizer.model").write_bytes(model.SerializeToString())

    other_run = tmp / "runs" / "other" / "checkpoints"
    (other_run / "step_00000002").mkdir(parents=True)
    (other_run / "latest").write_text("2")
    (other_run.parent / "config.yaml").touch()
    meta = {"model": "0123456789abcdef", "layout": [1, 1], "loop": {"verb": "train", "step": 2}}
    (other_run / "step_00000002" / "run.json").write_text(json.dumps(meta))

    other_prompts = tmp / "runs" / "prompts" / "checkpoints" / "step_00000002"
    other_prompts.mkdir(parents=True)
    (other_prompts.parent / "latest").write_text("2")
    plan = build_shard_plan(read_model_spec(STUDENT), LayoutConfig())
    state = {"epoch": 0, "position": 0, "seed": 0, "fingerprint": 1}
    meta = {
        "model": fingerprint(plan.hf_shapes),
        "layout": [1, 1],
        "loop": {"verb": "train", "step": 2, "prompts": state},
    }
    (other_prompts / "run.json").write_text(json.dumps(meta))

    return {
        "unknown key": (["train.stpes=3"], ["train.stpes", "did you mean 'train.steps'"]),
        "tp and heads": (
            ["student.layout.tensor_parallel=4", "train.ranks_per_node=4"],
            ["student.layout.tensor_parallel=4", "2 key-value heads", "use 1 or 2"],
        ),
        "engine tp and heads": (
            ["rollout.tensor_parallel=3"],
            ["rollout.tensor_parallel=3", "4 attention heads", "use 1, 2 or 4"],
        ),
        "two tasks on one GPU": (["train.gpus_per_node=2"], ["rollout.servers=1", "rollout.colocate=true"]),
        "experts and tp": (
            [f"student.path={moe}", "student.layout.tensor_parallel=2"],
            ["student.layout.tensor_parallel=2", "student.layout.sequence_parallel=true"],
        ),
        "replay without experts": (
            ["rollout.router_replay=true"],
            ["rollout.router_replay=true", "the student has no experts", "use rollout.router_replay=false"],
        ),
        "megatron student": ([f"student.path={megatron}"], [f"student.path={megatron}", "megatron-to-hf"]),
        "group of one": (["rollout.group_size=1"], ["rollout.group_size=1", "at least 2"]),
        "missing safetensors": ([f"student.path={no_weights}"], [str(no_weights), "model.safetensors"]),
        "truncated safetensors": ([f"student.path={truncated}"], ["model.safetensors", "truncated"]),
        "missing folder": (["student.path=/no/such/model"], ["student.path=/no/such/model", "not found"]),
        "unknown model_type": (
            [f"student.path={unknown}"],
            [
                "'mamba'",
                "llama, mistral, qwen2, qwen3, qwen3_5, qwen3_5_moe, qwen3_5_moe_text, qwen3_5_text, qwen3_moe",
            ],
        ),
        "activation": (
            [f"student.path={gelu}"],
            ['hidden_act="gelu"', str(gelu), 'use a model with hidden_act="silu"'],
        ),
        "rope": (
            [f"teacher.path={dynamic}"],
            ["rope_parameters.rope_type='dynamic'", str(dynamic), "covered: default"],
        ),
        "tokenizers disagree": ([f"teacher.path={other_tokens}"], ["20", "teacher"]),
        "vocabularies": ([f"student.path={wider}"], [f"vocabulary of {rows} exceeds the teacher's {rows - 1}"]),
        "bad prompt line": ([f"data.source={prompts}", "data.reward=math"], ["prompts.jsonl:2", "answer"]),
        "unknown column": (
            [f"data.source={table}", "data.reward=math", "data.columns.answer=gold"],
            [f'{table}: no "gold"', "there are: prompt, answer", "data.columns.answer=COLUMN"],
        ),
        "empty data": ([f"data.source={empty}", "data.reward=math"], [f"{empty}: no lines"]),
        "no network": (
            ["data.source=hf:openai/gsm8k:main", "data.reward=math"],
            ["data.source=hf:openai/gsm8k:main", "not in the cache", "datasets", "HF_HUB_OFFLINE is set", "rlad data"],
        ),
        "answer that the reward cannot read": (
            [f"data.source={table}", "data.reward=knights_and_knaves"],
            [f"{table}: row 1", "data.reward=knights_and_knaves cannot read the answer '72'"],
        ),
        "a preset in the wrong place": (["data.source=aime24"], ["data.source=aime24 has no part to train on"]),
        "unknown template argument": (
            ["data.chat_template_kwargs.enable_thinking=false"],
            ["data.chat_template_kwargs", "data.prompt_style=plain"],
        ),
        "unknown reward": (["data.reward=nothing"], ["data.reward", "'nothing'", "knights_and_knaves"]),
        "reward not importable": (["data.reward=no_module:f"], ["no_module"]),
        "alpha": (["objective.alpha=1.5"], ["objective.alpha=1.5", "[0, 1]"]),
        "resume of another model": (
            ["resume=true", f"runs_dir={tmp / 'runs'}", "name=other"],
            ["resume=true", "another model"],
        ),
        "resume with other prompts": (
            ["resume=true", f"runs_dir={tmp / 'runs'}", "name=prompts"],
            ["other prompts", "data.*"],
        ),
        "resume of a mistyped name": (
            ["resume=true", f"runs_dir={tmp / 'runs'}", "name=otter"],
            ["resume=true", "name=otter", "did you mean name=other?"],
        ),
        "resume of no run": (["resume=true"], ["resume=true", "name=kk_tiny_cpu", "resume=false"]),
        "small KV cache": (["rollout.kv_cache_gb=0.0001"], ["rollout.kv_cache_gb=0.0001", "use at least 0.0004"]),
        "name taken": ([f"runs_dir={tmp / 'runs'}", "name=other"], ["name=other", "resume=true"]),
    }


@pytest.fixture(scope="module")
def results(cases, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        common = ["train", "kk_tiny_cpu", "data.train_size=64", f"runs_dir={runs}", f"rollout.port={free_port()}"]
        arguments = {name: [*common, *overrides] for name, (overrides, _) in cases.items()}
        arguments["port in use"] = [*common, f"rollout.port={taken.getsockname()[1]}"]
        process = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", RUN_CASES],
            input=json.dumps(arguments),
            capture_output=True,
            text=True,
            timeout=580,
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    assert not list(runs.iterdir())  # nothing was started, so nothing was left
    results = json.loads(process.stdout.splitlines()[-1])
    results["port in use"].append(taken)
    return results


def test_each_bad_input_is_one_clear_line(cases, results):
    expected = {name: parts for name, (_, parts) in cases.items()} | {"port in use": ["rollout.port", "another"]}
    for name, parts in expected.items():
        code, text = results[name][:2]
        assert code == 2, (name, text)
        lines = text.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("rlad: "), (name, text)
        for part in parts:
            assert part in lines[0], (name, part, lines[0])


def test_a_bad_key_is_refused_quickly():
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "rlad_megatron.cli", "train", "kk_tiny_cpu", "train.stpes=3"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert time.monotonic() - start < 60  # a hang, not slowness, is what this finds


def test_rlad_without_arguments_explains_itself():
    process = subprocess.run([sys.executable, "-m", "rlad_megatron.cli", "--help"], capture_output=True, text=True)
    assert process.returncode == 0
    for command in ("train", "sft", "evaluate", "plan", "show"):
        assert command in process.stdout
