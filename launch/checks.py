"""What can be known of a model without torch, before any process starts."""

from pathlib import Path

from ..common.config import EngineConfig, ModelConfig
from ..common.errors import ConfigError
from ..common.model_info import ModelInfo, model_path, read_config, read_model_info


def check_model(config: ModelConfig) -> ModelInfo:
    """Raises ConfigError for a model that cannot be served: no such directory, no weights, an unknown architecture,
    a context longer than it was made for."""
    from ..worker.models import build  # noqa: PLC0415 (a pure function of config.json, free of torch)

    path = model_path(config.model)
    info = read_model_info(config.model, path, max_model_len=config.max_model_len)
    build(read_config(path))
    if config.load_format != "dummy" and not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"{path}: there is no *.safetensors here.{_other_weights(path)} --load-format dummy serves random weights"
        )
    return info


def check_text_files(config: EngineConfig) -> None:
    """Raises ConfigError when the tokenizer or the chat template that the options name is not there, or when the file of
    API keys cannot be used."""
    tokenizer, template = config.model.tokenizer, config.server.chat_template
    if tokenizer is not None and not (Path(tokenizer).expanduser() / "tokenizer.json").is_file():
        raise ConfigError(f"--tokenizer {tokenizer}: there is no tokenizer.json in a directory of this name")
    if template is not None and not Path(template).expanduser().is_file():
        raise ConfigError(f"--chat-template {template}: no such file")
    if config.server.api_keys_file is not None:
        from ..frontend.keys import load  # noqa: PLC0415 (few engines have one)

        load(Path(config.server.api_keys_file).expanduser())


def _other_weights(path: Path) -> str:
    found = next(
        (file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in sorted(path.glob(pattern))), None
    )
    return f" {found} is of a format that is not read; convert it to safetensors." if found else ""


def is_downloadable(model: str) -> bool:
    """Whether `model` looks like a Hugging Face repository (organization/name) and is no local path."""
    owner, slash, name = model.partition("/")
    return (
        bool(slash and owner and name and "/" not in name)
        and not model.startswith((".", "~"))
        and not Path(model).exists()
    )
