"""The `quire` command."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..common.errors import ConfigError
from .component import told
from .options import nearest

COMMANDS = {  # name -> (module with main(argv, prog=...), what it does)
    "serve": ("serve", "Serve a model: an OpenAI-compatible server."),
    "chat": ("chat", "Chat with a server, in the terminal or through a pipe."),
    "complete": ("complete", "Continue a text."),
    "keys": ("keys", "Make the keys of an engine on several hosts."),
    "tap": ("tap", "Show what the processes of a running engine say to each other."),
    "journal": ("journal", "Have a running engine write down what its scheduler did."),
    "bench": ("bench", "Measure how fast it is, and what others take."),
    "replay": ("replay", "Run a scheduler again from its journal, on no device."),
}

HELP = """\
usage: quire COMMAND [OPTION ...]

Quire serves large language models from paged memory.

{commands}

`quire COMMAND --help` tells all about one. To begin, in two terminals:

    quire serve                         the built-in model at http://127.0.0.1:8000
    quire chat -q 'What is 17 + 25?'    ask it something

From Python: from quire import LLM; LLM("demo").generate("def fibonacci(n):")"""


STOPPED = 130  # a shell's code for Ctrl-C
READER_GONE = 141  # and for SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    try:
        code = _run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return STOPPED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more at its end
        return READER_GONE
    return code


def _run(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())))
        return 0
    if words[0] in ("-V", "--version"):
        print(f"quire {__version__}")
        return 0
    command = words[0]
    if command not in COMMANDS:
        return told(ConfigError(f"there is no command {command!r}.{nearest(command, COMMANDS)} (see quire --help)"))
    module = import_module(f".{COMMANDS[command][0]}", __package__)
    code: int = module.main(words[1:], prog=f"quire {command}")
    return code


if __name__ == "__main__":
    sys.exit(main())
