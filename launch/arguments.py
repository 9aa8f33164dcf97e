"""The command line of every process that takes the engine's options: flags, `--help`, `--config`, `--print-config`."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from msgspec import structs

from ..common.config import EngineConfig
from ..common.errors import ConfigError
from .options import GROUPS, OPTIONS, Option, likely_typos, nearest, resolve, to_yaml, value_of

SOURCES = f"""\
Where values come from, first match wins: the flag, the environment variable (in brackets above; commas separate several
values), the file of --config (YAML, or JSON in a .json; keys are the flags' names, flat or under the groups
{", ".join(GROUPS)}), the default. Whole numbers take units: 8k is 8,000 and
8K is 8,192; 512MiB, 4GiB."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a ConfigError and a wrong flag is answered with the nearest right one."""

    def __init__(self, prog: str, description: str, epilog: str = "", *, usage: str = "[OPTION ...]") -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, f"{prog} {usage}", description, epilog, allow_abbrev=False, formatter_class=form)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Raises ConfigError; --help prints and exits."""
        values, unknown = self.parse_known_args([_dashed(word) for word in argv])
        if not unknown:
            return values
        wrong = unknown[0].partition("=")[0]
        if wrong.startswith("-"):
            self.error(f"there is no option {wrong}.{nearest(wrong, self._option_string_actions)}")
        words = [action.metavar for action in self._actions if not action.option_strings]
        self.error(f"{wrong!r:.80} is one argument too many: {f'one {words[0]} only' if words else 'options only'}")


def _dashed(word: str) -> str:
    """--max_model_len is read as --max-model-len."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def add_options(parser: argparse.ArgumentParser) -> None:
    """All options of the engine, by group. Their values stay text: `resolve` reads and checks them."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML or .json file with any of the options below.")
    parser.add_argument(
        "--print-config", action="store_true", help="Print the configuration that results, as YAML, and exit."
    )
    for group in structs.fields(EngineConfig):
        section = parser.add_argument_group(f"{group.type.__doc__}")
        for option in (o for o in OPTIONS if o.group == group.name):
            section.add_argument(*option.flags, **_argument(option))


def add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    """One of them, for a process that takes the others from the scheduler. `chosen` reads it."""
    parser.add_argument(*option.flags, **_argument(option))


def chosen(values: argparse.Namespace, option: Option, environ: Mapping[str, str] = os.environ) -> Any:
    """The value of an option that `add_option` added: the flag's, else the environment's, else the default."""
    return value_of(option, getattr(values, option.name, None), environ)


def _argument(option: Option) -> dict[str, Any]:
    default = f" Default: {option.default_text}." if option.default_text else ""
    repeated = " May be repeated." if option.several else ""
    argument: dict[str, Any] = {
        "dest": option.name,
        "default": argparse.SUPPRESS,
        "help": f"{option.description}{repeated}{default} [{option.env}]".replace("%", "%%"),
    }
    if option.kind is bool:
        return argument | {"action": argparse.BooleanOptionalAction}
    argument["metavar"] = (
        "{" + ",".join(option.choices) + "}" if option.choices else option.metavar or option.kind.__name__.upper()
    )
    return argument | ({"action": "append"} if option.several else {})


def configuration(values: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> EngineConfig:
    """The configuration that the parsed command line, the environment and the YAML file make. Raises ConfigError."""
    for line in likely_typos(environ):
        print(f"warning: {line}", file=sys.stderr)
    flags = {option.name: getattr(values, option.name) for option in OPTIONS if hasattr(values, option.name)}
    return resolve(flags, environ=environ, file=values.config)


def printable(config: EngineConfig) -> str:
    """As YAML, API keys left out: what is printed is often pasted somewhere."""
    keys = len(config.server.api_key)
    shown = structs.replace(config, server=structs.replace(config.server, api_key=()))
    return to_yaml(shown) + (f"# not shown: api_key ({keys} of them)\n" if keys else "")
