"""What the route `POST /rlad/sample` (servers/sampler.py) answers with: one frame for each member of a group.

A frame is a line of JSON, then the tokens as int32, their log-probs as float32 and, if they are asked for, the experts
that each layer chose as uint8 or uint16, all little-endian. If sampling fails after the first frame, the last line
holds `{"error": text}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SAMPLE = "/rlad/sample"
TOKENS, LOG_PROBS = "<i4", "<f4"
EXPERTS = {"uint8": "<u1", "uint16": "<u2"}
BYTES = 4  # of a token or a log-prob


class FrameError(Exception):
    """The server reported an error, or the stream ends within a frame."""


class NoFrameError(Exception):
    """The stream holds something else than frames; the message is its start."""


MOST_TOKENS = 1 << 24  # of a frame
MOST_EXPERTS = 1 << 30  # of a frame, over all tokens and layers
LONGEST_HEADER = 1 << 20  # bytes
SHOWN = 300  # characters of what is not a frame


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Example: Completion(tokens=[5, 9, 2], log_probs=[-0.1, -2.3, -0.0], finish_reason="stop", versions=[("3", 3)])
    """

    tokens: list[int]  # [R]
    log_probs: list[float]  # [R] nats, at the temperature of the request; at temperature 1 when it is greedy
    finish_reason: str  # "stop" or "length"
    versions: list[tuple[str, int]]  # the weight version and how many tokens it sampled, in order; R in total
    # uint8 or uint16 [prompt + R - 1, layers, experts of a token], if asked for: what each layer chose for each token
    # but the last, which the engine never read.
    experts: np.ndarray | None = None


def encode_frame(
    member: int,
    finish_reason: str,
    tokens: Sequence[int],
    log_probs: Sequence[float],
    versions: Sequence[tuple[str, int]],
    experts: np.ndarray | None = None,
) -> bytes:
    """member: place in the group. The others: as in `Completion`."""
    header: dict[str, Any] = {"member": member, "finish_reason": finish_reason, "versions": versions}
    header |= {"tokens": len(tokens), "log_probs": len(log_probs)}
    values = [np.array(tokens, TOKENS).tobytes(), np.array(log_probs, LOG_PROBS).tobytes()]
    if experts is not None:
        header["experts"] = experts.dtype.name, experts.shape
        values.append(experts.astype(EXPERTS[experts.dtype.name], copy=False).tobytes())
    return b"".join([json.dumps(header).encode(), b"\n", *values])


def encode_error(text: str) -> bytes:
    return json.dumps({"error": text}).encode() + b"\n"


async def decode_frames(pieces: AsyncIterable[bytes]) -> AsyncIterator[tuple[int, Completion]]:
    """(member, Completion) of each frame in a stream that is cut anywhere. Raises FrameError and NoFrameError."""
    buffer, header = bytearray(), None
    async for piece in pieces:
        buffer += piece
        while True:
            if header is None:
                end = buffer.find(b"\n")
                if end < 0 and len(buffer) < LONGEST_HEADER:
                    break
                header = _header(bytes(buffer[: max(end, SHOWN)] if end < 0 else buffer[:end]))
                del buffer[: end + 1]
            middle = BYTES * header["tokens"]
            end = size = middle + BYTES * header["log_probs"]
            if header["experts"] is not None:
                dtype, shape = header["experts"]
                size += math.prod(shape) * np.dtype(dtype).itemsize
            if len(buffer) < size:
                break
            tokens = np.frombuffer(buffer[:middle], TOKENS).tolist()
            log_probs = np.frombuffer(buffer[middle:end], LOG_PROBS).tolist()
            experts = None if size == end else np.frombuffer(buffer[end:size], dtype).reshape(shape)
            del buffer[:size]
            yield header["member"], Completion(tokens, log_probs, header["finish_reason"], header["versions"], experts)
            header = None
    if buffer and header is None and not buffer.lstrip().startswith(b"{"):
        raise NoFrameError(buffer.decode(errors="replace")[:SHOWN])
    if buffer or header is not None:
        raise FrameError("the stream ends within a frame")


def _header(line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        if "error" in header:
            raise FrameError(f"{header['error']:.{SHOWN}}")
        sizes = [header[name] for name in ("member", "tokens", "log_probs")]
        if not all(type(size) is int and 0 <= size <= MOST_TOKENS for size in sizes):
            raise ValueError(sizes)
        if header.setdefault("experts") is not None:
            name, shape = header["experts"]
            if not all(type(size) is int and size > 0 for size in shape) or math.prod(shape) > MOST_EXPERTS:
                raise ValueError(shape)
            header["experts"] = EXPERTS[name], tuple(shape)
        header["versions"] = [(str(version), int(count)) for version, count in header["versions"]]
        header["finish_reason"] = str(header["finish_reason"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:  # Infinity, [[[[...
        raise NoFrameError(line.decode(errors="replace")[:SHOWN]) from error
    return header
