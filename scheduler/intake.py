"""From the wire to a `Request`. The frontend validates for users; here nothing is believed, and nothing raises further on."""

from array import array
from math import inf

from ..common.messages import MAX_TIMEOUT_S, Submit
from .request import Request
from .suspects import FAIL_AT

TYPE = "i"  # int32, as `messages.pack` writes
MAX_PIN_S = 86400.0


class Malformed(ValueError):
    """A Submit that no scheduler should be given; says what is wrong."""


def request(submit: Submit, client: bytes, vocab_size: int, arrived_at: float) -> Request:
    """Raises Malformed."""
    sampling = submit.sampling
    prompt, output = _ids("prompt", submit.prompt, vocab_size), _ids("output", submit.output, vocab_size)
    if not prompt:
        raise Malformed("the prompt is empty")
    if sampling.max_tokens is None or sampling.seed is None or not 1 <= sampling.n <= max(1, sampling.beam_width):
        raise Malformed("the sampling parameters are not resolved")
    if sampling.best_of > 1:
        raise Malformed("the sequences that one is chosen of are submitted one by one")
    if sampling.beam_width and (output or sampling.num_candidates > vocab_size):
        raise Malformed("a beam search has no output before its end, and fewer candidates than there are tokens")
    if beyond := [id for id in (*sampling.logit_bias, *sampling.stop_token_ids) if id >= vocab_size]:
        raise Malformed(f"a sampling parameter names token id {beyond[0]}, the vocabulary ends at {vocab_size - 1}")
    return Request(
        id=submit.id,
        tokens=prompt + output,
        num_prompt=len(prompt),
        sampling=sampling,
        priority=submit.priority,
        salt=submit.salt,
        client=client,
        arrived_at=arrived_at,
        tenant=submit.tenant,
        quota=submit.quota,
        strikes=min(max(0, submit.attempts), FAIL_AT),
        pin_s=min(max(0.0, submit.pin_s), MAX_PIN_S),  # in this order NaN is 0
        pin_tokens=submit.pin_tokens if 0 < submit.pin_tokens < len(prompt) else len(prompt),
    )


def arrived_at(submit: Submit, now: float) -> float:
    """When the client's request came. Who claims more than a day has a broken clock."""
    return now - min(max(0.0, submit.waited_s), MAX_TIMEOUT_S)  # in this order NaN is 0


def ends_at(submit: Submit, arrived_at: float) -> float:
    """When its time is over; infinity when there is no limit, or none that makes sense."""
    return arrived_at + submit.timeout_s if submit.timeout_s > 0.0 else inf


def begins_by(submit: Submit, arrived_at: float) -> float:
    """When it is to have had its first place in a step. Who brings output has had one."""
    return arrived_at + submit.max_queue_s if submit.max_queue_s > 0.0 and not submit.output else inf


def _ids(name: str, column: bytes, vocab_size: int) -> "array[int]":
    ids = array(TYPE)
    if len(column) % ids.itemsize:
        raise Malformed(f"the {name} is not a column of int32")
    ids.frombytes(column)
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise Malformed(f"the {name} holds token ids outside the vocabulary of {vocab_size}")
    return ids
