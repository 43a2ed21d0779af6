"""Trains tokenizers of Gemma's kind on a few words of our own."""

import io
from collections.abc import Sequence


def train_tokenizer(corpus: Sequence[str], size: int) -> bytes:
    """Train a SentencePiece model with Gemma's conventions (pad 0, eos 1, bos 2, byte fallback)."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=out,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()
