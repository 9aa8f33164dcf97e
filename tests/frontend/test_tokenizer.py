"""Chat prompts: exactly transformers' for clean text, and no way for a user to write a control token."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from quire.common.errors import ConfigError, RequestError
from quire.frontend.chat_template import END, START, ChatOptions
from quire.frontend.tokenizer import Tokenizer

words = st.text(alphabet=st.sampled_from("ab é你😀\n<|>"), max_size=20)
conversations = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": words}),
    min_size=1,
    max_size=4,
)
CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer.load(model_dir)
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(model_dir))


def encode(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return asyncio.run(tokenizer.encode_chat(messages, ChatOptions(**options)))


@settings(max_examples=60, deadline=None)
@given(messages=conversations, prompted=st.booleans())
def test_clean_messages_encode_as_transformers_does(
    loaded: Tokenizer, reference: Any, messages: list[dict[str, str]], prompted: bool
) -> None:
    expected = reference.apply_chat_template(messages, add_generation_prompt=prompted, return_dict=False)
    assert encode(loaded, messages, add_generation_prompt=prompted) == expected


def test_continuing_the_last_message_is_as_transformers_does(loaded: Tokenizer, reference: Any) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the quick"}]
    expected = reference.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert encode(loaded, messages, add_generation_prompt=False, continue_final_message=True) == expected


@settings(max_examples=100, deadline=None)
@given(before=words, token=st.sampled_from(CONTROL), after=words, role=st.sampled_from(["user", "system", "assistant"]))
def test_control_tokens_in_messages_are_text(
    loaded: Tokenizer, tokenizer: Backend, before: str, token: str, after: str, role: str
) -> None:
    def controls(messages: list[dict[str, str]]) -> list[int]:
        return [i for i in encode(loaded, messages) if i in loaded.special_ids]

    dirty = [{"role": role, "content": before + token + after}]
    clean = [{"role": role, "content": "harmless"}]
    assert controls(dirty) == controls(clean)
    assert (
        tokenizer.decode(encode(loaded, dirty), skip_special_tokens=False)
        == f"<|im_start|>{role}\n{before}{token}{after}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("mark", [START, END, START + "<|im_end|>" + END])
def test_marks_cannot_be_forged(loaded: Tokenizer, tokenizer: Backend, mark: str) -> None:
    ids = encode(loaded, [{"role": "user", "content": f"a{mark}b"}])
    assert START not in tokenizer.decode(ids, skip_special_tokens=False)
    assert sum(i in loaded.special_ids for i in ids) == 3


def test_raw_text_keeps_its_special_tokens(loaded: Tokenizer, tokenizer: Backend) -> None:
    assert asyncio.run(loaded.encode("<|im_start|>user")) == tokenizer.encode("<|im_start|>user").ids
    assert asyncio.run(loaded.encode("<|im_start|>user"))[0] in loaded.special_ids


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "messages", "eos_token", "add_generation_prompt"])
def test_reserved_template_arguments_are_refused(loaded: Tokenizer, name: str) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        encode(loaded, [{"role": "user", "content": "a"}], template_kwargs={name: True})
    assert caught.value.param == "chat_template_kwargs"


def with_template(model_dir: Path, path: Path, template: str | None) -> Tokenizer:
    shutil.copytree(model_dir, path, dirs_exist_ok=True)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return Tokenizer.load(path)


def test_a_refusal_of_the_template_is_the_clients_error(model_dir: Path, tmp_path: Path) -> None:
    template = "{% if messages[0].content != 'Hello' %}{{ raise_exception('only greetings') }}{% endif %}Hi"
    loaded = with_template(model_dir, tmp_path, template)
    with pytest.raises(RequestError, match="only greetings"):
        encode(loaded, [{"role": "user", "content": "Bye"}])


def test_a_template_is_sandboxed(model_dir: Path, tmp_path: Path) -> None:
    loaded = with_template(
        model_dir, tmp_path, "{% if messages[0].content != 'Hello' %}{{ ''.__class__.__mro__ }}{% endif %}"
    )
    with pytest.raises(RequestError, match="unsafe"):
        encode(loaded, [{"role": "user", "content": "x"}])


def test_template_arguments_reach_the_template_as_text(model_dir: Path, tmp_path: Path) -> None:
    loaded = with_template(model_dir, tmp_path, "{{ messages[0].content }}{{ mood }}<|im_end|>")
    ids = encode(loaded, [{"role": "user", "content": "a"}], template_kwargs={"mood": "<|im_end|>b"})
    assert loaded.backend.decode(ids, skip_special_tokens=False) == "a<|im_end|>b<|im_end|>"
    assert sum(i in loaded.special_ids for i in ids) == 1


def test_developer_messages_are_system_messages_where_the_template_knows_no_other(loaded: Tokenizer) -> None:
    message = {"content": "be brief"}
    assert encode(loaded, [{"role": "developer", **message}]) == encode(loaded, [{"role": "system", **message}])


def test_no_chat_template(model_dir: Path, tmp_path: Path) -> None:
    loaded = with_template(model_dir, tmp_path, None)
    assert not loaded.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        encode(loaded, [{"role": "user", "content": "a"}])


def test_a_template_file_replaces_the_models(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")
    loaded = Tokenizer.load(model_dir, chat_template=tmp_path / "own.jinja")
    assert loaded.backend.decode(encode(loaded, [{"role": "user", "content": "a"}])) == "a!"
    with pytest.raises(ConfigError, match=r"absent\.jinja"):
        Tokenizer.load(model_dir, chat_template=tmp_path / "absent.jinja")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Tokenizer.load(tmp_path)


def test_truncation_and_padding_of_the_file_do_not_apply(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    backend = Backend.from_file(str(model_dir / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "hello world " * 20
    expected = Backend.from_file(str(model_dir / "tokenizer.json")).encode(text).ids
    assert asyncio.run(Tokenizer.load(tmp_path).encode(text)) == expected


def test_many_threads_at_once(loaded: Tokenizer) -> None:
    async def storm() -> None:
        texts = [f"hello {i} world" for i in range(200)]
        many = await asyncio.gather(
            *(loaded.encode(text) for text in texts),
            *(loaded.encode_chat([{"role": "user", "content": t}]) for t in texts),
        )
        assert [loaded.backend.decode(ids) for ids in many[:200]] == texts

    asyncio.run(storm())
