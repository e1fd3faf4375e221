"""Text as it streams is the text of the whole, cut into steps at will: nothing broken, no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from serverkit.tiny import make_tokenizer
from specserve.engine.client.byte_level import ByteLevelDecoder
from specserve.engine.client.detokenizer import Detokenizer, IncrementalDecoder, StopStrings
from specserve.engine.client.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer(make_tokenizer())


def _sentencepiece() -> Tokenizer:
    """Llama 2's kind of decoder: ▁ for spaces, the first one stripped, bytes as <0x..>."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "the", "▁fox", "x", "é"]
    raw = RawTokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    )


SENTENCEPIECE = _sentencepiece()


def cut(tokens: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """`tokens` in chunks of these sizes, over and over."""
    chunks, start, turn = [], 0, 0
    while start < len(tokens):
        size = sizes[turn % len(sizes)]
        chunks.append(list(tokens[start : start + size]))
        start += size
        turn += 1
    return chunks


def stream(detokenizer: Detokenizer, chunks: Sequence[Sequence[int]]) -> list[str]:
    """What each chunk sends, up to the stop."""
    sent = []
    for number, chunk in enumerate(chunks, 1):
        piece = detokenizer.push(chunk, last=number == len(chunks))
        sent.append(piece.text)
        if piece.stop is not None:
            break
    return sent


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@given(text=st.text(max_size=60), sizes=sizes)
def test_text_survives_any_cutting(text: str, sizes: list[int]) -> None:
    chunks = cut(BYTE_LEVEL.encode(text, add_special_tokens=False), sizes)
    sent = stream(Detokenizer(BYTE_LEVEL), chunks)
    assert "".join(sent) == text
    assert not any("\ufffd" in piece for piece in sent) or "\ufffd" in text


@given(tokens=st.lists(st.integers(0, 299), max_size=40), sizes=sizes)
def test_any_tokens_read_as_decoded_whole(tokens: list[int], sizes: list[int]) -> None:
    """Also where they are no UTF-8: the same replacement characters as the tokenizer writes for the whole."""
    sent = stream(Detokenizer(BYTE_LEVEL), cut(tokens, sizes))
    assert "".join(sent) == BYTE_LEVEL.decode(tokens)


def _with_added_tokens() -> Tokenizer:
    """Byte-level, with added tokens that are no special ones: their names are text, spaces and all."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool call>", "日本", "Ġhalf"])
    return Tokenizer(tokenizer)


ADDED = _with_added_tokens()


@given(
    tokens=st.lists(st.integers(0, 310), max_size=40), context=st.lists(st.integers(0, 310), max_size=9), sizes=sizes
)
def test_bytes_read_as_any_tokenizers_tokens(tokens: list[int], context: list[int], sizes: list[int]) -> None:
    """The decoder of byte-level tokens says what the one for any tokenizer says, special and unknown ids included."""
    assert ADDED.pieces is not None
    plain = IncrementalDecoder(ADDED, context=context)
    quick = ByteLevelDecoder(ADDED.pieces, context)
    said = "".join(quick.extend(chunk) for chunk in cut(tokens, sizes)) + quick.flush()
    assert said == plain.extend(tokens) + plain.flush()


@given(tokens=st.lists(st.integers(0, 299), max_size=40), sizes=sizes)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
def test_steps_read_as_their_tokens(tokenizer: Tokenizer, tokens: list[int], sizes: list[int]) -> None:
    """Without offsets a step is decoded in one go: each sends what it would have sent token by token."""
    if tokenizer is SENTENCEPIECE:
        tokens = [token % 265 for token in tokens]
    chunks = cut(tokens, sizes)
    whole, each = Detokenizer(tokenizer, offsets=False), Detokenizer(tokenizer)
    assert stream(whole, chunks) == stream(each, chunks)
    assert whole.num_characters == each.num_characters


def test_only_tokens_that_are_bytes_have_pieces() -> None:
    assert SENTENCEPIECE.pieces is None
    assert BYTE_LEVEL.pieces is not None
    assert BYTE_LEVEL.pieces[BYTE_LEVEL.encode("日", add_special_tokens=False)[0]][0] == "日".encode()[0]
    assert (BYTE_LEVEL.pieces[0], BYTE_LEVEL.pieces[10**6]) == (b"", b"")


@given(words=st.lists(st.sampled_from(["▁the", "▁", "the", "▁fox", "x", "é"]), min_size=1, max_size=12), sizes=sizes)
def test_spaces_of_sentencepiece(words: list[str], sizes: list[int]) -> None:
    vocab = {piece: SENTENCEPIECE._tokenizer.convert_tokens_to_ids(piece) for piece in words}
    tokens = [vocab[word] for word in words]
    assert "".join(stream(Detokenizer(SENTENCEPIECE), cut(tokens, sizes))) == SENTENCEPIECE.decode(tokens)


@given(text=st.text(alphabet="aé日🙂", min_size=1, max_size=12), sizes=sizes)
def test_byte_tokens_of_sentencepiece(text: str, sizes: list[int]) -> None:
    tokens = [3 + byte for byte in text.encode()]
    sent = stream(Detokenizer(SENTENCEPIECE), cut(tokens, sizes))
    assert "".join(sent) == text
    assert not any("\ufffd" in piece for piece in sent)


def test_leading_space_after_the_prompt_is_kept() -> None:
    the = SENTENCEPIECE._tokenizer.convert_tokens_to_ids("▁the")
    assert Detokenizer(SENTENCEPIECE).push([the]).text == "the"
    assert Detokenizer(SENTENCEPIECE, context=[the]).push([the]).text == " the"


def test_what_is_no_character_does_not_stall_the_stream() -> None:
    """Nothing but continuation bytes never becomes a character; it is sent all the same, a few tokens late."""
    decoder = IncrementalDecoder(BYTE_LEVEL)
    stray = BYTE_LEVEL.encode("日", add_special_tokens=False)[-1:]
    assert BYTE_LEVEL.token_bytes(stray[0])[0] & 0xC0 == 0x80
    sent = [decoder.push(stray[0]) for _ in range(50)]
    assert any(sent[:10])
    assert "".join(sent) + decoder.flush() == BYTE_LEVEL.decode(stray * 50)


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Oracle, a character at a time: the text before the first complete stop string, the longest if several are."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


near_stops = st.text(alphabet="abc\n", max_size=40)
stop_lists = st.lists(st.text(alphabet="abc\n", min_size=1, max_size=4), min_size=1, max_size=3)


@given(text=near_stops, stops=stop_lists, sizes=sizes)
def test_stop_strings_never_leak(text: str, stops: list[str], sizes: list[int]) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, stops)
    want, stop = first_stop(text, stops)
    chunks = cut(BYTE_LEVEL.encode(text, add_special_tokens=False), sizes)
    sent = stream(detokenizer, chunks)
    assert "".join(sent) == want
    assert detokenizer.stop == stop


@given(text=near_stops, stops=stop_lists, sizes=sizes)
def test_stop_string_included_on_request(text: str, stops: list[str], sizes: list[int]) -> None:
    before, stop = first_stop(text, stops)
    chunks = cut(BYTE_LEVEL.encode(text, add_special_tokens=False), sizes)
    sent = stream(Detokenizer(BYTE_LEVEL, stops, include_stop=True), chunks)
    assert "".join(sent) == before + (stop or "")


@given(text=near_stops, stops=stop_lists, sizes=sizes)
def test_nothing_is_held_back_longer_than_needed(text: str, stops: list[str], sizes: list[int]) -> None:
    """After each step exactly the longest ending that begins a stop string is missing."""
    detokenizer = Detokenizer(BYTE_LEVEL, stops)
    seen: list[int] = []
    sent = ""
    for chunk in cut(BYTE_LEVEL.encode(text, add_special_tokens=False), sizes):
        piece = detokenizer.push(chunk)
        if piece.stop is not None:
            return
        seen += chunk
        sent += piece.text
        so_far = BYTE_LEVEL.decode(seen)
        beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
        held = max(
            (length for length in range(len(so_far) + 1) if so_far[len(so_far) - length :] in beginnings), default=0
        )
        assert sent == so_far[: len(so_far) - held]


def test_tokens_after_a_stop_do_not_count() -> None:
    tokens = BYTE_LEVEL.encode("ab!cd", add_special_tokens=False)
    piece = Detokenizer(BYTE_LEVEL, ["!"]).push(tokens)
    assert (piece.text, piece.num_tokens, piece.stop) == ("ab", 3, "!")
    assert piece.offsets == [0, 1, 2]


def test_stop_before_min_tokens_is_text() -> None:
    tokens = BYTE_LEVEL.encode("a!b!c", add_special_tokens=False)
    piece = Detokenizer(BYTE_LEVEL, ["!"], min_tokens=2).push(tokens)
    assert (piece.text, piece.num_tokens) == ("a!b", 4)


@pytest.mark.parametrize(("text", "held"), [("xab", 2), ("xa", 1), ("x", 0), ("xabc", 3), ("xab!", 0), ("xaba", 1)])
def test_held(text: str, held: int) -> None:
    assert StopStrings(["abcd", "ab!"]).held(text) == held


@given(text=st.text(alphabet="ab🙂é ", max_size=30), sizes=sizes)
def test_offsets_point_into_the_text(text: str, sizes: list[int]) -> None:
    tokens = BYTE_LEVEL.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(BYTE_LEVEL)
    offsets = [offset for chunk in cut(tokens, sizes) for offset in detokenizer.push(chunk).offsets]
    want = [len(BYTE_LEVEL.decode(tokens[:end]).rstrip("\ufffd")) for end in range(len(tokens))]
    assert offsets == want


@given(tokens=st.lists(st.integers(0, 299), max_size=30), at=st.integers(0, 30), stops=stop_lists)
def test_resuming_sends_the_rest(tokens: list[int], at: int, stops: list[str]) -> None:
    """Tokens fed as resumed output count as sent up to what is held back: the two halves make the whole."""
    whole = Detokenizer(BYTE_LEVEL, stops)
    first = whole.push(tokens[:at])
    if first.stop is not None:
        return
    rest = whole.push(tokens[at:], last=True)
    resumed = Detokenizer(BYTE_LEVEL, stops)
    resumed.push(tokens[:at])
    assert resumed.push(tokens[at:], last=True).text == rest.text
