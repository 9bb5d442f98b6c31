"""Text of an answer while it is made, never half a character."""

from tokenizers.decoders import DecodeStream

from fp4lab.chat.tokenizer import Tokenizer


class TextStream:
    """`push(id)` returns the text that is certain by now; bytes of an unfinished character wait for the rest.

    `text` is all that was returned: the start of `Tokenizer.decode` of the same ids, without a broken end where an answer
    was cut.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._raw, self._stream = tokenizer.raw, DecodeStream(skip_special_tokens=False)
        self.text = ""

    def push(self, token: int) -> str:
        piece = self._stream.step(self._raw, token) or ""
        self.text += piece
        return piece
