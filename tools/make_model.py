"""Make an untrained Qwen3 or Qwen3.5 checkpoint for the tiny recipes: config, random weights and tokenizer files.

python tools/make_model.py FOLDER --tokenizer recipes/assets/kk_tokenizer --layers 4 --hidden 128
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the checkpoint; created if missing")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", required=True, help="folder with the tokenizer's files"
    )
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="transformer layers (%(default)s)")
    parser.add_argument("--hidden", type=int, default=128, metavar="N", help="hidden size (%(default)s)")
    parser.add_argument("--heads", type=int, default=4, metavar="N", help="attention heads (%(default)s)")
    parser.add_argument("--kv-heads", type=int, default=2, metavar="N", help="key-value heads (%(default)s)")
    parser.add_argument("--head-dim", type=int, default=32, metavar="N", help="size of each head (%(default)s)")
    parser.add_argument("--ffn", type=int, default=384, metavar="N", help="feed-forward width (%(default)s)")
    parser.add_argument(
        "--gdn-heads", type=int, default=0, metavar="N", help="of gated delta nets, 128 wide; makes a Qwen3.5"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights (%(default)s)")
    options = parser.parse_args()

    import torch  # imported late to keep --help fast
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig, Qwen3Config

    from rlad_megatron.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    torch.manual_seed(options.seed)
    family, more = Qwen3Config, {}
    if options.gdn_heads:
        # vLLM's CPU kernels want heads of 128.
        heads = {"linear_num_key_heads": options.gdn_heads, "linear_num_value_heads": options.gdn_heads}
        family, more = Qwen3_5TextConfig, {**heads, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    model = AutoModelForCausalLM.from_config(
        family(
            vocab_size=tokenizer.size,
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            head_dim=options.head_dim,
            intermediate_size=options.ffn,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_ids[0],
            bos_token_id=None,
            pad_token_id=None,
            **more,
        )
    )
    model.save_pretrained(options.folder)
    for file in options.tokenizer.iterdir():
        shutil.copy2(file, options.folder / file.name)
    print(f"{options.folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
