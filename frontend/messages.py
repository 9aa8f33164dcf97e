"""Chat messages as templates expect them: a role, and content that is one string. Whoever brings them, the checks are these."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..common.errors import RequestError

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant")

# Fields that exist elsewhere and not here, with the values that ask for nothing. Clients send their own answers back as
# they got them, nulls and all.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_calls": ([],),
}


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with content as one string; raises RequestError that names what cannot be taken."""
    if not messages:
        raise RequestError("messages must hold at least one message", param="messages")
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]


def asks_for_nothing(value: object, harmless: tuple[object, ...]) -> bool:
    """Whether a field that is not supported has a value that changes nothing: none, or one of the `harmless`."""
    return value is None or any(type(value) is type(one) and value == one for one in harmless)


def _plain(message: Any, path: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{path} must be an object with role and content, got {message!r:.80}", param=path)
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{path}.role must be one of {', '.join(ROLES)}, got {role!r:.80}", param=f"{path}.role")
    for name, harmless in UNSUPPORTED.items():
        if not asks_for_nothing(message.get(name), harmless):
            raise RequestError(f"{path}.{name} is not supported by this server; leave it out", param=f"{path}.{name}")
    kept = {name: value for name, value in message.items() if value is not None and name not in UNSUPPORTED}
    return {**kept, "content": _content(message.get("content"), role, f"{path}.content")}


def _content(content: Any, role: str, path: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "\n".join(_text(part, f"{path}[{i}]") for i, part in enumerate(content))
    if content is None and role == "assistant":
        return ""
    raise RequestError(f"{path} must be a string or a list of parts, got {content!r:.80}", param=path)


def _text(part: Any, path: str) -> str:
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (type(part).__name__, None)
    if kind != "text" or not isinstance(text, str):
        raise RequestError(f"{path}: this model reads text only, got a part of type {kind!r:.80}", param=path)
    return text
