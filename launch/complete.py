"""`quire complete`: let the model of a server go on with a text."""

import sys
from collections.abc import Sequence

from ..common.errors import ConfigError, RequestError
from .arguments import Parser
from .client import Client, Stats, add_client_options, sampling_of
from .component import told
from .screen import Screen

EXAMPLES = """\
    quire complete 'def fibonacci(n):' --max-tokens 64 --temperature 0
    quire complete < begun.txt"""


def main(argv: Sequence[str] | None = None, *, prog: str = "quire complete") -> int:
    parser = Parser(prog, "Continue a text with the model of a server.", EXAMPLES, usage="[TEXT] [OPTION ...]")
    parser.add_argument(
        "text", nargs="?", metavar="TEXT", help="What to go on with. Default: what is on the standard input."
    )
    parser.add_argument("--echo", action="store_true", help="Print the text itself first.")
    add_client_options(parser)
    screen = Screen()
    try:
        values = parser.read(sys.argv[1:] if argv is None else argv)
        if values.text is None and screen.interactive:
            parser.error("which text?")
        text = sys.stdin.read() if values.text is None else values.text
        client, stats = Client(values.url, values.api_key), Stats()
        body = {"model": values.model or client.first_model(), "prompt": text, **sampling_of(values)}
        if values.echo:
            screen.write(text)
        for piece in client.stream("/v1/completions", body, stats):
            screen.write(piece)
    except ConfigError as error:
        return told(error)
    except RequestError as error:
        screen.end()
        return told(ConfigError(error.message))
    except KeyboardInterrupt:
        screen.end()
        raise
    screen.end()
    if values.stats:
        screen.note(str(stats))
    return 0
