"""uvicorn's HTTP/1.1 protocol with a bound on the head of a request: its parser has none, and headers may never end."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ..common.errors import RequestError
from . import errors
from .middleware import MAX_HEADER_BYTES


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes a connection whose request head outgrows the limit; answers what is not HTTP with our error body."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._head_bytes = 0  # since the packet that began it

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(RequestError(f"the headers are larger than {MAX_HEADER_BYTES} bytes", status=431))

    def send_400_response(self, msg: str) -> None:
        self._refuse(RequestError(msg))

    def _refuse(self, error: RequestError) -> None:
        content = errors.body(error)
        head = f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[error.status] + head.encode() + content)
        self.transport.close()
