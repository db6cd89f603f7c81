"""How fast a rollout server decodes, for `rlad bench --servers-only`. No trainer, and no process group."""

from __future__ import annotations

import random
import time
from itertools import count

from rlad_megatron import platform
from rlad_megatron.config import RunConfig, SamplingConfig
from rlad_megatron.config.bench import DECODE, PREFILL, REQUEST, decode_lengths
from rlad_megatron.config.placement import server_devices
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.types import Prompt


def measure_decoding(config: RunConfig) -> list[dict[str, float]]:
    """Figures of one server in each of `train.steps` rounds: DECODE at up to three numbers of responses, and PREFILL
    and REQUEST.

    Prompts are of random tokens, as many as an average response has in the cache, and a group shares one. Seconds of a
    step are those of responses of several tokens less those of one token, so a prompt's time is not in them.
    """
    spec, rollout = read_model_spec(config.student.path), config.rollout
    context, tokens = decode_lengths(rollout.sampling.max_tokens)
    chance, batches = random.Random(config.train.seed), count()
    fleet = ServerFleet(
        config,
        model_path=config.student.path,
        max_model_len=context + tokens,
        vocab_size=spec.vocab_size,
        eos_ids=(),  # a response has as many tokens as it is asked for
        run_dir=config.run_dir,
        devices=server_devices(config, platform.visible_devices(), alone=True),
    )
    group = min(rollout.group_size, rollout.max_concurrency)

    def seconds(groups: int, tokens: int) -> float:
        # New prompts each time: the server keeps the cache of those it has seen.
        drawn = [tuple(chance.choices(range(spec.vocab_size), k=context)) for _ in range(groups)]
        prompts = [Prompt(id=str(i), tokens=drawn[i], answer="", subset="", text="") for i in range(groups)]
        begin = time.perf_counter()
        fleet.generate(prompts, group, SamplingConfig(max_tokens=tokens), batch=next(batches))
        return time.perf_counter() - begin

    most, rounds = rollout.max_concurrency // group, []
    with fleet:
        for _ in range(config.train.steps):
            found, firsts = {}, {}
            for groups in sorted({1, max(1, most // 4), most}):
                firsts[groups] = seconds(groups, 1)
                more = seconds(groups, tokens) - firsts[groups]
                found[f"{DECODE}{groups * group}"] = more / (tokens - 1)
            # On a line through one prompt and most of them: what each adds, and what comes before that.
            each = (firsts[most] - firsts[1]) / (most - 1) if most > 1 else firsts[1]
            each = each if each > 0 else firsts[most] / most
            rounds.append(found | {PREFILL: context / each, REQUEST: max(0.0, firsts[1] - each)})
    return rounds
