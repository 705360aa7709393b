"""Text as it comes: whole characters, stop strings across token borders, pieces that add up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from families import EOS
from shoal.engine.text import TextStream

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=200)


def by_bytes(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of `text`, one per byte of UTF-8."""
    ids: list[int] = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    return ids


def feed(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop: tuple[str, ...]
) -> tuple[list[str], TextStream, int]:
    """Pieces of text, the stream, and how many tokens it took before it stopped."""
    stream = TextStream(tokenizer, stop, streaming=True)
    pieces = []
    for token in tokens:
        pieces.append(stream.push([token]))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream, len(pieces)


def stopped_slowly(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop: tuple[str, ...]) -> tuple[str, int]:
    """Decode everything again for every token; stop at the first one that completes a stop string."""
    for taken in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:taken]).rstrip("\ufffd")
        found = [text.find(one) for one in stop if one in text]
        if found:
            return text[: min(found)], taken
    text = tokenizer.decode(tokens)
    found = [text.find(one) for one in stop if one in text]
    return text[: min(found)] if found else text, len(tokens)


ALPHABET = "ab é鱼🐟"


@EXAMPLES
@given(
    text=st.text(ALPHABET, min_size=1, max_size=20),
    stop=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3).map(tuple),
    cut=st.integers(0, 3),
    noise=st.none() | st.tuples(st.integers(0, 20), st.integers(0, 255)),
)
def test_against_decoding_everything_again(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...], cut: int, noise: tuple[int, int] | None
) -> None:
    """Any text over a small alphabet, byte by byte, cut within a character, with a byte out of place, with any stop strings."""
    tokens = by_bytes(tokenizer, text)
    tokens = tokens[: max(1, len(tokens) - cut)]
    if noise is not None:
        tokens.insert(min(noise[0], len(tokens)), noise[1])
    pieces, stream, taken = feed(tokenizer, tokens, stop)
    expected, expected_taken = stopped_slowly(tokenizer, tokens, stop)
    assert stream.text == expected
    assert taken == expected_taken
    assert "".join(pieces) == stream.text
    together = TextStream(tokenizer, stop, streaming=False)
    for token in tokens[:taken]:
        together.push([token])
    together.finish()
    assert together.text == stream.text


@EXAMPLES
@given(tokens=st.lists(st.integers(0, 262), max_size=30))
def test_any_tokens_without_stop_strings(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> None:
    """Bytes that are no characters, the end token, tokens without text: pieces add up to the decoded whole."""
    pieces, stream, _ = feed(tokenizer, tokens, ())
    assert "".join(pieces) == stream.text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_nothing_is_held_back_for_longer_than_needed(tokenizer: PreTrainedTokenizerBase) -> None:
    """With "END" to stop at: "E" and "EN" wait, and come out as soon as they cannot become it."""
    pieces, stream, _ = feed(tokenizer, by_bytes(tokenizer, "aENdEEND!"), ("END",))
    assert pieces == ["a", "", "", "ENd", "", "E", "", "", ""]
    assert stream.text == "aENdE"
    assert stream.stopped


def test_characters_come_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces, _, _ = feed(tokenizer, by_bytes(tokenizer, "é🐟x"), ())
    assert pieces == ["", "é", "", "", "", "🐟", "x", ""]


def test_half_a_character_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """What will never be completed is shown as the tokenizer shows it."""
    pieces, stream, _ = feed(tokenizer, by_bytes(tokenizer, "a🐟")[:-1], ())
    assert pieces[0] == "a"
    assert stream.text == "a\ufffd" == "".join(pieces)


def test_a_stop_string_at_the_very_end(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces, stream, taken = feed(tokenizer, by_bytes(tokenizer, "ab。"), ("。",))
    assert (pieces, stream.text, stream.stopped, taken) == (["a", "b", "", "", "", ""], "ab", True, 5)


def test_a_stop_string_is_not_delayed_by_half_a_character(tokenizer: PreTrainedTokenizerBase) -> None:
    """Two tokens at once, as a draft brings them: the stop string counts, though the character after it is incomplete."""
    tokens = by_bytes(tokenizer, "ok\n🐟")[:-1]
    stream = TextStream(tokenizer, ("\n",), streaming=True)
    assert stream.push(tokens) == "ok"
    assert stream.stopped


def test_overlapping_stop_strings(tokenizer: PreTrainedTokenizerBase) -> None:
    """The one that is complete first ends the text, before where it begins; of two at one token, the one that begins first."""
    for stop, text, expected in [
        (("aab", "ab"), "xaaab", "xa"),
        (("abc", "b"), "xabc", "xa"),
        (("bc", "abc"), "xabc", "x"),
        (("aa",), "baaa", "b"),
        (("abab",), "abaabab", "aba"),
    ]:
        pieces, stream, _ = feed(tokenizer, by_bytes(tokenizer, text), stop)
        assert "".join(pieces) == stream.text == expected


def test_text_without_a_tokenizer_is_empty() -> None:
    stream = TextStream(None, (), streaming=True)
    assert stream.push([1, 2]) == stream.finish() == stream.text == ""


def test_special_tokens_have_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces, stream, _ = feed(tokenizer, [*by_bytes(tokenizer, "hi"), EOS], ())
    assert "".join(pieces) == stream.text == "hi"
