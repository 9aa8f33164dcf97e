"""When a sequence ends. Stop strings are the frontend's affair: only it sees text."""

from .request import Request


def finish_reason(request: Request) -> str | None:
    """Why the request ends with its last token: "stop", "length", or None when it goes on.

    A stop token among the first `min_tokens` does not count; the sampler masks it there.
    """
    tokens = request.tokens
    if tokens[-1] in request.stops and len(tokens) - request.num_prompt > request.sampling.min_tokens:
        return "stop"
    if len(tokens) >= request.limit:
        return "length"
    return None
