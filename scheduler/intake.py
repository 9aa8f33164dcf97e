"""From the wire to a `Request`. The frontend validates for users; here nothing is believed, and nothing raises further on."""

from array import array

from ..common.messages import Submit
from .request import Request
from .suspects import FAIL_AT

TYPE = "i"  # int32, as `messages.pack` writes


class Malformed(ValueError):
    """A Submit that no scheduler should be given; says what is wrong."""


def request(submit: Submit, client: bytes, vocab_size: int, arrived_at: float) -> Request:
    """Raises Malformed."""
    sampling = submit.sampling
    prompt, output = _ids("prompt", submit.prompt, vocab_size), _ids("output", submit.output, vocab_size)
    if not prompt:
        raise Malformed("the prompt is empty")
    if sampling.max_tokens is None or sampling.seed is None or sampling.n != 1:
        raise Malformed("the sampling parameters are not resolved")
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
    )


def _ids(name: str, column: bytes, vocab_size: int) -> "array[int]":
    ids = array(TYPE)
    if len(column) % ids.itemsize:
        raise Malformed(f"the {name} is not a column of int32")
    ids.frombytes(column)
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise Malformed(f"the {name} holds token ids outside the vocabulary of {vocab_size}")
    return ids
