"""API keys are kept as digests from the moment they are read: no other process, no file and no wire has one in the clear."""

import hashlib
import re

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest(key: bytes) -> str:
    """Of a key as a client sends it. A digest that is sent is no key: it has another digest."""
    return f"sha256:{hashlib.sha256(key).hexdigest()}"


def configured(key: str) -> str:
    """What stands for an option's `key`: its digest; options may hold digests themselves."""
    return key if _DIGEST.fullmatch(key) else digest(key.encode())
