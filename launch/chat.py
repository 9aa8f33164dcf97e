"""`quire chat`: talk to a server in the terminal, or answer one question, or each line of a pipe."""

import sys
from collections.abc import Callable, Sequence

from ..common.errors import EXIT_CONFIG, ConfigError, RequestError
from .arguments import Parser
from .client import Client, Stats, add_client_options, sampling_of
from .component import told
from .screen import Screen

HELP = """\
/reset    forget the conversation
/system   set the instructions: /system You answer in rhyme.
/help     this
/exit     leave (as Ctrl-D does); Ctrl-C stops an answer"""

EXAMPLES = """\
    quire chat                                        a conversation, on a terminal
    quire chat -q 'What is 17 + 25?'                  one question
    echo 'What is 17 + 25?' | quire chat --stats      one turn for each line"""


def main(argv: Sequence[str] | None = None, *, prog: str = "quire chat") -> int:
    parser = Parser(prog, "Chat with the model of a server.", EXAMPLES)
    parser.add_argument("-q", "--question", metavar="TEXT", help="Ask this, print the answer, leave.")
    parser.add_argument("--system", metavar="TEXT", help="Instructions that begin the conversation.")
    add_client_options(parser)
    screen = Screen()
    try:
        values = parser.read(sys.argv[1:] if argv is None else argv)
        client = Client(values.url, values.api_key)
        body = {"model": values.model or client.first_model(), **sampling_of(values)}
        chat = Conversation(client, body, values.system, screen, stats=values.stats)
        if values.question is not None:
            return 0 if chat.say(values.question) else EXIT_CONFIG
        screen.note(f"{body['model']} at {client.url}; /help lists the commands")
        return converse(chat, screen)
    except ConfigError as error:
        return told(error)
    except RequestError as error:
        return told(ConfigError(error.message))


class Conversation:
    """What was said so far; each turn sends all of it."""

    def __init__(
        self, client: Client, body: dict[str, object], system: str | None, screen: Screen, *, stats: bool
    ) -> None:
        self._client = client
        self._body = body
        self._screen = screen
        self._stats = stats
        self.messages: list[dict[str, str]] = []
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forget all turns; `system` None keeps the instructions there are."""
        kept = (
            [{"role": "system", "content": system}] if system else [m for m in self.messages if m["role"] == "system"]
        )
        self.messages = kept

    def say(self, text: str) -> bool:
        """One turn; False when it failed, and is forgotten. An answer that KeyboardInterrupt stops stays as far as it came."""
        asked = [*self.messages, {"role": "user", "content": text}]
        stats, pieces = Stats(), list[str]()
        try:
            for piece in self._client.stream("/v1/chat/completions", {**self._body, "messages": asked}, stats):
                pieces.append(piece)
                self._screen.write(piece)
        except KeyboardInterrupt:
            self._said(asked, pieces)
            raise
        except RequestError as error:
            self._screen.end()
            self._screen.fail(error.message)
            return False
        self._said(asked, pieces)
        if self._stats:
            self._screen.note(str(stats))
        return True

    def _said(self, asked: list[dict[str, str]], pieces: Sequence[str]) -> None:
        self._screen.end()
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def converse(chat: Conversation, screen: Screen) -> int:
    """Read and answer until the input ends. The exit code tells whether every line of a pipe got its answer.

    Ctrl-C stops an answer on a terminal, and everything in a pipe.
    """
    code = 0
    while (line := screen.read()) is not None:
        text = line.strip()
        if text == "/exit":
            break
        if text.startswith("/"):
            _command(text, chat, screen.note)
        elif text and not _turn(chat, screen, text):
            code = 0 if screen.interactive else EXIT_CONFIG
    return code


def _turn(chat: Conversation, screen: Screen, text: str) -> bool:
    try:
        return chat.say(text)
    except KeyboardInterrupt:
        if not screen.interactive:
            raise
        screen.note("stopped")
        return True


def _command(text: str, chat: Conversation, note: Callable[[str], None]) -> None:
    name, _, rest = text.partition(" ")
    if name == "/reset":
        chat.reset()
        note("the conversation is forgotten")
    elif name == "/system" and rest.strip():
        chat.reset(rest.strip())
        note("the conversation begins anew, with these instructions")
    else:
        note(HELP)
