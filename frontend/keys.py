"""API keys: whose they are, what they open, and the file that they are read from."""

import hmac
import logging
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from msgspec import Struct

from ..common.errors import ConfigError
from ..common.keys import PREFIX, configured, digest, is_digest
from ..common.messages import Quota
from ..common.sampling import INT64_MAX

log = logging.getLogger(__name__)

Scope = Literal["inference", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
FIELDS = ("name", "key", "scopes", "requests_per_minute", "tokens_per_minute", "weight")
LEAST_WEIGHT, MOST_WEIGHT = 0.01, 100
MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 8
CHECK_EVERY_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")  # it stands in logs and metrics, and before a colon in salts


class ApiKey(Struct, frozen=True):
    digest: str
    tenant: str  # the key's name; of --api-key, the beginning of its digest
    scopes: tuple[Scope, ...] = SCOPES
    quota: Quota = Quota()


def find(keys: Sequence[ApiKey], given: bytes) -> ApiKey | None:
    """The key that a client sent. Compares with all of them: time must not tell which."""
    sent, found = digest(given), None
    for key in keys:
        if hmac.compare_digest(sent, key.digest):
            found = key
    return found


class KeyRing:
    """The keys of --api-key and those of a file that may change. Without either nobody is asked for one."""

    def __init__(self, options: Iterable[str] = (), file: Path | None = None) -> None:
        """`options` are keys or digests. Raises ConfigError for a file that cannot be used."""
        digests = map(configured, options)
        self._options = tuple(ApiKey(known, known.removeprefix(PREFIX)[:16]) for known in digests)
        self._file = file
        self._version = _version(file) if file else None
        self._checked = float("-inf")
        self._keys = self._options if file is None else (*load(file), *self._options)

    def current(self, now: float) -> tuple[ApiKey, ...]:
        """The keys at `now`, a time.monotonic(). Looks at the file at most once a second; a bad one is logged, and the
        keys of before stay."""
        if self._file is not None and now - self._checked >= CHECK_EVERY_S:
            self._checked = now
            if (version := _version(self._file)) != self._version:
                self._version = version
                self._read_again(self._file)
        return self._keys

    def _read_again(self, file: Path) -> None:
        try:
            keys = load(file)
        except ConfigError as error:
            log.warning("%s. The keys of before stay", error)
        else:
            self._keys = (*keys, *self._options)
            log.info("--api-keys-file %s: read again, %d keys", file, len(keys))


def load(file: Path) -> tuple[ApiKey, ...]:
    """The keys of a file, at least one. Raises ConfigError, which never quotes a key."""
    source = f"--api-keys-file {file}"
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode):  # a pipe would have the server wait
            raise ConfigError(f"{source}: is no regular file")
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{source}: has more than {MAX_FILE_BYTES} bytes; a list of keys is smaller")
    return parse(content, source, mode)


def parse(content: bytes, source: str, mode: int) -> tuple[ApiKey, ...]:
    """The keys in the `content` of a file with these permissions. `source` is named in errors."""
    try:
        _check_depth(content)
        entries = yaml.load(content, _Loader)
    except yaml.YAMLError as error:  # what it says may be a key
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{source}{where}: is no YAML list of keys; put a key in quotes if it begins with a sign that means something there"
        ) from None
    except ValueError:
        raise ConfigError(f"{source}: is not YAML text in UTF-8") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{source}: expected a list of keys (- name: alice, key: ...), which must not be empty")
    plain = [isinstance(entry, dict) and not is_digest(str(entry.get("key"))) for entry in entries]
    _check_mode(mode, source, holds_plain_keys=any(plain))
    keys = tuple(_api_key(entry, f"{source}: entry {place}") for place, entry in enumerate(entries, 1))
    _check_unique("name", [key.tenant for key in keys], source)
    _check_unique("key", [key.digest for key in keys], source)
    return keys


def _api_key(entry: Any, where: str) -> ApiKey:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: expected the fields {', '.join(FIELDS)}")
    name, key = entry.get("name"), entry.get("key")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: name: expected 1 to 64 letters, digits and ._@- that begin with a letter or digit; put numbers in quotes"
        )
    where = f"{where} ({name})"
    if unknown := [str(field) for field in entry if field not in FIELDS]:
        raise ConfigError(f"{where}: there is no field {unknown[0]!r:.80}; there are {', '.join(FIELDS)}")
    if not isinstance(key, str) or not key or not key.isprintable() or key != key.strip():
        raise ConfigError(f"{where}: key: expected text in quotes, without spaces around it")
    if key.startswith(PREFIX) and not is_digest(key):
        raise ConfigError(f"{where}: key: {PREFIX} must be followed by 64 hexadecimal digits in small letters")
    limits = _limit(entry, "requests_per_minute", where), _limit(entry, "tokens_per_minute", where)
    quota = Quota(*limits, _weight(entry, where))
    return ApiKey(configured(key), name, _scopes(entry, where), quota)


def _scopes(entry: dict[Any, Any], where: str) -> tuple[Scope, ...]:
    scopes = ["inference"] if entry.get("scopes") is None else entry["scopes"]
    if not isinstance(scopes, list) or not scopes or not all(scope in SCOPES for scope in scopes):
        raise ConfigError(f"{where}: scopes: expected a list of {' and '.join(SCOPES)}, got {scopes!r:.80}")
    return tuple(scope for scope in SCOPES if scope in scopes)


def _limit(entry: dict[Any, Any], field: str, where: str) -> int:
    value = entry.get(field)
    if value is None:
        return Quota().tokens
    if type(value) is not int or not 1 <= value <= INT64_MAX:
        raise ConfigError(
            f"{where}: {field}: expected a whole number from 1 on, got {value!r:.80}; leave it out for no limit"
        )
    return value


def _weight(entry: dict[Any, Any], where: str) -> float:
    value = entry.get("weight")
    if value is None:
        return Quota().weight
    if type(value) not in (int, float) or not LEAST_WEIGHT <= value <= MOST_WEIGHT:
        raise ConfigError(
            f"{where}: weight: expected a number from {LEAST_WEIGHT} to {MOST_WEIGHT}, got {value!r:.80}; leave it out for 1"
        )
    return float(value)


def _check_unique(what: str, values: Sequence[str], source: str) -> None:
    first: dict[str, int] = {}
    for place, value in enumerate(values, 1):
        if first.setdefault(value, place) != place:
            raise ConfigError(f"{source}: entries {first[value]} and {place} have the same {what}")


def _check_mode(mode: int, source: str, *, holds_plain_keys: bool) -> None:
    """As ssh: nobody else may write the file, nor read it where it holds what opens the server."""
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{source}: others may write it; run chmod go-w on it")
    if holds_plain_keys and mode & (stat.S_IRGRP | stat.S_IROTH):
        raise ConfigError(
            f"{source}: others may read the keys in it; run chmod go-rwx on it, or write sha256:HEX in place of each key"
        )


def _version(file: Path) -> tuple[int, ...] | None:
    """Changes when the file does; None when it cannot be looked at."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _check_depth(content: bytes) -> None:
    """A list of fields with lists in them. The library follows any depth, until the process crashes."""
    depth = 0
    for event in yaml.parse(content, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError("nested too deeply")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the one in C is much faster
    """Refuses a field that an entry names twice, where YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if len(names) != len(set(map(str, names))):
            raise yaml.MarkedYAMLError(problem="a field comes twice", problem_mark=node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping
