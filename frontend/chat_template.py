"""Messages to token ids, through the model's chat template.

What a user writes must not act as control tokens: "<|im_start|>system" in a message is text. So control tokens in the
messages are marked before the template is rendered, and marked ones are encoded as plain text; those that the template
writes itself are encoded as what they are. Messages without any are encoded in one piece, exactly as
`apply_chat_template` does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from msgspec import Struct
from tokenizers import Tokenizer

from ..common.errors import RequestError
from .encoding import encode
from .messages import Message

START, END = "\ue0f0", "\ue0f1"  # private use; removed from what users write
RESERVED = frozenset(  # arguments of the renderer itself
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    ]
)


class ChatOptions(Struct, frozen=True, kw_only=True):
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False  # templates write the beginning of a sequence themselves
    template_kwargs: dict[str, Any] = {}


class ChatTemplate:
    """One template with the tokenizer it belongs to. Thread-safe."""

    def __init__(self, template: str, tokenizer: Tokenizer, special_tokens: Mapping[str, Any]) -> None:
        """`special_tokens` are the names that templates know: bos_token, eos_token, ..."""
        # Not above: the import takes half a second, and the HTTP routes need the types of this file at once.
        from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415

        self._render: Callable[..., Any] = render_jinja_template
        self._template = template
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        added = tokenizer.get_added_tokens_decoder()
        # A model's own turns may hold tokens such as <think>, which clients send back; nobody else's may.
        special = {token.content for token in added.values() if token.special}
        written = {
            token.content for token in added.values() if token.content in template and not token.content.isspace()
        }
        self._of_model = _pattern(special)
        self._of_others = _pattern(special | written)
        self._control_ids = {i for i, token in added.items() if token.content in special | written}

    def encode(self, rendered: str, options: ChatOptions) -> list[int]:
        """The ids of what `render` made. Raises RequestError for control tokens that no text can stand for."""
        if START not in rendered and END not in rendered:
            return self._encode([rendered], add_special_tokens=options.add_special_tokens)[0]
        return self._encode_marked(rendered, add_special_tokens=options.add_special_tokens)

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """The text of a conversation (`plain_messages`), control tokens of its messages between marks.

        Raises RequestError for what the template refuses.
        """
        self._check_kwargs(options.template_kwargs)
        marked = [self._marked_message(message) for message in messages]
        try:
            rendered: str = self._render(
                conversations=[marked],
                chat_template=self._template,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                **self._special_tokens,
                **_mark(options.template_kwargs, self._of_others),
            )[0][0]
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            reason = str(error).replace(START, "").replace(END, "").split("Final message to continue:")[0]
            raise RequestError(f"the chat template refuses these messages: {reason}", param="messages") from None
        return rendered

    def problem(self) -> str:
        """Why not even a plain message can be rendered; "" when it can."""
        try:
            self.render([{"role": "user", "content": "Hello"}], ChatOptions())
        except RequestError as error:
            return error.message
        return ""

    def _check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        if taken := sorted((RESERVED | self._special_tokens.keys()) & kwargs.keys()):
            raise RequestError(f"chat_template_kwargs may not set {', '.join(taken)}", param="chat_template_kwargs")

    def _marked_message(self, message: Message) -> dict[str, Any]:
        role = "system" if message["role"] == "developer" and "developer" not in self._template else message["role"]
        pattern = self._of_model if role == "assistant" else self._of_others
        marked: dict[str, Any] = _mark(message, pattern)
        return {**marked, "role": role}

    def _encode_marked(self, rendered: str, *, add_special_tokens: bool) -> list[int]:
        """Encode piece by piece: marked ones as text, the others as usual.

        A template may tear marks apart (split, trim); a mark alone is dropped and still separates what is around it.
        """
        head, *pieces = re.split(f"{START}({self._of_others.pattern}){END}|[{START}{END}]", rendered)
        ids = self._encode([head], add_special_tokens=add_special_tokens)[0]
        spelled = {token: self._encode_as_text(token) for token in set(pieces[::2]) if token}
        plain = iter(self._encode_inner([piece for piece in pieces[1::2] if piece]))
        for i, piece in enumerate(pieces):
            if piece:
                ids += next(plain) if i % 2 else spelled[piece]
        return ids

    def _encode_as_text(self, token: str) -> list[int]:
        """The ids of a control token's characters: cut in two, so that the tokenizer does not see it."""
        first, rest = self._encode_inner([token[:1], token[1:]])
        ids = first + rest
        if len(token) < 2 or not ids or self._control_ids.intersection(ids):
            raise RequestError(
                f"the messages contain {token!r}, which this model's tokenizer knows only as a control token",
                param="messages",
            )
        return ids

    def _encode_inner(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text in the middle of a text: without the space that some tokenizers put before the first word."""
        newline, *found = self._encode(["\n", *("\n" + text for text in texts)], add_special_tokens=False)
        return [
            ids[len(newline) :] if ids[: len(newline)] == newline else self._encode([text], add_special_tokens=False)[0]
            for text, ids in zip(texts, found, strict=True)
        ]

    def _encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        return encode(self._tokenizer, texts, add_special_tokens=add_special_tokens)


def _pattern(tokens: set[str]) -> re.Pattern[str]:
    """Matches any of `tokens`, the longest first; nothing when there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _mark(value: Any, pattern: re.Pattern[str]) -> Any:
    """`value` with the control tokens in its strings between marks, at any depth."""
    if isinstance(value, str):
        return pattern.sub(f"{START}\\g<0>{END}", value.replace(START, "").replace(END, ""))
    if isinstance(value, Mapping):
        return {key: _mark(item, pattern) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark(item, pattern) for item in value]
    return value
