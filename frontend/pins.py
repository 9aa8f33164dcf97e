"""GET and DELETE /pins: which prefixes are pinned, for an operator. Never what they say."""

from fastapi import APIRouter
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from ..common.errors import RequestError
from ..common.pins import Pinned
from .openai.answers import json_answer
from .service import Service

router = APIRouter()

MAX_ID_DIGITS = 18
FIELDS = ("id", "tenant")
QUERY = {
    "parameters": [
        {"in": "query", "name": "id", "required": False, "schema": {"type": "integer", "minimum": 1}},
        {"in": "query", "name": "tenant", "required": False, "schema": {"type": "string"}},
    ]
}


class PinnedTokens(Struct):
    """One prefix. Those that begin alike have blocks in common."""

    id: int
    tenant: str
    tokens: int
    blocks: int
    expires_in: float  # seconds


class PinList(Struct):
    """`pins` are the first of `count`, the one that was used last first."""

    count: int
    blocks: int  # that are pinned
    max_blocks: int  # that may be
    pins: list[PinnedTokens]


@router.get("/pins", openapi_extra=QUERY)
async def listed(request: Request) -> Response:
    """What is pinned: all, or a tenant's, or one."""
    return await _answer(request, unpin=False)


@router.delete("/pins", openapi_extra=QUERY)
async def unpinned(request: Request) -> Response:
    """Let go of what is pinned: all, or a tenant's, or one. Answers with what it was."""
    return await _answer(request, unpin=True)


async def _answer(request: Request, *, unpin: bool) -> Response:
    service: Service = request.app.state.service
    service.require()
    query = request.query_params
    if unknown := [name for name in query if name not in FIELDS]:
        raise RequestError(f"there is no query parameter {unknown[0][:80]!r} here; there are id and tenant")
    id = query.get("id", "0")
    if "id" in query and not (id.isascii() and id.isdigit() and int(id[:MAX_ID_DIGITS]) and len(id) <= MAX_ID_DIGITS):
        raise RequestError(f"id must be that of a pin, a positive integer, got {id[:80]!r}", param="id")
    found: Pinned = await service.client.pins(unpin=unpin, tenant=query.get("tenant"), id=int(id))
    pins = [PinnedTokens(pin.id, pin.tenant, pin.num_tokens, pin.num_blocks, pin.left_s) for pin in found.pins]
    return json_answer(PinList(found.count, found.num_blocks, found.most_blocks, pins))
