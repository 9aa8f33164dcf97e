"""Options as data: from the structs of `common.config` to flags, environment variables, YAML keys and a table.

A value comes from a flag, else from `QUIRE_...`, else from the YAML file, else from the struct's default. All four
meet in `resolve`, where one validation names the option at fault, wherever its value came from.
`python -m quire.launch.options` prints the table of the README.
"""

import difflib
import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Struct, structs

from ..common.config import EngineConfig
from ..common.errors import ConfigError
from ..common.keys import configured

ENV_PREFIX = "QUIRE_"
BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

# As vLLM reads sizes: small letters are powers of ten, capitals are powers of two; "B" may follow either kind.
_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_UNITS = (
    _SIZES | {f"{s}iB": _SIZES[s] for s in "KMGT"} | {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
)


@dataclass(frozen=True, slots=True)
class Option:
    """One field of the configuration, as users meet it."""

    group: str  # field of EngineConfig
    name: str  # field of the group's struct; no two groups share one
    kind: type  # str, int, float or bool: of one value
    several: bool  # a tuple of values
    nullable: bool
    choices: tuple[str, ...]
    default: Any
    description: str
    aliases: tuple[str, ...]
    metavar: str | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        """All spellings; a two-letter alias is taken with one dash as well, as in vLLM (-tp)."""
        short = [f"-{alias}" for alias in self.aliases if len(alias) == 2]
        return (self.flag, *(f"--{alias}" for alias in self.aliases), *short)

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def default_text(self) -> str:
        """For people; empty where the description says what happens without a value."""
        if self.default is None or self.default == ():
            return ""
        if self.kind is bool:
            return "on" if self.default else "off"
        return _size_text(self.default) if self.metavar == "BYTES" else str(self.default)


def options_of(config: type[Struct] = EngineConfig) -> tuple[Option, ...]:
    """The options of a configuration: a struct of groups, each of them a struct of annotated fields."""
    return tuple(_option(group.name, field) for group in structs.fields(config) for field in structs.fields(group.type))


def _option(group: str, field: structs.FieldInfo) -> Option:
    declared, (meta, *_) = get_args(field.type)[0], field.type.__metadata__
    kinds = [k for k in get_args(declared) if k is not type(None)] if _is_union(declared) else [declared]
    kind = _bare(kinds[0])
    several = get_origin(kind) is tuple
    if several:
        kind = _bare(get_args(kind)[0])
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return Option(
        group=group,
        name=field.name,
        kind=str if choices else kind,
        several=several,
        nullable=_is_union(declared),
        choices=choices,
        default=field.default,
        description=meta.description,
        aliases=meta.extra["aliases"],
        metavar=meta.extra["metavar"],
    )


def _is_union(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) or str(get_origin(kind)) == "typing.Union"


def _bare(kind: Any) -> Any:
    """Without Annotated."""
    return get_args(kind)[0] if hasattr(kind, "__metadata__") else kind


OPTIONS = options_of()
BY_NAME = {option.name: option for option in OPTIONS}
GROUPS = tuple(group.name for group in structs.fields(EngineConfig))


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for a name that is not known, or nothing when none is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""


# --- from text to values ----------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Whole numbers with an optional unit: 8k is 8,000; 8K is 8,192; 4GiB, 512MiB, 1_000. Raises ValueError."""
    match = re.fullmatch(r"([+-]?[\d_]+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2] not in _UNITS:
        raise ValueError(text)
    number = float(match[1]) * _UNITS[match[2]] if "." in match[1] else int(match[1]) * _UNITS[match[2]]
    if number != int(number):
        raise ValueError(text)
    return int(number)


def _size_text(number: int) -> str:
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if number and number % _UNITS[unit] == 0:
            return f"{number // _UNITS[unit]}{unit}"
    return str(number)


def parse_value(option: Option, text: str, source: str) -> Any:
    """One value of `option` from text. `source` is named when the text cannot be read. Raises ConfigError."""
    if option.choices and text not in option.choices:
        known = ", ".join(option.choices)
        raise ConfigError(f"{source}: {text!r:.80} is not one of {known}.{nearest(text, option.choices)}")
    if option.kind is bool:
        if text.lower() not in BOOLEANS:
            raise ConfigError(f"{source}: expected true or false, got {text!r:.80}")
        return BOOLEANS[text.lower()]
    if option.kind is str:
        return text
    try:
        return parse_size(text) if option.kind is int else float(text)
    except ValueError:
        number = "a whole number (8192, 8k, 4GiB)" if option.kind is int else "a number"
        hint = (
            " Kubernetes sets such variables for a service of this name: set enableServiceLinks to false."
            if "://" in text and source.startswith(ENV_PREFIX)
            else ""
        )
        raise ConfigError(f"{source}: expected {number}, got {text!r:.80}.{hint}") from None


# --- the four sources -------------------------------------------------------------------------------------------------


def from_environment(environ: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """name -> (source, value). Commas separate several values; an empty variable counts as unset."""
    found: dict[str, tuple[str, Any]] = {}
    for option in OPTIONS:
        if text := environ.get(option.env):
            values = [
                parse_value(option, part.strip(), option.env)
                for part in (text.split(",") if option.several else [text])
            ]
            found[option.name] = (option.env, values if option.several else values[0])
    return found


def from_file(file: Path) -> dict[str, tuple[str, Any]]:
    """name -> (source, value) of a YAML or .json file: options as in flags, with dashes or underscores, flat or by
    group."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: cannot be read: {error}") from None
    tree = _json(file, text) if file.suffix == ".json" else _yaml(file, text)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {file}: expected options by name (port: 8000), found a {type(tree).__name__}")
    found: dict[str, tuple[str, Any]] = {}
    for key, value in tree.items():
        grouped = str(key) in GROUPS and isinstance(value, dict)
        for name, member in value.items() if grouped else [(key, value)]:
            option = _known_key(str(name), file)
            if grouped and option.group != key:
                raise ConfigError(f"--config {file}: {name} belongs to the group {option.group}, not to {key}")
            found[option.name] = (f"{file}, {name}", _yaml_value(option, member, f"{file}, {name}"))
    return found


def _json(file: Path, text: str) -> Any:
    try:
        return json.loads(text)  # not msgspec, which knows no infinity
    except ValueError as error:
        raise ConfigError(f"--config {file}: is not JSON: {error}") from None


def _yaml(file: Path, text: str) -> Any:
    import yaml  # noqa: PLC0415 (a process that is started again in a hurry reads JSON)

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file}: is not YAML: {error}") from None


def _known_key(key: str, file: Path) -> Option:
    name = key.replace("-", "_")
    for option in OPTIONS:
        if name == option.name or name in (alias.replace("-", "_") for alias in option.aliases):
            return option
    raise ConfigError(f"--config {file}: there is no option {key!r}.{nearest(name, [*BY_NAME, *GROUPS])}")


def _yaml_value(option: Option, value: Any, source: str) -> Any:
    """YAML's own types pass as they are, for validation to judge; text is read as in a flag, and so are numbers that are
    choices."""
    if option.several:
        members = value if isinstance(value, list) else [value]
        return [parse_value(option, m, source) if isinstance(m, str) else m for m in members]
    if isinstance(value, str) or (option.choices and type(value) is int):
        return parse_value(option, str(value), source)
    return value


def resolve(flags: Mapping[str, Any], *, environ: Mapping[str, str], file: Path | None) -> EngineConfig:
    """The configuration from all sources; `flags` holds text (booleans as such) under the options' names.

    Raises ConfigError that names the option, its source, the value and the limit.
    """
    given = {name: (BY_NAME[name].flag, _flag_value(BY_NAME[name], value)) for name, value in flags.items()}
    return build((from_file(file) if file else {}) | from_environment(environ) | given)


def value_of(option: Option, flag: Any, environ: Mapping[str, str]) -> Any:
    """One option alone, checked as in a whole configuration; `flag` is what the command line says, None for nothing.

    Raises ConfigError.
    """
    given = from_environment({option.env: environ.get(option.env, "")})
    if flag is not None:
        given[option.name] = (option.flag, _flag_value(option, flag))
    return getattr(getattr(build(given), option.group), option.name) if given else option.default


def _flag_value(option: Option, value: Any) -> Any:
    if option.several:
        return [parse_value(option, text, option.flag) for text in value]
    return parse_value(option, value, option.flag) if isinstance(value, str) else value


def from_keywords(keywords: Mapping[str, Any]) -> EngineConfig:
    """The configuration of Python keyword arguments (tensor_parallel_size=2; tp=2 works as well)."""
    aliases = {alias.replace("-", "_"): option.name for option in OPTIONS for alias in option.aliases}
    given: dict[str, tuple[str, Any]] = {}
    for keyword, value in keywords.items():
        name = aliases.get(keyword, keyword)
        if name not in BY_NAME:
            raise ConfigError(f"there is no option {keyword!r}.{nearest(keyword, [*BY_NAME, *aliases])}")
        given[name] = (keyword, _yaml_value(BY_NAME[name], value, keyword))
    return build(given)


def build(values: Mapping[str, tuple[str, Any]]) -> EngineConfig:
    """The one validation: name -> (source, value) to a configuration, in which keys are digests. Raises ConfigError."""
    tree: dict[str, dict[str, Any]] = {}
    for name, (_, value) in values.items():
        tree.setdefault(BY_NAME[name].group, {})[name] = value
    try:
        config = msgspec.convert(tree, EngineConfig)
    except msgspec.ValidationError as error:
        raise _explained(str(error), values) from None
    return structs.replace(
        config, server=structs.replace(config.server, api_key=tuple(map(configured, config.server.api_key)))
    )


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_LIMITS = {">=": "must be at least", "<=": "must be at most", ">": "must be more than", "<": "must be less than"}


def _explained(problem: str, values: Mapping[str, tuple[str, Any]]) -> ConfigError:
    """msgspec says "Expected `int` >= 1 - at `$.cache.block_size`"; a user wants the flag, the limit and the value."""
    reason, _, path = problem.partition(" - at ")
    name = re.sub(r"\[.*?\]", "", path.strip("`$.")).rpartition(".")[2]
    source, value = values[name]
    if limit := re.fullmatch(r"Expected `\w+` (<=|>=|<|>) (\S+)", reason):
        reason = f"{_LIMITS[limit[1]]} {limit[2].removesuffix('.0')}"
    elif BY_NAME[name].choices:
        reason = f"must be one of {', '.join(BY_NAME[name].choices)}"
    else:
        reason = f"expected {_KINDS[BY_NAME[name].kind]}{' or a list of it' if BY_NAME[name].several else ''}"
    return ConfigError(f"{source}: {reason}, got {value!r:.80}")


def likely_typos(environ: Mapping[str, str]) -> list[str]:
    """One line for each QUIRE_ variable that is no option but nearly one. Others may be anybody's, and are let be."""
    known = {option.env for option in OPTIONS}
    found = []
    for name in sorted(environ):
        if (
            name.startswith(ENV_PREFIX)
            and name not in known
            and (near := difflib.get_close_matches(name, known, n=1, cutoff=0.85))
        ):
            found.append(f"the environment variable {name} is not an option and is ignored; did you mean {near[0]}?")
    return found


# --- from values to text ----------------------------------------------------------------------------------------------


def to_flags(config: EngineConfig) -> list[str]:
    """Flags that say how `config` differs from the defaults."""
    flags: list[str] = []
    for option in OPTIONS:
        value = getattr(getattr(config, option.group), option.name)
        if value == option.default:
            continue
        if option.kind is bool:
            flags.append(option.flag if value else "--no-" + option.flag[2:])
        elif option.several:
            flags += [f"{option.flag}={member}" for member in value]
        else:
            flags.append(f"{option.flag}={value!r}" if option.kind is float else f"{option.flag}={value}")
    return flags


def to_yaml(config: EngineConfig) -> str:
    """Every option by group, readable by --config."""
    import yaml  # noqa: PLC0415 (as above)

    text: str = yaml.safe_dump(
        msgspec.to_builtins(config), sort_keys=False
    )  # in ASCII: YAML takes some other line ends for spaces
    return text


def markdown(options: Sequence[Option] = OPTIONS) -> str:
    """The README's table: one heading row per group."""
    rows = ["| Option | Default | Meaning |", "|---|---|---|"]
    titles = {group.name: group.type.__doc__ for group in structs.fields(EngineConfig)}
    for group in GROUPS:
        rows.append(f"| **{titles[group]}** | | |")
        for option in (o for o in options if o.group == group):
            names = ", ".join(f"`{flag}`" for flag in option.flags if flag.startswith("--"))
            choices = f" One of {', '.join(f'`{c}`' for c in option.choices)}." if option.choices else ""
            default = f"`{option.default_text}`" if option.default_text else ""
            rows.append(f"| {names} | {default} | {option.description}{choices} |".replace("|  |", "| |"))
    return "\n".join(rows)


if __name__ == "__main__":
    print(markdown())
