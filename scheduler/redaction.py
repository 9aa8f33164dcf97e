"""A journal without what people wrote, which replays to the same decisions.

What the scheduler reads of token ids is which are equal, so a secret permutation of the vocabulary may take their place:
prefixes are shared and outputs end as before. Names of blocks, salts, tenants and clients become keyed hashes; names
that the replay would compute of other tokens are given to it. The key is drawn for each file and kept nowhere.

Blocks behind the prompt of a beam search get names of their own: where another request came to the same tokens and found
them, a replay does not.

It hides text from whoever reads the file. It is a substitution all the same: who has much of it can count how often an id
comes, and guess. Lengths, times and sampling parameters are as they were.
"""

import random
import secrets
from array import array
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import Any

import msgspec

from ..common.messages import StepResult
from . import snapshot
from .journal import Added, Answered, Began, Entry
from .request import Request
from .snapshot import Node, Ref

WORDS = frozenset({"", "stop", "length", "abort", "error", "timeout"})
PLANS = "common.messages:StepPlan"  # its columns are no tokens
CONFIGURATIONS = "common.config:"
PARAMETERS = "common.sampling:SamplingParams"
HYPOTHESES = "common.messages:Hypothesis"
REQUESTS = "scheduler.request:Request"
ANSWERS = "scheduler.groups:Answer"
# Of the blocks of the request that arrived as the so-manieth; None: those that it had, as of a beam, which takes others
Names = Callable[[int], list[bytes] | None]


class Redactor:
    """One mapping, for one file. Token ids of the vocabulary stay in it."""

    def __init__(self, vocab_size: int, key: bytes | None = None) -> None:
        self._key = key or secrets.token_bytes(32)
        self._ids = list(range(vocab_size))
        random.Random(self._key).shuffle(self._ids)

    def segment(self, entries: list[Entry], requests: list[Request]) -> list[Entry]:
        """Of a journal; `requests` are those it speaks of, those that were added last."""
        num_added = sum(isinstance(entry, Added) for entry in entries)
        added = iter(requests[len(requests) - num_added :])
        by_arrival = {request.arrival: request for request in requests}
        return [self._entry(entry, added, by_arrival) for entry in entries]

    def _entry(self, entry: Entry, added: Iterator[Request], by_arrival: dict[int, Request]) -> Entry:
        match entry:
            case Began(state=state) if state:
                there = {arrival: request.digests for arrival, request in by_arrival.items() if not request.group}
                return msgspec.structs.replace(entry, state=self._state(state, there.get))
            case Added(state=state):
                request = next(added)
                names = request.digests[: request.group.num_named] if request.group else request.digests
                return msgspec.structs.replace(entry, state=self._state(state, lambda _: names))
            case Answered(result=result):
                return msgspec.structs.replace(entry, result=self._result(result))
            case _:
                return entry

    def _result(self, result: StepResult) -> StepResult:
        tokens, best_ids = self.column(result.tokens), self.column(result.best_ids)
        return msgspec.structs.replace(result, tokens=tokens, best_ids=best_ids)

    def _state(self, state: bytes, names: Names) -> bytes:
        nodes = snapshot.decode(state)
        special = _Special(nodes, names)
        return snapshot.encode([self._node(i, node, special) for i, node in enumerate(nodes)])

    # --- values -------------------------------------------------------------------------------------------------------

    def ids(self, ids: Iterable[int]) -> list[int]:
        """What is beyond the vocabulary is nobody's text."""
        mapped, size = self._ids, len(self._ids)
        return [mapped[id] if 0 <= id < size else id for id in ids]

    def column(self, column: bytes) -> bytes:
        """Of token ids. One that makes no sense keeps its length."""
        return bytes(len(column)) if len(column) % 4 else array("i", self.ids(array("i", column))).tobytes()

    def bytes(self, value: bytes) -> bytes:
        """Tokens where it can be tokens: a hash that is a column of small numbers would be a rare one."""
        if not len(value) % 4 and all(0 <= id < len(self._ids) for id in array("i", value)):
            return self.column(value)
        return blake2b(value, key=self._key, digest_size=min(max(len(value), 1), 64)).digest()

    def text(self, text: str) -> str:
        if text in WORDS:
            return text
        return blake2b(text.encode(errors="surrogatepass"), key=self._key, digest_size=6).hexdigest()

    def value(self, value: Any) -> Any:
        match value:
            case bytes():
                return self.bytes(value)
            case str():
                return self.text(value)
            case list():
                return [self.value(part) for part in value]
            case _:
                return value

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _node(self, number: int, node: Node, special: "_Special") -> Node:
        content = node.content
        if number in special.names:
            content = [self.bytes(name) for name in special.names[number]]
        elif number in special.tokens:
            content = self.column(content) if node.kind == "array" else self.ids(content)
        elif number in special.emptied:
            content = []
        elif node.kind in ("object", "struct"):
            if node.name != PLANS and not node.name.startswith(CONFIGURATIONS):
                content = [value if i % 2 == 0 else self.value(value) for i, value in enumerate(content)]
        elif node.kind not in ("array", "enum", "method", "function"):
            content = self.value(content)
        return Node(node.kind, node.name, content)


class _Special:
    """Which nodes are not what they look like, by what refers to them: `tokens`, lists of names (`names`), and what is of
    no use to a replay (`emptied`)."""

    def __init__(self, nodes: list[Node], names: Names) -> None:
        self.tokens: set[int] = set()
        self.names: dict[int, list[bytes]] = {}
        self.emptied: set[int] = set()
        for node in nodes:
            if node.name == REQUESTS:
                parts = dict(zip(node.content[::2], node.content[1::2], strict=True))
                self.tokens |= {_number(parts["tokens"]), _number(parts["stops"])}
                if (named := names(parts["arrival"])) is not None:
                    self.names[_number(parts["digests"])] = named
            elif node.name in (HYPOTHESES, ANSWERS):
                self.tokens.add(_number(node.content[node.content.index("tokens") + 1]))
            elif node.name == PARAMETERS:
                parts = dict(zip(node.content[::2], node.content[1::2], strict=True))
                self.tokens.add(_number(parts["stop_token_ids"]))
                self.emptied |= {_number(parts["logit_bias"]), _number(parts["stop"])}


def _number(ref: Ref) -> int:
    return int.from_bytes(ref.data, "little")
