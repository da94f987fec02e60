"""The demo's tokenizer and model: a word-level tokenizer with exact decoding, and a Llama of 353k parameters.

A token is a piece of text with its spaces, so decoding is plain concatenation and exact for any ids. A word owns the space before it,
and the space after it when a number follows (" has "), so that a digit is one and the same token wherever it stands.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from curate.jobs.demo.task import FILLERS, GAINS, LOSSES, NAMES, OBJECTS
from curate.passes.loading.weights import quiet

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BASE = Path(__file__).parent / "base"  # the ready base that ships with the package
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PIECE = r" [-+*=<] | ?[A-Za-z]+(?: (?=[0-9]))?|[0-9]|[:,] (?=[0-9])|[.?:,]"
BEFORE_NUMBERS = ("has", "of", "is", *GAINS, *LOSSES)
WORDS = ("How", "many", "bags", "Which", "is", "more", "The", "answer", "has", "So")
VOCABULARY_SIZE = 192  # padded: 24.6k embedding parameters, and the model has 353k


def vocabulary() -> list[str]:
    """Every token in id order: the special ones, digits, operators, punctuation, words."""
    pieces = [*SPECIAL, *"0123456789", *(f" {op} " for op in "+-*=<"), ": ", ":", ", ", ",", ".", "?"]
    pieces += [f" {word} " for word in BEFORE_NUMBERS] + ["Facts", *NAMES]
    pieces += [f" {word}" for word in dict.fromkeys((*WORDS, *NAMES, *OBJECTS, *FILLERS))]
    return pieces


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, made from scratch: BOS before every text, no EOS; unknown text becomes <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_config() -> LlamaConfig:
    """d 128, 2 layers, 4 heads of 32 (a head size that vLLM's CPU attention takes), feed-forward 256, tied embeddings."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.02,
    )


def load_base(path: Path = BASE) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The base model in float32, whatever it is stored in, and its tokenizer."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    with quiet():
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, PreTrainedTokenizerFast.from_pretrained(path)


def save_checkpoint(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Config, weights, generation config and tokenizer in the layout that transformers and vLLM load."""
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
