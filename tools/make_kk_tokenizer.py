"""Write the word-level SentencePiece tokenizer of the plain Knights & Knaves style.

    python tools/make_kk_tokenizer.py recipes/assets/kk_tokenizer

The vocabulary is closed, so nothing is learned: every word, tag and punctuation mark is one piece.
The output is deterministic.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rlad_megatron.data.knights_and_knaves import vocabulary


def make_tokenizer() -> bytes:
    """The serialised model: <pad> 0, <unk> 1, <s> 2, </s> 3, then the words."""
    import sentencepiece

    words = vocabulary()
    model = io.BytesIO()
    # Tags are ordinary words: as user-defined symbols they would be split from their leading space, into two pieces.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)]),
        model_writer=model,
        model_type="word",
        vocab_size=len(words) + 4,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tokenizer.model for the plain Knights & Knaves style.")
    parser.add_argument("folder", type=Path, help="where to write tokenizer.model; created if missing")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(make_tokenizer())
    print(f"{folder / 'tokenizer.model'}: {len(vocabulary()) + 4} pieces")


if __name__ == "__main__":
    main()
