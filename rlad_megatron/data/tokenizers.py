"""One small interface over Hugging Face tokenizers and SentencePiece models."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

from rlad_megatron.errors import ConfigError, DataError

# Rewards read these, so decoding keeps them even if a tokenizer declares them special.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LONGEST_CHARACTER = 4  # tokens: a byte each
Question = str | list[dict[str, Any]]  # text, or chat messages with "role" and "content"


class Tokenizer(Protocol):
    """What the rest of the package needs from a tokenizer."""

    eos_ids: tuple[int, ...]  # any of them ends a response; training uses the first
    size: int  # number of token ids: the tokenizer's unpadded vocabulary

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos and eos."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, without control tokens (bos, eos, pad, chat markers). <think> and <answer> tags stay."""

    def decode_whole(self, ids: list[int]) -> str:
        """Text of `ids` with control tokens, as far as the tokenizer writes them, for people."""

    def render_all(
        self, questions: Sequence[Question], style: str, template_kwargs: Mapping[str, Any]
    ) -> list[list[int]]:
        """Prompt token ids. "chat" applies the chat template with the generation prompt; "plain" is bos + text.

        In chat style a string is one user message. A list of messages needs chat style.
        template_kwargs: further arguments of the chat template.
        Raises ConfigError if the tokenizer has no chat template, or one that does not know these arguments.
        """

    def first_unknown(self, text: str) -> str:
        """The first piece of `text` that has no token; empty if there is none."""

    def vocab(self) -> dict[int, str]:
        """The piece of each token id, as the tokenizer spells it."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a Hugging Face folder, a folder with `tokenizer.model` (SentencePiece), or a `.model` file.

    A folder with both counts as Hugging Face. Downloads nothing. Raises DataError naming the path and the remedy.
    """
    path = Path(path)
    if (path / "tokenizer.json").exists() or (path / "tokenizer_config.json").exists():
        return HuggingFaceTokenizer(path)
    model = path / "tokenizer.model" if path.is_dir() else path
    if model.is_file() and model.suffix == ".model":
        return SentencePieceTokenizer(model)
    if not path.is_dir():
        raise DataError(f"tokenizer {path}: no such folder or .model file; give a folder with the tokenizer's files")
    raise DataError(
        f"tokenizer {path}: found none of tokenizer.json, tokenizer_config.json, tokenizer.model; copy the "
        "tokenizer's files next to config.json"
    )


