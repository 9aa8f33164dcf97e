"""API keys are kept as digests from the moment they are read: no other process, no file and no wire has one in the clear."""

import hashlib
import re

PREFIX = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest(key: bytes) -> str:
    """Of a key as a client sends it. A digest that is sent is no key: it has another digest."""
    return f"{PREFIX}{hashlib.sha256(key).hexdigest()}"


def is_digest(key: str) -> bool:
    return _DIGEST.fullmatch(key) is not None


def configured(key: str) -> str:
    """What stands for an option's `key`: its digest; options may hold digests themselves."""
    return key if is_digest(key) else digest(key.encode())
