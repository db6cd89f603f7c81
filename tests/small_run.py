"""A run of the demo that is as small as it gets, for tests through the command line."""

import sys

RLAD = [sys.executable, "-m", "rlad_megatron.cli"]
SMALL = [
    "kk_tiny_cpu",
    "train.steps=3",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "data.train_size=64",
    "data.eval_size=32",
    "student.layout.tensor_parallel=2",  # so that servers get the weights from shards
    "eval.every=0",
    "eval.teacher=false",
    "checkpoint.every=2",
]
