"""Llama 1 to 3.2, and all that share its form."""

from collections.abc import Sequence

from ....common.model_file import ModelFile
from ..presets import decoder, full_attention, gated_mlp, gqa, rms
from ..spec import Decoder, Layer


def build(config: ModelFile) -> Decoder:
    for kind in config.names(
        "layer_types"
    ):  # of a relative, then; `sliding_window` alone is ignored as in transformers
        if kind != "full_attention":
            raise config.refusal("layer_types", kind, known=["full_attention"])
    return llama(config, full_attention(config))


def llama(config: ModelFile, windows: Sequence[int | None]) -> Decoder:
    """One layer for each window."""
    layers = [
        Layer(attn=gqa(config, window=window), mlp=gated_mlp(config), pre_attn=rms(config), pre_mlp=rms(config))
        for window in windows
    ]
    return decoder(config, layers)