class HuggingFaceTokenizer:
    """A `transformers` tokenizer read from a local folder."""

    def __init__(self, path: Path):
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"tokenizer {path}: transformers cannot load it ({reason}); copy its files again"
            ) from error
        self._path = path
        self.size = len(self._tokenizer)
        self.eos_ids = self._find_eos_ids()
        added = self._tokenizer.added_tokens_decoder
        control = set(self._tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        self._dropped = {i for i in control if self._tokenizer.convert_ids_to_tokens(i) not in TAGS}

    def _find_eos_ids(self) -> tuple[int, ...]:
        """The tokenizer's eos first, then those of the model: Qwen stops at either of two."""
        ids = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        for file in (self._path / "generation_config.json", self._path / "config.json"):
            try:
                listed = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
                listed = [listed] if isinstance(listed, int) else listed or []
                if not all(isinstance(token, int) for token in listed):
                    raise ValueError(f"eos_token_id={listed!r:.50}")
            except (ValueError, AttributeError, TypeError) as error:
                raise DataError(f"{file}: not the JSON of a model ({error}); copy it again") from error
            if listed:
                ids += listed
                break
        if not ids:
            raise DataError(f"tokenizer {self._path}: no eos token; set eos_token in tokenizer_config.json")
        return tuple(dict.fromkeys(ids))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        kept = [i for i in ids if i not in self._dropped]
        return self.decode_whole(kept)

    def decode_whole(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def render_all(
        self, questions: Sequence[Question], style: str, template_kwargs: Mapping[str, Any]
    ) -> list[list[int]]:
        if style == "plain":
            bos = self._bos()
            return [bos + tokens for tokens in self._encode_all(cast(Sequence[str], questions))]
        self._check_template(template_kwargs)
        chats = [[{"role": "user", "content": asked}] if isinstance(asked, str) else asked for asked in questions]
        texts = self._tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
        return self._encode_all(texts)  # the template writes its own bos

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._tokenizer.is_fast:
            return self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        # What transformers adds to it (masks, offsets) would take as long again.
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _check_template(self, template_kwargs: Mapping[str, Any]) -> None:
        template = self._tokenizer.chat_template
        if not template:
            raise _no_chat_template(self._path)
        ours = inspect.signature(self._tokenizer.apply_chat_template).parameters
        for name in template_kwargs:
            # A template ignores what it does not know.
            if name in ours or name not in str(template):
                raise ConfigError(
                    f"data.chat_template_kwargs.{name}: the chat template of {self._path} takes no {name!r}; use a "
                    "name that occurs in the template"
                )

    def _bos(self) -> list[int]:
        """bos if the tokenizer itself adds one: some declare a bos token that the model never saw before text."""
        return [i for i in self._tokenizer.encode("a")[:1] if i == self._tokenizer.bos_token_id]

    def first_unknown(self, text: str) -> str:
        return ""  # the supported families fall back on bytes

    def vocab(self) -> dict[int, str]:
        return {i: piece for piece, i in self._tokenizer.get_vocab().items()}


class SentencePieceTokenizer:
    """A SentencePiece `.model` file. It has no chat template, so prompts must be plain."""

    def __init__(self, path: Path):
        import sentencepiece

        self._path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(f"tokenizer {path}: not a SentencePiece model; copy the file again") from error
        if self._model.eos_id() < 0:
            raise DataError(f"tokenizer {path}: no eos piece; train it with eos_id set")
        self.size = self._model.get_piece_size()
        self.eos_ids: tuple[int, ...] = (self._model.eos_id(),)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        # A model may have more rows than the tokenizer has pieces, so ids beyond the end can be sampled.
        return self._model.decode([i for i in ids if i < self.size])

    decode_whole = decode

    def render_all(
        self, questions: Sequence[Question], style: str, template_kwargs: Mapping[str, Any]
    ) -> list[list[int]]:
        if style == "chat":
            raise _no_chat_template(self._path)
        bos = [self._model.bos_id()] if self._model.bos_id() >= 0 else []
        return [bos + tokens for tokens in self._model.encode(list(cast(Sequence[str], questions)))]

    def first_unknown(self, text: str) -> str:
        if self._model.unk_id() not in self._model.encode(text):
            return ""
        pieces = self._model.encode(text, out_type=str)
        unknown = next((piece for piece in pieces if self._model.piece_to_id(piece) == self._model.unk_id()), "")
        return unknown.replace("▁", " ").strip() or unknown

    def vocab(self) -> dict[int, str]:
        return {i: self._model.id_to_piece(i) for i in range(self.size)}


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it, with control tokens; together, the text of all.

    A character that is spread over several tokens comes with the last of them.
    """
    # A response says the same things again and again.
    decode = cache(lambda span: tokenizer.decode_whole(list(span)))
    whole, texts = tuple(ids), list[str]()
    start = done = 0  # the token before the next text's first, by which the tokenizer knows its spaces; the first
    for end in range(1, len(ids) + 1):
        text = decode(whole[start:end])
        if text.endswith("\ufffd") and end - done < LONGEST_CHARACTER and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(decode(whole[start:done])) :])
        start, done = done, end
    return texts


def _no_chat_template(path: Path) -> ConfigError:
    return ConfigError(
        f"data.prompt_style=chat, but tokenizer {path} has no chat template; set data.prompt_style=plain"
    )


def check_same_tokens(
    student: Tokenizer, teacher: Tokenizer, student_path: str | Path, teacher_path: str | Path
) -> None:
    """Raise ConfigError, with the first differing ids and both pieces, unless all token ids mean the same.

    Log-probs of models whose token ids differ cannot enter one ratio.
    """
    ours, theirs = student.vocab(), teacher.vocab()
    differing = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    if differing:
        first = ", ".join(f"{i}: {ours.get(i)!r} / {theirs.get(i)!r}" for i in differing[:3])
        raise ConfigError(
            f"student and teacher tokenizers differ in {len(differing)} token ids (student {student_path}, teacher "
            f"{teacher_path}; first: {first}); choose a teacher with the student's tokenizer"
        )
