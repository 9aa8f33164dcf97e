"""Beam search over sequences of which somebody else computes what may follow. Pure: numbers in, numbers out.

The search is that of transformers' `generate(num_beams=k, do_sample=False)`, down to the rounding of scores, so that
answers can be compared: at each step the best continuations of all beams together go on, those that end are set aside
if they are among the first k, and the search is over when what is set aside is good enough (`early_stopping`). The
length penalty is that of Wu et al., "Google's Neural Machine Translation System" (arXiv:1609.08144), without their
constants.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice
from math import inf

from ..common.messages import Hypothesis
from ..common.sampling import SamplingParams

Candidates = Sequence[tuple[int, float]]  # tokens that may follow a sequence and their log-probability, best first
Child = tuple[int, int]  # index of the beam that goes on, and by which token


@dataclass(slots=True)
class Search:
    """One search. `advance` is asked once for each length of its beams; all of them are equally long."""

    num_prompt: int
    limit: int  # most tokens, prompt included
    sampling: SamplingParams
    scores: list[float] = field(default_factory=lambda: [0.0])  # of the beams that go on, best first
    ended: list[Hypothesis] = field(default_factory=list)  # the best so far, at most as many as there are beams
    over: bool = False

    @property
    def best(self) -> list[Hypothesis]:
        """What the client gets of a search that is over."""
        return self.ended[: self.sampling.n]

    def advance(self, beams: "Sequence[array[int]]", candidates: Sequence[Candidates]) -> list[Child]:
        """The beams that go on, best first; none when the search is over.

        `beams` are the tokens of those that were returned last, of the prompt alone at first; `candidates`, for each of
        them, are as many as `SamplingParams.num_candidates`.
        """
        sampling, length = self.sampling, len(beams[0]) + 1 - self.num_prompt
        divisor = single(length**sampling.length_penalty)
        ends_all = len(beams[0]) + 1 >= self.limit
        going_on: list[tuple[float, int, int]] = []
        for rank, (score, beam, token) in enumerate(self._continuations(candidates)):
            stops = token in sampling.stop_token_ids
            if not (stops or ends_all):
                going_on.append((score, beam, token))
            elif rank < sampling.beam_width:
                output = [*beams[beam][self.num_prompt :], token]
                reason = "stop" if stops else "length"
                self.ended.append(Hypothesis(output, reason, score, single(score / divisor)))
        self.ended.sort(key=lambda hypothesis: -hypothesis.score)
        del self.ended[sampling.beam_width :]
        del going_on[sampling.beam_width :]
        self.scores = [score for score, _, _ in going_on]
        self.over = ends_all or self._good_enough(divisor)
        return [] if self.over else [(beam, token) for _, beam, token in going_on]

    def _continuations(self, candidates: Sequence[Candidates]) -> Iterator[tuple[float, int, int]]:
        """The best of all beams together: score, beam and token. Of equals the earlier beam comes first."""
        each = (
            [(single(score + logprob), beam, token) for token, logprob in following]
            for beam, (score, following) in enumerate(zip(self.scores, candidates, strict=True))
        )
        return islice(merge(*each, key=lambda continuation: -continuation[0]), self.sampling.num_candidates)

    def _good_enough(self, divisor: float) -> bool:
        """Whether what goes on cannot, or is not likely to, be better than what has ended."""
        sampling = self.sampling
        if len(self.ended) < sampling.beam_width:
            return False
        if sampling.early_stopping is True or sampling.beam_width == 1:  # one beam is greedy search
            return True
        if sampling.early_stopping == "never" and sampling.length_penalty > 0.0:
            divisor = single((self.limit - self.num_prompt) ** sampling.length_penalty)
        return not self.scores or single(self.scores[0] / divisor) <= self.ended[-1].score


def single(value: float) -> float:
    """Rounded as float32 is."""
    return array("f", (value,))[0]


def candidates_of(best_ids: bytes, best_logprobs: bytes, counts: Sequence[int]) -> list[Candidates]:
    """The columns of a `StepResult`, for rows that asked for so many each; empty where they do not make sense."""
    ids, logprobs = array("i"), array("f")
    try:
        ids.frombytes(best_ids)
        logprobs.frombytes(best_logprobs)
    except ValueError:
        return [[]] * len(counts)
    if not len(ids) == len(logprobs) == sum(counts):
        return [[]] * len(counts)
    pairs = iter(zip(ids.tolist(), logprobs.tolist(), strict=True))
    found = [list(islice(pairs, count)) for count in counts]
    return [following if _sensible(following) else [] for following in found]


def _sensible(following: Candidates) -> bool:
    logprobs = [logprob for _, logprob in following]
    ids = {token for token, _ in following}
    distinct = len(ids) == len(following) and min(ids) >= 0
    return distinct and all(logprob < inf for logprob in logprobs) and logprobs == sorted(logprobs, reverse=True)
