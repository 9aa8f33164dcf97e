"""Incremental text: the same whole however it is cut, and nothing shown that would have to be taken back."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from quire.common.sampling import SamplingParams
from quire.frontend.detokenizer import MAX_HELD_TOKENS, Detokenizer, TextDecoder
from quire.frontend.stop_strings import StopStrings

SPECIAL = ["<|endoftext|>", "<|im_end|>"]


def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that every character of two bytes or more spans tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """Llama 2's shape: words with a leading space, and bytes for what is not in the vocabulary."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdehlorw", "▁h", "lo", "he"]
    tokenizer = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)},
            [("h", "e"), ("l", "o"), ("▁", "h")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES = byte_tokenizer()
PIECES = sentencepiece_tokenizer()
SPECIAL_IDS = frozenset(BYTES.token_to_id(text) for text in SPECIAL)
VOCABULARY = BYTES.get_vocab_size()

texts = st.text(alphabet=st.sampled_from("ab é你😀\n"), max_size=24)
ids_of_anything = st.lists(st.integers(0, VOCABULARY + 3), max_size=90)  # invalid UTF-8, special and unknown ids


def cut(draw_sizes: list[int], ids: list[int]) -> list[list[int]]:
    pieces, start = [], 0
    for size in draw_sizes:
        pieces.append(ids[start : start + size])
        start += size
    return [*pieces, ids[start:]]


def stream(
    pieces: list[list[int]], params: SamplingParams, prompt: Sequence[int] = (), finish: str = "length"
) -> tuple[str, list[int], str | None, object]:
    detokenizer = Detokenizer(BYTES, SPECIAL_IDS, prompt, params)
    text, ids = "", []
    for i, piece in enumerate(pieces):
        delta = detokenizer.push(piece, finish if i == len(pieces) - 1 else None)
        text, ids = text + delta.text, ids + delta.token_ids
        if delta.finish_reason:
            return text, ids, delta.finish_reason, delta.stop_reason
    raise AssertionError("it did not finish")


@settings(max_examples=300, deadline=None)
@given(ids_of_anything, st.lists(st.integers(1, 7), max_size=30), st.booleans())
def test_deltas_join_to_the_full_decode(ids: list[int], sizes: list[int], skip: bool) -> None:
    text, out, reason, _ = stream(cut(sizes, ids), SamplingParams(skip_special_tokens=skip))
    known = [i for i in ids if i < VOCABULARY]
    assert text == BYTES.decode(known, skip_special_tokens=skip)
    assert (out, reason) == (ids, "length")


@settings(max_examples=200, deadline=None)
@given(texts, st.data())
def test_text_of_a_prompt_is_not_repeated(text: str, data: st.DataObject) -> None:
    prompt = data.draw(ids_of_anything)
    ids = BYTES.encode(text).ids
    assert stream([ids], SamplingParams(), prompt)[0] == BYTES.decode(ids)


@settings(max_examples=300, deadline=None)
@given(
    texts,
    st.lists(st.text(alphabet="ab é你", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), max_size=20),
    st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_cut(text: str, stops: list[str], sizes: list[int], include: bool) -> None:
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    ids = BYTES.encode(text).ids
    whole, parts = stream([ids], params), stream(cut(sizes, ids), params)
    assert whole == parts
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    if not ends:
        assert whole[:1] == (text,) and whole[2:] == ("length", None)
        return
    end, start, stop = min(ends)
    assert whole[0] == text[: end if include else start]
    assert whole[2:] == ("stop", stop)
    assert len(whole[1]) == len(text[:end].encode())  # ids behind the stop string do not count


@settings(max_examples=300, deadline=None)
@given(texts, st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_what_was_shown_never_holds_the_beginning_of_a_stop_string(text: str, stops: list[str]) -> None:
    for length in range(len(text) + 1):
        finder = StopStrings(stops, include=False)
        shown, stop = finder.push(text[:length])
        if stop is None:
            withheld = finder.flush()
            assert shown + withheld == text[:length]
            assert withheld == "" or any(s.startswith(withheld) for s in stops)
            ends = [shown[-n:] + withheld for n in range(1, len(shown) + 1)]
            assert not any(s.startswith(end) for s in stops for end in ends)  # nothing longer could begin one


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(alphabet="ab", max_size=4), max_size=8),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_first_complete_stop_string_counts(pieces: list[str], stops: list[str]) -> None:
    finder, text, shown, found = StopStrings(stops, include=False), "".join(pieces), "", None
    for piece in pieces:
        new, found = finder.push(piece)
        shown += new
        if found is not None:
            break
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    assert found == (min(ends)[2] if ends else None)
    assert shown + ("" if found else finder.flush()) == (text[: min(ends)[1]] if ends else text)


def test_stop_token_ends_the_text_and_is_named() -> None:
    ids = [*BYTES.encode("ab").ids, *BYTES.encode("b").ids]
    assert stream([ids], SamplingParams(stop_token_ids=[ids[-1]]), finish="stop") == ("ab", ids, "stop", ids[-1])
    assert stream([ids], SamplingParams(), finish="stop") == ("ab", ids, "stop", None)  # the model's own is not named
    assert stream([ids], SamplingParams(include_stop_str_in_output=True), finish="stop")[0] == "abb"


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = BYTES.encode("ababab").ids
    assert stream([[i] for i in ids], SamplingParams(stop=["ab"], min_tokens=3))[0] == "abab"
    assert stream([ids], SamplingParams(stop=["ab"], min_tokens=3))[0] == "abab"
    assert stream([ids], SamplingParams(stop=["ab"]))[0] == ""


def test_endless_broken_bytes_are_let_go() -> None:
    broken = BYTES.token_to_id(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é")[0][0][1])
    decoder = TextDecoder(BYTES, (), [])
    shown = [decoder.push(broken) for _ in range(5 * MAX_HELD_TOKENS)]
    assert sum(map(len, shown)) >= 4 * MAX_HELD_TOKENS
    assert "".join(shown) + decoder.flush() == BYTES.decode([broken] * (5 * MAX_HELD_TOKENS))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, PIECES.get_vocab_size() - 1), max_size=40))
def test_any_ids_of_a_sentencepiece_vocabulary_decode(ids: list[int]) -> None:
    decoder = TextDecoder(PIECES, (), [])
    text = "".join(decoder.push(i) for i in ids) + decoder.flush()
    if "\ufffd" not in PIECES.decode(ids):
        assert text == PIECES.decode(ids)


def test_first_word_keeps_the_space_before_it() -> None:
    prompt, ids = PIECES.encode("hello").ids, PIECES.encode("hello").ids
    decoder = TextDecoder(PIECES, (), prompt)
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == " hello"


@pytest.mark.parametrize("text", ["hello 你好 😀", "the quick brown fox"])
def test_with_a_trained_vocabulary(model_dir: Path, tokenizer: Tokenizer, text: str) -> None:
    decoder = TextDecoder(tokenizer, (), [])
    ids = tokenizer.encode(text).ids
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == text
