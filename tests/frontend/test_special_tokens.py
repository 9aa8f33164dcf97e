"""What users write is text, however they spell a control token and wherever they cut it; clean text is transformers'."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from quire.common.errors import RequestError
from quire.frontend.chat_template import ChatOptions, _longest_of
from quire.frontend.tokenizer import Tokenizer

from ..checkpoints import write_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "trimmed": CHATML.replace("m.content", "m.content | trim"),
    "named": CHATML.replace("m.content", "(m.name or '') + m.content"),
    "role in the token": "{% for m in messages %}{{ '<|im_' + ('start' if m.role == 'user' else 'end') + '|>' }}{{ m.content }}{% endfor %}",
    "within signs": "{% for m in messages %}<{{ m.content }}>|im_end|{{ m.content }}|>{% endfor %}",
    "as JSON": "{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>{% endfor %}",
    "without thoughts": "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1].replace('<think>', '') }}<|im_end|>{% endfor %}",
}
SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
TOKENS = (*SPECIAL, "<think>", "</think>")
LOOK_ALIKES = (
    "＜|im_end|＞",
    "<｜im_end｜>",
    "<|im_end|\u200b>",
    "<|ⅰm_end|>",
    "<|IM_END|>",
    "<|im_end|\u0000>",
    "&lt;|im_end|&gt;",
)


def without_merges(path: Path) -> None:
    """The tokenizer of every tiny checkpoint."""
    write_tokenizer(path)


def byte_level(path: Path) -> None:
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["user assistant system\n", "im start end think <| |> <|im _end|> hello world "] * 20
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    save(tokenizer, path)


def metaspace(path: Path) -> None:
    """As sentencepiece makes them: a space before the first word, text normalized, bytes for what is unknown."""
    tokenizer = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(["user assistant system im start end hello world <| |> "] * 20, trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = []
    save(Backend.from_str(json.dumps(plain)), path, normalized=True)


def save(tokenizer: Backend, path: Path, *, normalized: bool = False) -> None:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=normalized) for token in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML})
    )


MAKERS: dict[str, Callable[[Path], None]] = {
    "without merges": without_merges,
    "byte level": byte_level,
    "metaspace": metaspace,
}


@pytest.fixture(scope="module", params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    MAKERS[request.param](path)
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    backend.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module", params=TEMPLATES)
def served(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, Tokenizer]]:
    template = folder / "own.jinja"
    template.write_text(TEMPLATES[request.param])
    tokenizer = Tokenizer.load(folder, chat_template=template)
    yield TEMPLATES[request.param], tokenizer
    tokenizer.close()


def encode(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    return asyncio.run(tokenizer.encode_chat(messages, ChatOptions(add_generation_prompt=False)))


parts = [token[:i] for token in TOKENS for i in range(1, len(token))] + [
    token[i:] for token in TOKENS for i in range(1, len(token))
]
hostile = st.lists(
    st.one_of(st.sampled_from(TOKENS), st.sampled_from(parts), st.sampled_from(LOOK_ALIKES), st.text(max_size=4)),
    max_size=5,
).map("".join)
roles = st.sampled_from(["user", "assistant", "system"])
messages_of_users = st.lists(
    st.fixed_dictionaries({"role": roles, "content": hostile}, optional={"name": hostile, "<|im_end|>": hostile}),
    min_size=1,
    max_size=3,
)
clean_text = st.text(alphabet=st.sampled_from("ab é你😀\n.<>|_im"), max_size=16)
clean_messages = st.lists(st.fixed_dictionaries({"role": roles, "content": clean_text}), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(messages=messages_of_users)
def test_only_the_template_writes_control_tokens(served: tuple[str, Tokenizer], messages: list[dict[str, str]]) -> None:
    template, tokenizer = served
    harmless = [{"role": m["role"], "content": "x"} for m in messages]
    thoughts = {tokenizer.backend.token_to_id(token) for token in ("<think>", "</think>") if token in template}
    is_thoughtful = any(m["role"] == "assistant" for m in messages)  # a model's own turn may hold them
    specials = tokenizer.special_ids | (set() if is_thoughtful else thoughts)
    try:
        ids = encode(tokenizer, messages)
    except RequestError as error:
        assert error.param == "messages" and "control token" in error.message
        return
    assert [i for i in ids if i in specials] == [i for i in encode(tokenizer, harmless) if i in specials]


@settings(max_examples=40, deadline=None)
@example(messages=[{"role": "user", "content": "\n<"}])
@given(messages=clean_messages)
def test_clean_text_is_encoded_as_transformers_does(
    served: tuple[str, Tokenizer], folder: Path, messages: list[dict[str, str]]
) -> None:
    template, tokenizer = served
    reference = PreTrainedTokenizerFast.from_pretrained(str(folder))
    rendered = reference.apply_chat_template(messages, chat_template=template, tokenize=False)
    written = reference.apply_chat_template(
        [{**m, "content": "x"} for m in messages], chat_template=template, tokenize=False
    )
    spelled = re.compile("|".join(map(re.escape, TOKENS)))
    assume(spelled.findall(rendered) == spelled.findall(written))  # no token made of the messages' parts
    expected = reference.apply_chat_template(messages, chat_template=template, return_dict=False)
    assert encode(tokenizer, messages) == expected


@settings(max_examples=300, deadline=None)
@given(tokens=st.sets(st.text("<|ab>", min_size=1, max_size=5), max_size=12), text=st.text("<|ab>", max_size=30))
def test_the_longest_token_is_found_first(tokens: set[str], text: str) -> None:
    naive = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
    assert re.findall(_longest_of(tokens) or "(?!)", text) == re.findall(naive, text)


def test_thousands_of_control_tokens_cost_no_more_than_a_few() -> None:
    tokens = {f"<unused{i}>" for i in range(6000)}
    pattern = re.compile(_longest_of(tokens))
    began = time.process_time()
    assert pattern.findall("<unused" * 20_000) == []
    assert time.process_time() - began < 0.5  # one after another takes minutes
