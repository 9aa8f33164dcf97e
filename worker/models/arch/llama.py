"""Llama 1 to 3.2, Mistral, and all that share their form."""

from ..presets import Config, decoder, gated_mlp, gqa, rms, windows
from ..spec import Decoder, Layer


def build(config: Config) -> Decoder:
    return decoder(
        config,
        [
            Layer(attn=gqa(config, window=window), mlp=gated_mlp(config), pre_attn=rms(config), pre_mlp=rms(config))
            for window in windows(config)
        ],
    )
