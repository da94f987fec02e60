"""Tiny Llamas with random weights and a character tokenizer, made on the spot: head size 32, which vLLM's CPU attention takes."""

from __future__ import annotations

import string
from pathlib import Path

CHARACTERS = string.ascii_lowercase + string.digits + " .,?!:+-=\n"


def make_tokenizer(*, template: bool = False):
    """One token per character, `<s>` in front, `</s>` as EOS and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *CHARACTERS]
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    if template:
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
    return tokenizer


def make_bytes_tokenizer():
    """One token per byte, whatever the text; BOS and EOS in front of and behind nothing by themselves."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE({symbol: i for i, symbol in enumerate(["<unk>", "<s>", "</s>", *alphabet])}, [], unk_token="<unk>")
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_llama(
    folder: Path, *, seed: int, head_dim: int = 32, context: int = 128, scale: float = 0.15, layers: int = 2, hidden: int = 64,
    architecture: str | None = None, template: bool = False, dropout: float = 0.0, added: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """A saved model with tied embeddings; `scale` (the weights' standard deviation) makes it opinionated enough to tell models apart."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(template=template)
    tokenizer.add_tokens(list(added))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=head_dim, max_position_embeddings=context, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=2, initializer_range=scale, attention_dropout=dropout,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    if architecture:
        model.config.architectures = [architecture]
    model.save_pretrained(folder)
    if architecture:
        import json

        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": [architecture]}))
    tokenizer.save_pretrained(folder)
    return folder
