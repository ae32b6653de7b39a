"""A small Qwen2.5-architecture Hugging Face checkpoint with its own trained tokenizer, so that nothing has to be downloaded.

Everything that makes Qwen2.5 itself is there: grouped-query attention, QKV bias, RMSNorm, SwiGLU, RoPE base 1e6, byte-level BPE behind
Qwen2's pre-tokeniser (digits stand alone), a chat template with <|im_start|> and <|im_end|>. The weights are random but seeded. QKV
biases start random too, not zero as is usual: a bias that gets lost on the way to another framework must show. The vocabulary is no
multiple of 128 (or of anything a tensor-parallel layout would like), so padding is exercised.

    python scripts/make_tiny_qwen.py --input outputs/problems/train.jsonl --output outputs/tiny-qwen --seed 1
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The turns as Qwen2.5 lays them out; a conversation that does not open with a system message gets the default one.
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nSYSTEM_PROMPT<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""


def texts_of(path: Path) -> list[str]:
    """Every string in a JSONL file of flat records, what the tokenizer is trained on."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    texts: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            texts.extend(value for value in json.loads(line).values() if isinstance(value, str))
        except (json.JSONDecodeError, AttributeError):
            raise ValueError(f"{path}:{number}: not a JSON object") from None
    if not texts:
        raise ValueError(f"{path}: no text to train a tokenizer on")
    return texts


def make_tokenizer(texts: Iterable[str], vocab_size: int, system_prompt: str) -> Any:
    """Train a Qwen2 tokenizer: 256 bytes, merges, and the three special tokens last, `vocab_size` in all (fewer if the text is small)."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    turns = [f"{role}\n" for role in ("system", "user", "assistant")] + [system_prompt]
    backend.train_from_iterator([*texts, *turns * 100], trainer)
    trained = json.loads(backend.to_str())["model"]
    specials = {token: len(trained["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    merges: Any = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"] | specials,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
    )
    tokenizer.chat_template = CHAT_TEMPLATE.replace("SYSTEM_PROMPT", system_prompt)
    return tokenizer


def make_model(args: argparse.Namespace, tokenizer: Any) -> Any:
    """A Qwen2ForCausalLM with seeded random weights, biases included."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(args.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=args.ffn, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_groups, max_position_embeddings=args.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta}, rms_norm_eps=1e-6, tie_word_embeddings=not args.untied,
        initializer_range=0.02, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=config.initializer_range)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    return model


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, metavar="JSONL", help="text the tokenizer is trained on")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the checkpoint")
    for name, value, what in (
        ("vocab-size", 451, "entries in all, at most 512 and no multiple of 128"),
        ("layers", 3, "decoder layers"),
        ("hidden", 128, "width"),
        ("ffn", 352, "width of the SwiGLU layer"),
        ("heads", 4, "query heads"),
        ("kv-groups", 2, "key/value heads"),
        ("max-positions", 512, "tokens"),
        ("seed", 1, "of the weights"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{what} (default %(default)s)")
    parser.add_argument("--rope-theta", type=float, default=1e6, help="RoPE base (default %(default)g)")
    parser.add_argument("--untied", action="store_true", help="an output layer of its own instead of the tied embedding")
    parser.add_argument("--system-prompt", default="Solve the problem.", help="default system message (default: %(default)s)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """ValueError for sizes that make no model, or not the one this script promises."""
    if not 260 <= args.vocab_size <= 512 or args.vocab_size % 128 == 0:
        raise ValueError(f"--vocab-size must lie in 260..512 and not divide by 128, got {args.vocab_size}")
    if args.hidden % args.heads or args.heads % args.kv_groups or args.hidden // args.heads % 2:
        raise ValueError(f"hidden {args.hidden}, heads {args.heads}, kv-groups {args.kv_groups}: each must divide, head size even")
    if args.output.exists():
        raise ValueError(f"{args.output}: exists already")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the checkpoint under a temporary name, rename the folder when it is whole; 0, or 2 after a one-line error."""
    from transformers.utils import logging

    args = parse(argv)
    try:
        check(args)
        texts = texts_of(args.input)
    except ValueError as error:
        print(f"[error] make_tiny_qwen: {error}", file=sys.stderr)
        return 2
    logging.disable_progress_bar()
    tokenizer = make_tokenizer(texts, args.vocab_size, args.system_prompt)
    model = make_model(args, tokenizer)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=f".{args.output.name}.") as partial:
        model.save_pretrained(f"{partial}/model")
        tokenizer.save_pretrained(f"{partial}/model")
        Path(f"{partial}/model").rename(args.output)
    print(f"make_tiny_qwen: {model.num_parameters()} parameters, vocabulary {len(tokenizer)} -> {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
