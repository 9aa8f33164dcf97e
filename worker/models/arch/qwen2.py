"""Qwen 2 and 2.5: Llama with a bias on q, k and v."""

from ....common.model_file import ModelFile
from ..presets import decoder, gated_mlp, gqa, qwen_windows, rms
from ..spec import Decoder, Layer


def build(config: ModelFile) -> Decoder:
    return decoder(
        config,
        [
            Layer(
                attn=gqa(config, window=window, qkv_bias=True, out_bias=False),
                mlp=gated_mlp(config),
                pre_attn=rms(config),
                pre_mlp=rms(config),
            )
            for window in qwen_windows(config)
        ],
    )
