#!/usr/bin/env python3
"""Downloads a model of the Hugging Face hub into its cache: the small files first, so that a model that cannot be
served is refused before its weights are on the way.

A process of its own, so that it can be ended at any moment: `python -m quire.launch.model_files ORGANIZATION/NAME`.
"""

import sys
from collections.abc import Sequence

import msgspec

from ..common.config import ModelConfig
from ..common.errors import ConfigError
from .arguments import Parser
from .checks import check_model
from .component import add_lifeline, run, told

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # configuration, tokenizer, chat template
WEIGHTS = ("*.safetensors",)
IGNORED = ("*/*", "consolidated*")  # other formats of the same weights


def download(config: ModelConfig) -> None:
    """Fetch what is missing of `config.model`, showing the hub's own progress. Raises ConfigError."""
    _fetch(config.model, SMALL_FILES)
    check_model(msgspec.structs.replace(config, load_format="dummy"))  # all but the weights
    if config.load_format != "dummy":
        _fetch(config.model, WEIGHTS)


def _fetch(model: str, patterns: Sequence[str]) -> None:
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415 (0.3 s that only a download is worth)

    try:
        snapshot_download(model, allow_patterns=list(patterns), ignore_patterns=list(IGNORED))
    except errors.GatedRepoError:
        raise ConfigError(
            f"--model {model}: its owner asks for consent first; give it at https://huggingface.co/{model}, then run `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"--model {model}: no such local directory and no such repository on the Hugging Face hub (a private one needs `hf auth login` or HF_TOKEN)"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--model {model}: no such local directory, and it cannot be downloaded ({reason}). Without a network, copy the model here and name its directory"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "model_files.py", "Download a model of the Hugging Face hub into its cache.", usage="ORGANIZATION/NAME"
    )
    parser.add_argument("model", metavar="ORGANIZATION/NAME")
    parser.add_argument("--max-model-len", type=int, help="Refuse a model that was made for less.")
    parser.add_argument(
        "--load-format", choices=("auto", "dummy"), default="auto", help="dummy: leave the weights out."
    )
    add_lifeline(parser)
    try:
        values = parser.read(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        return told(error)
    config = ModelConfig(model=values.model, max_model_len=values.max_model_len, load_format=values.load_format)

    def act() -> int:
        download(config)
        return 0

    return run("download", "quire-download", act, lifeline=values.lifeline, log_level="info")


if __name__ == "__main__":
    sys.exit(main())
