"""Streamed text: never half a character, and the decoded text in the end."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fp4lab.chat.stream import TextStream
from fp4lab.chat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "models/tiny/tokenizer.json")


@given(st.text(max_size=30))
def test_text_arrives_whole_and_in_whole_characters(text):
    stream = TextStream(TOKENIZER)
    ids = TOKENIZER.encode(text)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == stream.text == TOKENIZER.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=12))
def test_any_bytes_are_the_start_of_the_decoded_text(ids):
    """Ids below 256 are single bytes: most sequences are not UTF-8."""
    stream = TextStream(TOKENIZER)
    for i in ids:
        stream.push(i)
    whole = TOKENIZER.decode(ids)
    assert whole.startswith(stream.text)
    assert set(whole[len(stream.text) :]) <= {"\ufffd"}, "only an unfinished character is held back"


def test_a_cut_within_a_character_leaves_it_out():
    ids = TOKENIZER.encode("ok 🛸")
    stream = TextStream(TOKENIZER)
    for i in ids[:-1]:
        stream.push(i)
    assert stream.text in ("ok ", "ok") and TOKENIZER.decode(ids[:-1]).endswith("\ufffd")
