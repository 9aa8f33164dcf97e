"""Text to ids and back with the `tokenizers` library, such that other threads run meanwhile.

Its `encode` and `decode` keep the interpreter lock for as long as they take, seconds for megabytes; the batch forms give
the same and let go of it.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    """The ids of each text."""
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encoded]


def decode(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    text: str = tokenizer.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]
    return text
