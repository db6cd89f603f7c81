"""A rollout server that does as a test says, in place of a process that runs vLLM."""

import asyncio

import numpy as np

from rlad_megatron.servers.client import ServerDownError
from rlad_megatron.servers.frames import Completion


class ScriptedServer:
    """Answers a member with its prompt and seed, `pace` seconds after the member before it."""

    def __init__(self, name, index=0, *, dies_after=None, dies_at_the_end=False, error=None, pace=0.0):
        self.name, self.dies_after, self.error, self.pace = name, dies_after, error, pace
        self.dies_at_the_end = dies_at_the_end
        self.index, self.restarts, self.version = index, 0, "0"
        self.client, self.launch = self, None
        self.asked, self.cancelled, self.in_flight, self.most = [], [], 0, 0

    async def sample(self, session, body):
        prompt, seeds = body["prompt"][0], body["seeds"]
        experts = np.full((len(body["prompt"]) + 1, 1, 1), prompt, np.uint8) if body["experts"] else None
        self.asked.append((prompt, seeds))
        self.in_flight += len(seeds)
        self.most = max(self.most, self.in_flight)
        left = len(seeds)
        try:
            for place in reversed(range(len(seeds))):
                await asyncio.sleep(self.pace * prompt)
                if self.error is not None:
                    raise self.error
                if self.dies_after == 0:
                    raise ServerDownError(f"{self.name} is gone")
                if self.dies_after is not None:
                    self.dies_after -= 1
                self.in_flight -= 1
                left -= 1
                versions = [("default", 1), (self.version, 1)]
                yield place, Completion([prompt, seeds[place]], [-1.0, -2.0], "stop", versions, experts)
            if self.dies_at_the_end:
                raise ServerDownError(f"{self.name} is gone")
        except asyncio.CancelledError:
            self.cancelled.append(prompt)
            raise
        finally:
            self.in_flight -= left

    def restart(self, why):
        self.restarts += 1
        self.dies_after = None

    def wait_ready(self):
        pass

    def alive(self):
        return True

    def weight_version(self):
        return self.version
