"""Qwen 3, dense: Llama with a norm over each head of q and k."""

from ....common.model_file import ModelFile
from ..presets import decoder, gated_mlp, gqa, qwen_windows, rms
from ..spec import Decoder, Layer


def build(config: ModelFile) -> Decoder:
    return decoder(
        config,
        [
            Layer(
                attn=gqa(config, window=window, qk_norm=rms(config)),
                mlp=gated_mlp(config),
                pre_attn=rms(config),
                pre_mlp=rms(config),
            )
            for window in qwen_windows(config)
        ],
    )
