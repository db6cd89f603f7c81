"""The configuration of a run: a tree of frozen dataclasses, and the checks that need nothing else.

Recipes are functions that return a `RunConfig`. Importing this package imports neither torch nor vLLM.
`rlad_megatron.launch.preflight` has the checks that read files (tokenizers, safetensors, prompts).
"""

# ruff: noqa: F401

from rlad_megatron.config.checks import validate
from rlad_megatron.config.objectives import OBJECTIVES
from rlad_megatron.config.tree import (
    AHEAD,
    PHASED,
    STREAMING,
    TRANSFORMER_ENGINE,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    Fp8Config,
    LayoutConfig,
    LossConfig,
    ModelConfig,
    ObjectiveConfig,
    ObserveConfig,
    OptimizerConfig,
    ProfileConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SftConfig,
    TeacherConfig,
    TrainConfig,
)
