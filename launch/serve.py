#!/usr/bin/env python3
"""Serve a model: an OpenAI-compatible server, with all of its processes on this machine.

launch/serve.py                                     the built-in model at http://127.0.0.1:8000
launch/serve.py --model Qwen/Qwen3-0.6B --tp 2      two workers split each layer
launch/serve.py ./my-model --host 0.0.0.0 --api-key "$KEY"
launch/serve.py --config engine.yaml --port 9000    a flag wins over the file
"""

import logging
import sys
from collections.abc import Sequence

try:
    from quire.common.errors import EXIT_FATAL, ConfigError
    from quire.launch.arguments import SOURCES, Parser, add_options, configuration, printable
    from quire.launch.component import told
    from quire.launch.streams import stand_in
except ModuleNotFoundError as error:
    if error.name != "quire":
        raise
    sys.exit("quire is not installed in this Python: run `pip install -e .` in the folder above this script")


def main(argv: Sequence[str] | None = None, *, prog: str = "serve.py") -> int:
    """Exit codes: 0 after SIGTERM or Ctrl-C, EXIT_CONFIG when the configuration cannot be served, EXIT_FATAL after a fault."""
    what, _, examples = __doc__.partition("\n\n")
    examples = examples.replace("launch/serve.py", prog) if " " in prog else examples
    parser = Parser(prog, what, f"{examples}\n{SOURCES}", usage="[MODEL] [OPTION ...]")
    parser.add_argument("positional", nargs="?", metavar="MODEL", help="The same as --model.")
    add_options(parser)
    stand_in()
    try:
        values = parser.read(sys.argv[1:] if argv is None else argv)
        if values.positional is not None:
            if getattr(values, "model", values.positional) != values.positional:
                raise ConfigError(f"two models are named: {values.positional} and --model {values.model}")
            values.model = values.positional
        config = configuration(values)
        if values.print_config:
            print(printable(config), end="")
            return 0

        from quire.launch.supervisor import serve  # noqa: PLC0415 (--help needs none of it)

        return serve(config)
    except ConfigError as error:
        return told(error)
    except KeyboardInterrupt:  # before the supervisor takes signals: nothing runs yet
        return 130
    except Exception as error:
        logging.exception("a fault of Quire's: %r", error)
        return EXIT_FATAL


if __name__ == "__main__":
    sys.exit(main())
