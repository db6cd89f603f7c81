"""The weight of an entropy bonus, constant or held to a target (Skywork-OR1, arXiv 2505.22312)."""

from __future__ import annotations

import math
from typing import Any

from rlad_megatron.config import ObjectiveConfig


class EntropyBonus:
    """What an update multiplies the entropy of each token's distribution by, and adds to the surrogate.

    Without a target it is `objective.entropy_coefficient`, c. With one, c grows by `entropy_step` after an update whose
    mean entropy e was below the target, and falls by it, to 0 at least, otherwise; the bonus acts only where e was not
    above the target, so it bounds the entropy from below. The paper takes e of the weights at hand. Here it is the last
    update's, because an update's is known only after its forward pass; before the first there is no bonus.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self._config = config
        self._coefficient, self._entropy = config.entropy_coefficient, math.inf

    @property
    def enabled(self) -> bool:
        return bool(self._config.entropy_coefficient or self._config.entropy_target)

    @property
    def weight(self) -> float:
        """Of the next update."""
        acts = not self._config.entropy_target or self._entropy <= self._config.entropy_target
        return self._coefficient if acts else 0.0

    def measured(self, entropy: float) -> None:
        """After an update: its mean entropy, in nats."""
        self._entropy = entropy
        if self._config.entropy_target:
            step = self._config.entropy_step
            change = step if entropy < self._config.entropy_target else -step
            self._coefficient = max(0.0, self._coefficient + change)

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self._coefficient, "entropy": self._entropy if math.isfinite(self._entropy) else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with a target; a constant weight is the configuration's."""
        if self._config.entropy_target and state:
            self._coefficient = state["coefficient"]
            self._entropy = math.inf if state["entropy"] is None else state["entropy"]
