"""The configuration of a run: one tree of frozen dataclasses, and the checks that need nothing but the tree.

Recipes are functions that return a `RunConfig`. Importing this package needs neither torch nor vLLM.
Checks that read files (tokenizers, safetensors, prompt files) are in `rlad_megatron.launch.preflight`.
"""

from rlad_megatron.config.checks import validate
from rlad_megatron.config.choices import TRANSFORMER_ENGINE
from rlad_megatron.config.objectives import OBJECTIVES
from rlad_megatron.config.tree import (
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
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SftConfig,
    TeacherConfig,
    TrainConfig,
)

__all__ = [
    "OBJECTIVES",
    "TRANSFORMER_ENGINE",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "Fp8Config",
    "LayoutConfig",
    "LossConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ObserveConfig",
    "OptimizerConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "SftConfig",
    "TeacherConfig",
    "TrainConfig",
    "validate",
]
