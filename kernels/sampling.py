"""The next token of each row, from logits to ids: a pure function of a row's logits, parameters, tokens and position.

Order, where it matters vLLM's: bias, penalties, bans, temperature, min-p, top-k, top-p, one draw. The repetition
penalty multiplies or divides by the sign of the logit, so bias comes before it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .filters import keep_likely
from .gumbel import gumbel_argmax
from .penalties import Floats, Ints, add_entries, penalize

Flags = NDArray[np.bool_]

COLDEST = 1e-5  # below this a temperature is greedy: dividing by it would overflow (vLLM's limit, too)


@dataclass(frozen=True, slots=True)
class Entries:
    """Numbers to add to single logits, as coordinates. The pairs (row, id) are distinct."""

    rows: Ints  # index into the s rows that sample, ascending
    ids: Ints
    values: Floats

    def take(self, which: Flags) -> "Entries":
        kept = which[self.rows]
        return Entries((which.cumsum() - 1)[self.rows[kept]], self.ids[kept], self.values[kept])


@dataclass(frozen=True, slots=True)
class Draws:
    """What is sampled in one step: columns of s entries on the host, which says what work there is without asking the
    device."""

    rows: Ints  # index into the tokens of all rows
    positions: Ints  # index of the sampled token in its sequence, which is the number of tokens before it
    num_prompt: Ints
    temperature: Floats
    top_k: Ints  # 0: all
    top_p: Floats
    min_p: Floats
    repetition: Floats
    presence: Floats
    frequency: Floats
    seeds: Ints
    bias: Entries
    bans: Entries  # -inf, of tokens that must not be drawn

    @property
    def random(self) -> Flags:
        return np.greater_equal(self.temperature, COLDEST)

    @property
    def penalized(self) -> Flags:
        return np.not_equal(self.repetition, 1.0) | np.not_equal(self.presence, 0.0) | np.not_equal(self.frequency, 0.0)

    @property
    def adjusted(self) -> Flags:
        """Rows whose logits something changes before they are compared."""
        which = self.penalized
        which[self.bias.rows] = which[self.bans.rows] = True
        return which

    def take(self, which: Flags) -> "Draws":
        def taken(column: Any) -> Any:
            return column.take(which) if isinstance(column, Entries) else column[which]

        return Draws(**{field.name: taken(getattr(self, field.name)) for field in fields(self)})


def largest(logits_sv: Tensor) -> tuple[Tensor, Tensor]:
    """The first largest of each row [s] int64, and which rows hold NaN [s] bool; the id of such a row is any."""
    ids = logits_sv.argmax(-1)
    return ids, logits_sv.gather(1, ids[:, None])[:, 0].isnan()  # argmax takes NaN for the largest


Largest = Callable[[Tensor], tuple[Tensor, Tensor]]


def sample(logits_sv: Tensor, draws: Draws, tokens: Tensor, largest: Largest = largest) -> tuple[Tensor, Tensor]:
    """Ids [s] int64, and which rows hold NaN [s] bool (their id is 0); both on the device.

    `logits_sv` float32 is left as it is; `tokens` [rows, length] int32 are the tokens of all rows;
    behind a row's own may stand any others. Work is done only for the rows that ask for it: an all-greedy step is
    one argmax.
    """
    ids, faulty = largest(logits_sv)
    if (touched := draws.adjusted | draws.random).any():
        at = _indices(touched, logits_sv)
        ids[at] = _choose(logits_sv[at], draws.take(touched), tokens)
    return ids.masked_fill_(faulty, 0), faulty


def likeliest(logits_sv: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids [s, count] int64, likeliest first, and their log-probabilities [s, count] float32, before anything changes
    the logits."""
    logprobs, ids = logits_sv.log_softmax(-1).topk(count, dim=-1)
    return ids, logprobs


def logprobs_of(logits_sv: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [s] float32 of these ids [s], likewise."""
    return logits_sv.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def _choose(logits_sv: Tensor, draws: Draws, tokens: Tensor) -> Tensor:
    """As `sample`, for rows of which each asks for something. Overwrites the logits."""
    _adjust(logits_sv, draws, tokens)
    ids = logits_sv.argmax(-1)
    if (random := draws.random).any():
        chosen = draws.take(random)
        at = _indices(random, logits_sv)
        scaled = logits_sv[at] / torch.from_numpy(chosen.temperature).to(logits_sv)[:, None]
        keep_likely(scaled, min_p_s=chosen.min_p, top_k_s=chosen.top_k, top_p_s=chosen.top_p)
        seeds, positions = torch.from_numpy(np.stack((chosen.seeds, chosen.positions))).to(logits_sv.device)
        ids[at] = gumbel_argmax(scaled, seeds, positions)
    return ids


def _adjust(logits_sv: Tensor, draws: Draws, tokens: Tensor) -> None:
    add_entries(logits_sv, draws.bias.rows, draws.bias.ids, draws.bias.values)
    if (penalized := draws.penalized).any():
        chosen = draws.take(penalized)
        at = _indices(penalized, logits_sv)
        logits = logits_sv[at]
        penalize(
            logits,
            tokens[torch.from_numpy(chosen.rows).to(tokens.device), : int(chosen.positions.max())],
            chosen.positions,
            chosen.num_prompt,
            repetition_s=chosen.repetition,
            presence_s=chosen.presence,
            frequency_s=chosen.frequency,
        )
        logits_sv[at] = logits
    add_entries(logits_sv, draws.bans.rows, draws.bans.ids, draws.bans.values)


def _indices(which: Flags, like: Tensor) -> Tensor:
    return torch.from_numpy(which.nonzero()[0]).to(like.device)
