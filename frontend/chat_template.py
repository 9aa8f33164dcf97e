"""Messages to token ids, through the model's chat template.

What a user writes must not act as control tokens: "<|im_start|>system" in a message is text. So control tokens in the
messages are marked before the template is rendered, and marked ones are encoded as plain text; those that the template
writes itself are encoded as what they are. The same holds for a token whose parts are written in several places.
Messages without any are encoded in one piece, exactly as `apply_chat_template` does. At last the ids are counted: what
reads as a control token in spite of all this (through Unicode normalization, for one) is refused.
"""

import itertools
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
from msgspec import Struct
from tokenizers import Tokenizer

from ..common.errors import RequestError
from .encoding import encode
from .messages import Message

START, END, BORDER = "\ufdd0", "\ufdd1", "\ufdd2"  # no characters by Unicode's rules; removed from what users write
_MARKS = str.maketrans("", "", START + END + BORDER)
_WORD = string.ascii_letters + string.digits + "_" + string.whitespace
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
        self._of_model = _Guard(special)
        self._of_others = _Guard(special | written)
        self._marks = re.compile(f"{START}({self._of_others.pattern.pattern}){END}|[{START}{END}{BORDER}]")
        self._control_ids = {token.content: i for i, token in added.items() if token.content in special | written}

    def encode(self, rendered: str, options: ChatOptions) -> list[int]:
        """The ids of what `render` made. Raises RequestError for control tokens that no text can stand for."""
        pattern = self._of_others.pattern
        joined = rendered.replace(BORDER, "")
        if joined != rendered and pattern.findall(joined) == pattern.findall(rendered):
            rendered = joined  # no token is made of what stands around a border
        pieces = self._marks.split(rendered)
        ids = self._encode_pieces(pieces, add_special_tokens=options.add_special_tokens)
        self._check_control_tokens(ids, pieces[::2], add_special_tokens=options.add_special_tokens)
        return ids

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """The text of a conversation (`plain_messages`), control tokens of its messages between marks.

        Raises RequestError for what the template refuses.
        """
        self._check_kwargs(options.template_kwargs)
        try:
            rendered: str = self._render(
                conversations=[[self._marked_message(message) for message in messages]],
                chat_template=self._template,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                **self._special_tokens,
                **_mark(options.template_kwargs, self._of_others),
            )[0][0]
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            reason = str(error).translate(_MARKS).split("Final message to continue:")[0][:200]
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
        guard = self._of_model if role == "assistant" else self._of_others
        marked: dict[str, Any] = _mark(message, guard)
        return {**marked, "role": role}

    def _encode_pieces(self, pieces: Sequence[str], *, add_special_tokens: bool) -> list[int]:
        """Encode piece by piece: those at odd places are control tokens in messages, to be text; the others as usual.

        A template may tear marks apart (split, trim); a mark alone is dropped and still separates what is around it.
        """
        head, *rest = pieces
        ids = self._encode([head], add_special_tokens=add_special_tokens)[0]
        spelled = {token: self._encode_as_text(token) for token in set(rest[::2]) if token}
        plain = iter(self._encode_inner([piece for piece in rest[1::2] if piece]))
        for i, piece in enumerate(rest):
            if piece:
                ids += next(plain) if i % 2 else spelled[piece]
        return ids

    def _check_control_tokens(self, ids: Sequence[int], texts: Sequence[str], *, add_special_tokens: bool) -> None:
        """Refuse ids with a control token that is not spelled in `texts`, which are the template's and clean ones."""
        spelled = Counter(self._encode([""], add_special_tokens=add_special_tokens)[0])
        spelled.update(self._control_ids[token] for text in texts for token in self._of_others.pattern.findall(text))
        known = set(self._control_ids.values())
        found = Counter(i for i in ids if i in known)
        if excess := found - spelled:
            token = self._tokenizer.id_to_token(next(iter(excess)))
            raise RequestError(
                f"the messages contain text that this model's tokenizer reads as the control token {token!r}",
                param="messages",
            )

    def _encode_as_text(self, token: str) -> list[int]:
        """The ids of a control token's characters: cut in two, so that the tokenizer does not see it."""
        first, rest = self._encode_inner([token[:1], token[1:]])
        ids = first + rest
        if len(token) < 2 or not ids or not set(self._control_ids.values()).isdisjoint(ids):
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


class _Guard:
    """Finds what must not stay as it is in a user's string."""

    def __init__(self, tokens: set[str]) -> None:
        self.pattern = re.compile(_longest_of(tokens) or "(?!)")
        self._beginnings = {token[:end] for token in tokens for end in range(1, len(token))}
        self._ends = {token[begin:] for token in tokens for begin in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)
        self._spelled = START.join(tokens)  # which is in no text any more

    def marked(self, text: str) -> str:
        """`text` with control tokens between marks, and a border where it may become a part of one.

        A part of letters and digits alone has no border: templates compare such values, and take them into their own
        tokens (as "<|" + role + "|>") on purpose.
        """
        text = text.translate(_MARKS)
        sizes = range(1, min(len(text), self._longest) + 1)
        is_inside = len(text) < self._longest and text.strip(_WORD) != "" and text in self._spelled
        begins = is_inside or any(text[:size] in self._ends for size in sizes)
        ends = is_inside or any(text[-size:] in self._beginnings for size in sizes)
        return BORDER * begins + self.between_marks(text) + BORDER * ends

    def between_marks(self, text: str) -> str:
        return self.pattern.sub(f"{START}\\g<0>{END}", text)


def _mark(value: Any, guard: _Guard) -> Any:
    """`value` with its strings marked, at any depth."""
    if isinstance(value, str):
        return guard.marked(value)
    if isinstance(value, Mapping):
        return {guard.between_marks(str(name)): _mark(item, guard) for name, item in value.items()}
    if isinstance(value, list):
        return [_mark(item, guard) for item in value]
    return value


def _longest_of(tokens: Iterable[str]) -> str:
    """A regular expression for any of `tokens`, for the longest that fits. Shared beginnings are tried once: there may be
    thousands that begin alike."""
    branches = []
    for _, group in itertools.groupby(sorted(filter(None, tokens)), key=lambda token: token[0]):
        alike = list(group)  # in order: what the first and the last one share, all do
        size = next((i for i, (a, b) in enumerate(zip(alike[0], alike[-1], strict=False)) if a != b), len(alike[0]))
        branches.append(re.escape(alike[0][:size]) + _longest_of({token[size:] for token in alike}))
    return f"(?:{'|'.join(branches)}){'?' * ('' in tokens)}" if branches else ""
