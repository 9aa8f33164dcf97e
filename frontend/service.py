"""What the routes stand on: the engine's client, the tokenizer once it is loaded, and whether requests may come."""

import time
from http import HTTPStatus

from ..common.errors import RequestError
from .engine_client import EngineClient
from .generator import Generator
from .streams import RETRY_AFTER_S

_RETRY = {"Retry-After": str(RETRY_AFTER_S)}


class Service:
    """State of one frontend. `generator` is None until the tokenizer is loaded."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.generator: Generator | None = None
        self.draining = False
        self.started = int(time.time())

    @property
    def unavailable(self) -> RequestError | None:
        """Why requests cannot be served now; None when they can."""
        if self.client.ended:
            return RequestError(
                str(self.client.failure or "the engine was shut down"),
                status=HTTPStatus.SERVICE_UNAVAILABLE,
                code="engine_dead",
            )
        if self.draining:
            return RequestError(
                "the server is shutting down", status=HTTPStatus.SERVICE_UNAVAILABLE, code="draining", headers=_RETRY
            )
        if not self.client.ready or self.generator is None:
            phase, progress = self.progress
            message = f"the model is not ready yet: {phase}, {progress:.0%}"
            return RequestError(message, status=HTTPStatus.SERVICE_UNAVAILABLE, code="not_ready", headers=_RETRY)
        return None

    @property
    def progress(self) -> tuple[str, float]:
        """The phase of the start and how far it has come, 0 to 1."""
        if self.client.ready and self.generator is None:
            return "loading the tokenizer", 0.0
        return self.client.status.phase, self.client.status.progress

    def require(self) -> Generator:
        """The generator; raises RequestError when requests cannot be served."""
        if (error := self.unavailable) is not None:
            raise error
        assert self.generator is not None
        return self.generator

    @property
    def model_names(self) -> tuple[str, ...]:
        """What requests may call the model; the first is its name in answers."""
        return self.client.config.model.served_model_name or (self.client.config.model.model,)

    def check_model(self, name: str | None) -> str:
        """The name to answer under; raises RequestError for a model that is not here. No name means the one there is."""
        if not name:
            return self.model_names[0]
        if name not in self.model_names:
            known = ", ".join(self.model_names)
            raise RequestError(
                f"there is no model {name[:80]!r} here; there is {known}",
                status=HTTPStatus.NOT_FOUND,
                param="model",
                code="model_not_found",
            )
        return name
