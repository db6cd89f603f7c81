"""A run folder with figures made up by hand."""

import json
import math

from rlad_megatron.config import LayoutConfig, ModelConfig, RunConfig
from rlad_megatron.observe.metrics import MetricsWriter


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
        line |= {"idle/trainer": 0.6, "idle/servers": 0.4, "idle/teacher": 0.9, "entropy/mean": 0.3}
        line |= {"reference/kl_mean": 0.01, "rollout/response_tokens": 50, "rollout/cut_fraction": 0.1}
        line |= {"perf/tokens_per_s": 900.0, "perf/mfu": 0.4, "slowest/update_over_mean": 1.1}
        line |= {"rollout/version_lag_mean": 0.0}
        lines.append(line)
    lines.append({"step": steps, "eval/accuracy": 0.75})
    return lines


def rollout_line(step, number, **changes):
    """As `write_rollouts` writes it: three tokens, of which the second is clipped and clamped."""
    trained = {"student_log_probs": [-0.1, -2.0, -0.3], "old_log_probs": [-0.1, -2.0, -0.3]}
    trained |= {"teacher_log_probs": [-0.2, -0.1, -0.3], "teacher_gap": [0.1, -1.9, 0.0], "ratio": [1.05, 0.61, 1.0]}
    trained |= {"clipped": [0.0, 1.0, 0.0], "clamped": [0.0, 1.0, 0.0], "mismatch": [1e-6, -2e-3, 0.0]}
    return {
        "step": step,
        "id": f"kk/{step}/{number}",
        "subset": f"PPL{2 + number % 2}",
        "prompt": f"Who is <knave> at {step}?",
        "response": f"answer {number}",
        "answer": "A",
        "reward": float(number),
        "advantage": -1.0,
        "solved": number > 0,
        "finish_reason": "stop",
        "weight_versions": [[step - 1, 3]],
        "prompt_tokens": [1, 2],
        "response_tokens": [5, 6, 2],
        "response_pieces": ["answer", f" {number}", ""],
        "log_probs": [-0.1, -2.002, -0.3],
        **trained,
        **changes,
    }


HOSTILE = rollout_line(9, 0, response="</script><script>document.title = 'hacked'</script><img src=x onerror=alert(1)>")


def write_rollout_file(run_dir, step, lines):
    (run_dir / "rollouts").mkdir(exist_ok=True)
    file = run_dir / "rollouts" / f"step_{step:08d}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def fake_run(run_dir, steps=3):
    """A run folder with metrics, and with rollouts of the first and the last step whose last lines are cut."""
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for line in fake_metrics(steps):
            writer.write(line["step"], line)
    for step in (1, steps):
        file = write_rollout_file(run_dir, step, [rollout_line(step, number) for number in range(5)])
        file.write_text(file.read_text() + '{"step": 1, "pro')


def config_of(run_dir):
    student = ModelConfig("/models/small", LayoutConfig(tensor_parallel=2))
    return RunConfig(name=run_dir.name, runs_dir=str(run_dir.parent), student=student)
