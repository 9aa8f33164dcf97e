"""Mistral: Llama, with one sliding window for all layers in its first version."""

from ....common.model_file import ModelFile
from ..presets import full_attention
from ..spec import Decoder
from .llama import llama


def build(config: ModelFile) -> Decoder:
    # Null is full attention. A file that does not say has transformers' default, which is not for us to guess.
    window = None if config["sliding_window"] is None else config.count("sliding_window")
    return llama(config, [window for _ in full_attention(config)])
