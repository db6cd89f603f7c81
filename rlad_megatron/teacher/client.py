"""The trainer's client of a teacher on dedicated ranks (`service.py` is the server)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import httpx
import torch
import torch.distributed as dist
from safetensors.torch import load, save

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.data.samples import sample_to_score, set_log_probs, trained_rollouts
from rlad_megatron.errors import TeacherError
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.secret import headers
from rlad_megatron.types import EVALUATION, Group, Sample

ROUTE = "/log_probs"
SHOWN = 300  # characters of the teacher's text, in an error


@dataclass(frozen=True)
class TeacherAddress:
    """Where a teacher answers."""

    url: str  # http://HOST:PORT
    log: str  # log file of its rank 0, for error messages
    token: str = field(repr=False)  # its secret


class RemoteTeacher:
    """Scores the student's tokens as `Teacher` does. `log_probs` is collective over the trainer's ranks."""

    def __init__(self, address: TeacherAddress, timeout_s: float) -> None:
        """timeout_s: longest wait for the answer to one request (rollout.request_timeout_s)."""
        self.address, self.timeout_s = address, timeout_s

    def log_probs(self, samples: list[Sample]) -> list[torch.Tensor]:
        """Teacher log-probs of each sample's response, float32 [R] in nats, on every rank.

        Raises TeacherError when the teacher is gone, fails, or does not answer in time.
        """
        return on_first_rank(lambda: self.request(samples), dist.group.WORLD)

    def request(self, samples: list[Sample]) -> list[torch.Tensor]:
        """As `log_probs`, on the rank that calls it. In any thread."""
        name, see = f"the teacher at {self.address.url}", f"see {self.address.log}"
        try:
            response = httpx.post(
                self.address.url + ROUTE,
                content=encode_samples(samples),
                timeout=self.timeout_s,
                headers=headers(self.address.token),
                trust_env=False,  # a proxy from the environment cannot reach a rank of this run
            )
        except httpx.TimeoutException as error:
            raise TeacherError(
                f"{name} did not answer within rollout.request_timeout_s={self.timeout_s:g}; {see}, or raise it"
            ) from error
        except httpx.TransportError as error:
            raise TeacherError(f"{name} is gone ({type(error).__name__}: {error}); {see}") from error
        if response.status_code != 200:
            raise TeacherError(f"{name} failed: {' '.join(response.text.split()):.{SHOWN}}; {see}")
        try:
            parts = load(response.content)["log_probs"].float().split([sample.response_length for sample in samples])
        except Exception as error:  # of many kinds: the answer may be anything
            raise TeacherError(f"{name} answered {ROUTE} with something else ({error!r:.{SHOWN}}); {see}") from error
        return [part.clone() for part in parts]  # a view would be pickled with the storage of all


def ask_teacher(
    groups: list[Group], teacher: RemoteTeacher, objective: ObjectiveConfig, tokens_per_request: int
) -> None:
    """Have the teacher score the rollouts that will be trained on, in place; in requests of about so many tokens."""
    training = [group.rollouts for group in groups if group.round != EVALUATION]
    rollouts = [rollout for group in training for rollout in trained_rollouts(group, objective)]
    samples = [sample_to_score(rollout.prompt.tokens, rollout.tokens) for rollout in rollouts]
    ends = itertools.accumulate(sample.tokens.numel() for sample in samples)
    requests = itertools.groupby(
        zip(samples, ends, strict=True), lambda pair: (pair[1] - pair[0].tokens.numel()) // tokens_per_request
    )
    for _, pairs in requests:
        request = [sample for sample, _ in pairs]
        set_log_probs(request, teacher=teacher.request(request))
    for rollout, sample in zip(rollouts, samples, strict=True):
        rollout.teacher_log_probs = sample.teacher_log_probs


def encode_samples(samples: list[Sample]) -> bytes:
    """Token ids and lengths as safetensors: all that the teacher needs to know of a sample."""
    return save(
        {
            "tokens": torch.cat([sample.tokens for sample in samples]),  # int64
            "lengths": torch.tensor([sample.tokens.numel() for sample in samples]),
            "prompt_lengths": torch.tensor([sample.prompt_length for sample in samples]),
        }
    )


def decode_samples(content: bytes) -> list[Sample]:
    tensors = load(content)
    parts = tensors["tokens"].split(tensors["lengths"].tolist())
    return [
        Sample(tokens=tokens, prompt_length=prompt, weight=torch.zeros(tokens.numel() - prompt))
        for tokens, prompt in zip(parts, tensors["prompt_lengths"].tolist(), strict=True)
    ]


def encode_log_probs(log_probs: list[torch.Tensor]) -> bytes:
    return save({"log_probs": torch.cat(log_probs)})
