"""A tiny random T5 over the words of tests/toy.py, as a whole Hugging Face folder; nothing is downloaded."""

from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

from tests.toy import CITIES, COLOURS, OTHER, THINGS

SIGNS = list("abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;?!'\"()-[]<>/_|=$")
EXTRA_IDS = 4


def tokenizer():
    """
    T5's own tokenizer class: unigram pieces, `▁` before a word, </s> at the end, <extra_id_i> last. The words
    of the toy world are one piece each; everything else is spelt in letters, with `▁` as a piece of its own.
    """
    words = [*CITIES, *THINGS, *COLOURS, *OTHER, "question:", "title:", "context:"]
    pieces = dict.fromkeys([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)])
    pieces |= dict.fromkeys((f"▁{word}", -2.0) for word in words)
    pieces |= dict.fromkeys((sign, -6.0) for sign in SIGNS)
    pieces |= dict.fromkeys((f"<extra_id_{i}>", 0.0) for i in reversed(range(EXTRA_IDS)))
    return T5Tokenizer(vocab=list(pieces), extra_ids=EXTRA_IDS)


def t5(folder, seed=0, name="t5", **settings):
    """
    Write folder/name, a random T5 of 2 layers x 32 with its tokenizer, and return its path. settings: of
    T5Config, such as feed_forward_proj="gated-gelu", tie_word_embeddings=False (T5 v1.1 and Flan-T5).
    """
    words = tokenizer()
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    start = {"decoder_start_token_id": words.pad_token_id}
    config = T5Config(**{"vocab_size": len(words)} | sizes | start | settings)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(Path(folder) / name)
    words.save_pretrained(Path(folder) / name)
    return Path(folder) / name
