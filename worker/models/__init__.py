"""Which models can be served, as data. Importable without torch: `build(config)` is the early check of a checkpoint."""

from collections.abc import Mapping
from typing import Any

from ...common.model_file import ModelFile
from .arch import llama, mistral, qwen2, qwen3
from .spec import Decoder

ARCHITECTURES = {
    "LlamaForCausalLM": llama.build,
    "MistralForCausalLM": mistral.build,
    "Qwen2ForCausalLM": qwen2.build,
    "Qwen3ForCausalLM": qwen3.build,
}


def build(config: Mapping[str, Any]) -> Decoder:
    """The decoder that `config` (config.json) describes.

    Raises ConfigError, naming key and value, for what is missing, malformed or not implemented; nothing unknown is
    replaced by a default.
    """
    checked = config if isinstance(config, ModelFile) else ModelFile(dict(config))
    name = (checked.names("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise checked.refusal("architectures", name, known=sorted(ARCHITECTURES))
    if config.get("quantization_config") is not None:
        raise checked.refusal(
            "quantization_config", config["quantization_config"], known=["none: full-precision weights"]
        )
    return ARCHITECTURES[name](checked)
