"""Text to token ids and back, off the event loop. Loads without torch."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..common.errors import ConfigError, RequestError
from ..common.model_info import ENDLESS
from .chat_template import ChatOptions, ChatTemplate
from .encoding import decode, encode
from .messages import Message, plain_messages

if TYPE_CHECKING:
    import tokenizers


log = logging.getLogger(__name__)

T = TypeVar("T")
SLICE_CHARACTERS = 256 << 10  # that are tokenized at once to see whether a long text can fit
SHORT_CHARACTERS = 1000  # tokenized at once, in a seventh of a millisecond: too little to hand to a thread
THREADS = 2  # rendering and marking are Python, and compete with the event loop; the rest lets go of its lock


class Tokenizer:
    """A model's tokenizer and chat template. `await` its methods on any event loop.

    The `tokenizers` object is used as it is, never through transformers' wrapper: that one changes settings during a
    call, which is not safe with threads.
    """

    def __init__(
        self, backend: "tokenizers.Tokenizer", template: ChatTemplate | None = None, *, max_model_len: int = ENDLESS
    ) -> None:
        self.backend = backend  # not to be modified
        self._max_model_len = max_model_len
        self._max_characters = max_model_len * max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._template = template
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenizer")

    @classmethod
    def load(cls, path: Path, *, chat_template: Path | None = None, max_model_len: int = ENDLESS) -> "Tokenizer":
        """The tokenizer in the directory `path`, for texts that fit `max_model_len` tokens. Takes half a second the
        first time, for the imports.

        Raises ConfigError when it is not there or cannot be read.
        """
        if not (path / "tokenizer.json").is_file():
            raise ConfigError(
                f"{path}: there is no tokenizer.json. Name a directory that has one with --tokenizer, or convert the model's own: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes it"
            )
        # Here and not above: these imports take half a second, and HTTP must answer before.
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

        logging.getLogger("transformers").setLevel(
            logging.ERROR
        )  # it warns that the class is not the checkpoint's own; this is meant
        try:
            loaded = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
            template = (
                chat_template.read_text(encoding="utf-8") if chat_template else _default_template(loaded.chat_template)
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: the tokenizer cannot be loaded: {error}") from error
        backend = loaded.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        chat = ChatTemplate(template, backend, loaded.special_tokens_map) if template else None
        if chat and (problem := chat.problem()):
            log.warning("%s: chat will not work: %s", path, problem)
        return cls(backend, chat, max_model_len=max_model_len)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens spelled in it are special tokens, as with Hugging Face.

        Raises RequestError for a text so long that it cannot fit the context.
        """
        self._check_length(len(text), "prompt")

        def encoded() -> list[int]:
            self._check_fits(text, "prompt")
            return encode(self.backend, [text], add_special_tokens=add_special_tokens)[0]

        return encoded() if len(text) <= SHORT_CHARACTERS else await self._off_loop(encoded)

    async def encode_chat(self, messages: Sequence[Message], options: ChatOptions | None = None) -> list[int]:
        """The ids of a conversation. Raises RequestError for messages that are none or cannot fit the context, and when
        there is no template or it refuses."""
        template, options = self._template, options or ChatOptions()
        if template is None:
            raise RequestError(
                "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE",
                param="messages",
            )

        def rendered_and_encoded() -> list[int]:
            plain = plain_messages(messages)
            self._check_length(sum(len(message["content"]) for message in plain), "messages")
            rendered = template.render(plain, options)
            self._check_length(len(rendered), "messages")
            self._check_fits(rendered, "messages")
            return template.encode(rendered, options)

        return await self._off_loop(rendered_and_encoded)

    async def shared_with_chat(self, ids: Sequence[int], messages: Sequence[Message], options: ChatOptions) -> int:
        """How many of `ids`, a conversation's, the beginning of that conversation has as well. Raises as `encode_chat`."""
        head = await self.encode_chat(messages, options)
        return await self._off_loop(lambda: _num_shared(ids, head))

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return await self._off_loop(lambda: decode(self.backend, ids, skip_special_tokens=skip_special_tokens))

    async def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The tokenizer's own spelling of each id."""
        return await self._off_loop(lambda: [self.backend.id_to_token(i) or "" for i in ids])

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check_length(self, num_characters: int, param: str) -> None:
        """No token stands for more characters than the longest, so some texts need no tokenizing to be refused."""
        if num_characters > self._max_characters:
            raise RequestError(
                f"this model's maximum context length is {self._max_model_len} tokens, which hold {self._max_characters} "
                f"characters at most; {param}: {num_characters} characters",
                param=param,
                code="context_length_exceeded",
            )

    def _check_fits(self, text: str, param: str) -> None:
        """Refuse a long text slice by slice: an encoding takes 300 bytes a token, and taking it apart stops every thread.

        Only the borders of slices may have other tokens than the whole text; a tenth is left for them.
        """
        if len(text) <= 2 * self._max_model_len:  # not too many tokens in any case
            return
        num_tokens = 0
        for start in range(0, len(text), SLICE_CHARACTERS):
            piece = text[start : start + SLICE_CHARACTERS]
            num_tokens += len(encode(self.backend, [piece], add_special_tokens=False)[0])
            if num_tokens > 1.1 * self._max_model_len:
                raise RequestError(
                    f"this model's maximum context length is {self._max_model_len} tokens, and the prompt has more than {num_tokens * 10 // 11}",
                    param=param,
                    code="context_length_exceeded",
                )

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _num_shared(ids: Sequence[int], others: Sequence[int]) -> int:
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _default_template(template: "str | dict[str, str] | None") -> str | None:
    """A checkpoint may bring several named templates; the one named "default" is for chat."""
    return template.get("default") if isinstance(template, dict) else template
