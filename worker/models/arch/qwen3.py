"""Qwen 3, dense: Llama with a norm over each head of q and k."""

from ..presets import Config, decoder, gated_mlp, gqa, rms, windows
from ..spec import Decoder, Layer


def build(config: Config) -> Decoder:
    return decoder(
        config,
        [
            Layer(
                attn=gqa(config, window=window, qk_norm=rms(config)),
                mlp=gated_mlp(config),
                pre_attn=rms(config),
                pre_mlp=rms(config),
            )
            for window in windows(config)
        ],
    )
