"""Train seedling's tokenizer: byte-level BPE of 4,096 tokens over ``stdlib:train``.

    python seedling/tokenizer.py --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from espalier.bundled.corpus import bundled_files

VOCABULARY = 4096
BEGIN, END = "<|begin|>", "<|end|>"


def build() -> PreTrainedTokenizerFast:
    """The tokenizer: every text is framed by BEGIN (added by the tokenizer) and END (its EOS token)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BEGIN, END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = (path.read_text(encoding="utf-8") for path in bundled_files("train"))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    build().save_pretrained(parser.parse_args().out)
