"""What a row must hold, by our names: question, answer, subset, id, and what else a reward needs."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from rlad_megatron.data.presets import Source
from rlad_megatron.data.sources import Row, missing
from rlad_megatron.data.tokenizers import Question
from rlad_megatron.errors import DataError

OURS = ("id", "prompt", "answer", "response", "subset")  # other fields are metadata for the reward


class Asked:
    """A checked row.

    Raises DataError "where: problem; remedy". target: the field that must hold text, "answer" or "response".
    """

    def __init__(self, row: Row, source: Source, target: str = "answer") -> None:
        self.row = row
        fields = _by_our_names(row, source, target)
        for name in ("id", "subset"):  # a table has the column for every row
            if fields.get(name, "") is None:
                del fields[name]
        self.question = _question(row, fields["prompt"], source)
        texts = {name: _text(fields[name]) for name in OURS if name in fields and name != "prompt"}
        for name, text in texts.items():
            if text is None:
                raise DataError(f'{row.where}: "{name}" is {_shown(fields[name])}; write a string or a finite number')
        self.target = texts[target] or ""
        if not self.target.strip():
            raise DataError(f'{row.where}: "{target}" is empty; write text, or remove the row')
        self.answer = texts.get("answer") or ""
        self.id = texts.get("id") or row.id
        self.subset = texts.get("subset") or source.subset
        self.metadata = {name: value for name, value in fields.items() if name not in OURS}


def _by_our_names(row: Row, source: Source, target: str) -> dict[str, Any]:
    if not source.columns:
        for name in ("prompt", target):
            if name not in row.fields:
                raise DataError(missing(row.where, name, name, list(row.fields)))
        return dict(row.fields)
    fields: dict[str, Any] = {name: row.fields[name] for name in ("id", "subset") if name in row.fields}
    for name in dict.fromkeys(("prompt", target, *source.columns)):
        fields[name] = _at(row, name, source.columns.get(name, name))
    return fields


def _at(row: Row, name: str, path: str) -> Any:
    """The value of a column, or of a dotted path into one."""
    if path in row.fields:
        return row.fields[path]
    value: Any = row.fields
    above = ""
    for part in path.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            inner = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
            raise DataError(missing(row.where, name, path, [f"{above}{key}" for key in inner] or ["nothing below it"]))
        above += f"{part}."
    return value


def _question(row: Row, prompt: Any, source: Source) -> Question:
    """The question with the source's template and system message."""
    if isinstance(prompt, str) and prompt.strip():
        text = source.template.replace("{prompt}", prompt) if source.template else prompt
        if not source.system:
            return text
        return [{"role": "system", "content": source.system}, {"role": "user", "content": text}]
    if not _is_chat(prompt):
        raise DataError(
            f'{row.where}: "prompt" must be a non-empty string or a list of {{"role": ..., "content": ...}} messages'
        )
    # Arrow gives every message the keys of all others.
    messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    if source.template:
        asked = next((message for message in reversed(messages) if message["role"] == "user"), None)
        if asked is None:
            raise DataError(f"{row.where}: no message of the user, which data.template is for; leave it empty")
        asked["content"] = source.template.replace("{prompt}", asked["content"])
    if source.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": source.system}, *messages]
    return messages


def _is_chat(prompt: Any) -> bool:
    def is_message(message: Any) -> bool:
        return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))

    return isinstance(prompt, list) and bool(prompt) and all(map(is_message, prompt))


def _text(value: Any) -> str | None:
    """Text of a string, a finite number, or a list of those; None for anything else.

    Numbers have no exponent, which math-verify would read as the constant e. A list becomes "2, 3", which it reads as
    a set.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [_text(item) for item in value]
        return ", ".join(text for text in texts if text) if texts and all(texts) else None
    if type(value) in (int, float, Decimal) and math.isfinite(value):
        return format(Decimal(str(value)), "f")
    return None


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:100]
