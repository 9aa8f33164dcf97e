"""Quire serves large language models from paged memory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .common.sampling import SamplingParams
    from .launch.llm import LLM, AsyncLLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams"]

_HOMES = {"LLM": "launch.llm", "AsyncLLM": "launch.llm", "SamplingParams": "common.sampling"}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `import quire` stays in the milliseconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module  # noqa: PLC0415

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
