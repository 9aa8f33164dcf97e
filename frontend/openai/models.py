"""GET /v1/models and /v1/models/{id}"""

from fastapi import APIRouter
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..service import Service
from .answers import json_answer

router = APIRouter()


class ModelCard(Struct):
    id: str
    created: int
    root: str  # the model itself, whatever it is served as
    max_model_len: int
    object: str = "model"
    owned_by: str = "quire"


class ModelList(Struct):
    data: list[ModelCard]
    object: str = "list"


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The names that requests may use."""
    service: Service = request.app.state.service
    service.require()
    return json_answer(ModelList([_card(service, name) for name in service.model_names]))


@router.get("/v1/models/{name:path}")
async def show_model(request: Request, name: str) -> Response:
    """One of them; a name may hold slashes."""
    service: Service = request.app.state.service
    service.require()
    if not name:
        raise HTTPException(404)
    return json_answer(_card(service, service.check_model(name)))


def _card(service: Service, name: str) -> ModelCard:
    model = service.client.model
    return ModelCard(id=name, created=service.started, root=model.model, max_model_len=model.max_model_len)
