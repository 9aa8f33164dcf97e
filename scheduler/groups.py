"""The beams of a search as requests: each computes one sequence, and all wait for each other.

A beam is a request like any other, with a row, blocks and a rank of its own; it may be preempted, copied to the host,
computed again. Only what it samples is not its own to decide: it is held (`limit`) until every beam of its group has
answered; then the search says which of them go on and by which tokens, and requests take over from others what these
have computed. So all that is lost with a row is time: an answer, once given, is kept.

Sharing blocks between beams and copying the last one on write is from Kwon et al., "Efficient Memory Management for
Large Language Model Serving with PagedAttention" (SOSP 2023), section 4.4.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from .beams import Candidates, Child, Search
from .kv_cache import KvCache
from .queue import WaitingQueue
from .request import Account, Request
from .rows import Rows
from .suspects import Suspects


@dataclass(slots=True)
class Answer:
    """`tokens` are the one that the workers have put into the row, and the likeliest, whose `logprobs` these are."""

    tokens: list[int]
    logprobs: list[float]

    @property
    def following(self) -> Candidates:
        return list(zip(self.tokens[1:], self.logprobs, strict=True))


@dataclass(slots=True, eq=False)
class Group:
    """`members` are as many as the search is wide, and the first is the one that the client knows."""

    search: Search
    members: list[Request]
    beams: list[Request]  # those that hold a beam now, best first
    answers: dict[Request, Answer] = field(default_factory=dict)
    num_named: int = 0  # blocks of the prompt: beams have names of their own behind them


def begin(request: Request, first_arrival: int) -> Sequence[Request]:
    """All requests that a new one stands for, itself first. Their ranks follow each other."""
    request.arrival = first_arrival
    if not request.sampling.beam_width:
        return (request,)
    others = [
        replace(
            request,
            tokens=request.tokens[:],
            arrival=first_arrival + i,
            account=Account(),
            blocks=[],
            digests=[],
            num_cached=0,
            charged=request.num_prompt,
            pin_s=0.0,
        )
        for i in range(1, request.sampling.beam_width)
    ]
    members = [request, *others]
    group = Group(Search(request.num_prompt, request.limit, request.sampling), members, [request])
    for member in members:
        member.group = group
        member.limit = len(member.tokens) + 1
    return members


def members_of(request: Request) -> Sequence[Request]:
    return (request,) if request.group is None else request.group.members


def known(request: Request) -> Request:
    """The one that the client knows."""
    return request if request.group is None else request.group.members[0]


def held(request: Request) -> bool:
    """Whether it has answered, and waits for others of its group."""
    return request.group is not None and request in request.group.answers


class Groups:
    """Moves requests of groups between rows, blocks and the queue. `parked` are those that neither run nor wait."""

    def __init__(
        self, kv: KvCache, rows: Rows, waiting: WaitingQueue, suspects: Suspects, running: list[Request]
    ) -> None:
        self.parked: set[Request] = set()
        self._kv, self._rows, self._waiting, self._suspects, self._running = kv, rows, waiting, suspects, running

    def enter(self, members: Sequence[Request]) -> None:
        """What has begun waits; of a group the first, until there is something for the others."""
        for request in members:
            if request.group is not None:
                request.group.num_named = request.num_prompt // self._kv.block_size
            self._waiting.enter(request)
            self._suspects.note(request)
        for request in members[1:]:
            self._park(request)

    def requeue(self, request: Request) -> None:
        """It has lost its row. One that has answered has nothing to wait for in the queue."""
        self.parked.add(request) if held(request) else self._waiting.push(request)

    def leave_queue(self, request: Request) -> None:
        """It has no row, and ends."""
        if request in self.parked:
            self.parked.remove(request)
        else:
            self._waiting.remove(request)

    def hear(self, request: Request, token: int, following: Candidates) -> bool:
        """The answer of a beam, whose row holds `token` now. Whether that was the last one, and the search is over."""
        group = request.group
        assert group is not None, request
        group.answers[request] = Answer([token, *(id for id, _ in following)], [logprob for _, logprob in following])
        request.limit = len(request.tokens)  # no more than it has
        if request.row is None:
            self._park(request)
        elif request.suspect:  # another suspect of the group may have to run
            self._drop(request)
        if len(group.answers) < len(group.beams):
            return False
        children = group.search.advance(
            [beam.tokens for beam in group.beams], [group.answers[beam].following for beam in group.beams]
        )
        if not group.search.over:
            self._fork(group, children)
        return group.search.over

    def last_held(self) -> Request | None:
        """Who gives up its row when nobody else can go on."""
        return next((request for request in reversed(self._running) if held(request)), None)

    def _fork(self, group: Group, children: Sequence[Child]) -> None:
        """Let the children go on: one of each beam where that was, and the others on the places of beams that do not."""
        heirs = _heirs(group, children)
        free = sorted((member for member in group.members if member not in heirs), key=lambda r: r.row is None)
        for member in free:
            if member.row is not None:
                self._kv.leave(member)
        beams = []
        for index, (beam, token) in enumerate(children):
            parent = group.beams[beam]
            request = parent
            if heirs[parent] != index:
                request = free.pop(0)
                request.tokens = parent.tokens[:]
                self._kv.rename(request, parent)
                self._take_over(request, parent)
            elif request.row is None:
                self._wait(request)
            elif token != group.answers[request].tokens[0]:
                self._rows.rewrite(request)
            beams.append(request)
        for request, (_, token) in zip(beams, children, strict=True):
            request.tokens.append(token)
            request.limit = len(request.tokens) + 1
        assert not free, "a search is as wide at each step as at the others"
        group.beams = beams
        group.answers.clear()

    def _take_over(self, request: Request, parent: Request) -> None:
        """Go on where the parent is, if there is room for that now; or wait."""
        place = not request.suspect and (request.row is not None or bool(self._rows.free))
        if place and self._kv.fork(request, parent):
            if request.row is None:
                self.parked.remove(request)
                request.turn = parent.turn
                insort(self._running, request, key=attrgetter("rank"))
            self._rows.rewrite(request)
            return
        if request.row is not None:
            self._drop(request)
        self._wait(request)

    def _drop(self, request: Request) -> None:
        """Give its row back, and park it."""
        self._kv.leave(request)
        self._rows.take_back(request)
        self._running.remove(request)
        self.parked.add(request)

    def _park(self, request: Request) -> None:
        """It waits no more for a row."""
        self._waiting.remove(request)
        self.parked.add(request)

    def _wait(self, request: Request) -> None:
        self.parked.remove(request)
        self._waiting.push(request)


def _heirs(group: Group, children: Sequence[Child]) -> dict[Request, int]:
    """Which child goes on in the place of each beam that has any: that of the token which the row has already, or the
    first."""
    heirs: dict[Request, int] = {}
    for index, (beam, token) in enumerate(children):
        parent = group.beams[beam]
        if parent not in heirs or token == group.answers[parent].tokens[0]:
            heirs[parent] = index
    return heirs
