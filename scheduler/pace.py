"""What a step takes, learnt from those that were computed, and how much prefill it may have. Pure: no clock.

    seconds = a + b * rows + c * context                   of the rows that decode: weights, sampler, reading their KV
            + d * tokens + e * pairs + f, if any prefill   of the chunks: matrices, attention, leaving the fast path

The two lines are fitted apart: hours of decoding must not wear away what is known of prefill. Non-negative least squares
by coordinate descent over moments that fade (recursive least squares in its information form). Each step counts by its
relative error, so that one that took a thousand times as long, compiling a kernel, weighs a millionth.

That a chunk is bounded by time instead of tokens, since attention makes a token at 30,000 cost several at 0, is the
stall-free batching of Sarathi-Serve (Agrawal et al., OSDI 2024) with a measured bound in place of a profiled one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import NamedTuple

FORGET = 0.99  # weight of a step against the next one of its kind
AIM = 0.9  # of the target: predictions are as often too low as too high
SLOWDOWN = 2.0  # of a step by prefill, that is always allowed
MANY = 1 << 40  # tokens: no limit


@dataclass(frozen=True, slots=True)
class Load:
    """What a step computes. A row with one token decodes, one with more is a chunk of a prompt."""

    rows: int = 0  # that decode
    context: int = 0  # tokens before theirs
    tokens: int = 0  # of chunks
    pairs: float = 0.0  # of tokens in chunks and tokens that these see


class Claim(NamedTuple):
    """A prompt that is being computed."""

    start: int
    left: int  # tokens
    priority: int = 0
    level: float = 0.0  # of its tenant
    turn: int = 0  # the order of admission
    crowds: bool = False  # its tenant has more than its part of the rows, and there are others

    @property
    def order(self) -> tuple[int, float, int, int]:
        """Whose turn it is in a step: that of the tenant that has had least, and of its prompts the shortest."""
        return self.priority, self.level, self.left, self.turn


def chunk_pairs(start: int, count: int) -> float:
    """What tokens [start, start + count) see."""
    return count * (start + count / 2)


class Fit:
    """y as a non-negative combination of x. What comes later counts more."""

    def __init__(self, size: int) -> None:
        self.weights = [0.0] * size
        self.known = False
        self._gram = [[0.0] * size for _ in range(size)]
        self._moment = [0.0] * size

    def predict(self, x: Sequence[float]) -> float:
        return sum([w * v for w, v in zip(self.weights, x, strict=True)])

    def learn(self, x: Sequence[float], y: float, scale: float) -> None:
        """`scale` is what an error is measured by."""
        weights, moment = self.weights, self._moment
        x = [v / scale for v in x]
        y /= scale
        for i, row in enumerate(self._gram):
            xi = x[i]
            for j, xj in enumerate(x):
                row[j] = FORGET * row[j] + xi * xj
            moment[i] = FORGET * moment[i] + xi * y
        for _ in range(2):  # sweeps; the next step goes on where this one ends
            for i, row in enumerate(self._gram):
                if row[i] > 0.0:
                    slope = moment[i] - sum([g * w for g, w in zip(row, weights, strict=True)])
                    weights[i] = max(0.0, weights[i] + slope / row[i])
        self.known = True


class Pace:
    """The step-time model. `target_itl_s`: the longest time between two tokens that prefill may bring about; 0 is no
    limit."""

    def __init__(self, target_itl_s: float) -> None:
        self.target_itl_s = target_itl_s
        self._decode = Fit(3)
        self._prefill = Fit(3)

    def learn(self, load: Load, took_s: float) -> None:
        """`took_s`: what computing the step took, without waiting for those before it. Only more than 0 is believed."""
        if not took_s > 0.0:
            return
        decode = self._decode.predict((1.0, load.rows, load.context))
        if not load.tokens:
            self._decode.learn((1.0, load.rows, load.context), took_s, max(took_s, decode))
            return
        columns = load.tokens, load.pairs, 1.0
        expected = decode + self._prefill.predict(columns)
        self._prefill.learn(columns, max(0.0, took_s - decode), max(took_s, expected))

    def step_s(self, load: Load) -> float:
        """What a step is expected to take, as far as is known."""
        decode = self._decode.predict((1.0, load.rows, load.context))
        return decode + (self._prefill.predict((load.tokens, load.pairs, 1.0)) if load.tokens else 0.0)

    def prefill_s(self, start: int, count: int) -> float | None:
        """What computing tokens [start, start + count) of a prompt adds to a step. None while nothing is known."""
        if not self._prefill.known:
            return None
        per_token, per_pair, _ = self._prefill.weights
        return per_token * count + per_pair * chunk_pairs(start, count)

    def spare_s(self, rows: int, context: int) -> float:
        """What chunks may add to a step beside `rows` that decode. Infinity where there is no limit: nobody decodes, or
        nothing is known yet, and then only the budget of tokens counts.

        The bound of a step is the target or, where decoding alone comes near that, `SLOWDOWN` times what it takes: a
        slow machine must compute prompts as well.
        """
        if not (rows and self.target_itl_s and self._decode.known and self._prefill.known):
            return inf
        decode = self._decode.predict((1.0, rows, context))
        return max(AIM * self.target_itl_s, SLOWDOWN * decode) - decode - self._prefill.weights[2]

    def chunk(self, start: int, spare_s: float) -> int:
        """Most tokens behind `start` that take no more than `spare_s`."""
        if spare_s == inf:
            return MANY
        if spare_s <= 0.0:
            return 0
        per_token, per_pair, _ = self._prefill.weights
        linear = per_token + per_pair * start
        if per_pair * MANY > linear:  # count * linear + count² * per_pair / 2 = spare
            return int((sqrt(linear * linear + 2.0 * per_pair * spare_s) - linear) / per_pair)
        return min(MANY, int(spare_s / linear)) if linear > 0.0 else MANY

    def share(self, claims: Sequence[Claim], budget: int, spare_s: float, least: int) -> list[int]:
        """How many tokens of each prompt a step computes: at most `budget` together, in about `spare_s`, but `least` of
        two prompts at any rate.

        In their order: of a tenant's prompts the shortest comes first, so that a long one does not hold up the short
        ones behind it. Half of the step is kept for the one that was admitted first, so that they do not hold it up. Who
        crowds adds no more than half: others come at any time, and wait for the steps in flight before their own.
        """
        counts = [0] * len(claims)
        order = sorted(range(len(claims)), key=lambda i: claims[i].order)
        first = min(order, key=lambda i: (*claims[i].order[:2], claims[i].turn), default=0)
        half_s = spare_s / 2 if spare_s < inf else 0.0
        kept, kept_s = (budget + 1) // 2, half_s
        for i in order:
            if i == first:
                kept, kept_s = 0, 0.0
            start, left = claims[i][:2]
            mine_s = spare_s - (half_s if claims[i].crowds else kept_s)
            counts[i] = min(left, max(0, budget - kept), self.chunk(start, mine_s))
            budget -= counts[i]
            spare_s -= self.cost_s(Claim(start, counts[i]))
        for i in (first, order[0]) if order else ():
            more = min(least, claims[i].left, counts[i] + max(0, budget)) - counts[i]
            if more > 0:
                counts[i] += more
                budget -= more
        return counts

    def room(self, claims: Sequence[Claim], budget: int, spare_s: float, newcomer: Claim) -> bool:
        """Whether a step that computes all prompts that come before the newcomer has room for it."""
        before = [claim for claim in claims if claim.order[:3] <= newcomer.order[:3]]  # its turn is yet to be given
        if sum([claim.left for claim in before]) >= budget:
            return False
        return spare_s == inf or sum([self.cost_s(claim) for claim in before]) < spare_s

    def cost_s(self, claim: Claim) -> float:
        """Seconds, 0 while nothing is known."""
        return self.prefill_s(claim.start, claim.left) or 0.0
