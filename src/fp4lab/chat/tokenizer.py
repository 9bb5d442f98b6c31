"""Text to token ids and back, by the rules of the Qwen2 and Qwen3 tokenizers.

Byte-level BPE after NFC and Qwen's word pattern; no BOS. Source: `tokenizer.json` of Qwen/Qwen3-4B.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fp4lab.errors import UserError

# Qwen's word pattern: contractions, letters with one leading mark, single digits, marks, line ends, spaces.
WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Qwen3's added tokens in the order of their ids (there 151643 to 151668).
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip
_FIRST_PLAIN = SPECIAL_TOKENS.index("<tool_call>")  # from here on Qwen3 keeps them in decoded text
MAX_PIECE_BYTES = 16  # keeps whole Chinese phrases from becoming one piece of a small vocabulary


class Tokenizer:
    """A `tokenizer.json` with the chat tokens of Qwen.

    Attributes: `im_start`, `im_end`, `endoftext` (ids) and `raw`, the underlying `tokenizers.Tokenizer`.
    """

    def __init__(self, raw: tokenizers.Tokenizer, name: str = "tokenizer") -> None:
        self.raw = raw
        self.im_start, self.im_end, self.endoftext = (
            _special(raw, token, name) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
        )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`, or the one in a model directory.

        Raises UserError if it is missing, is not a tokenizer, or lacks a chat token.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected the tokenizer.json of a Qwen2 or Qwen3 model")
        try:
            raw = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer.json ({error}); copy it again from the model") from error
        raw.no_padding()
        raw.no_truncation()
        return cls(raw, str(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included. A model's embedding may have more rows."""
        return self.raw.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in it become their one id. Nothing is added."""
        return self.raw.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.raw.decode(list(ids), skip_special_tokens=skip_special)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE with Qwen's rules: 256 bytes (id 0 is "!"), merges, then `SPECIAL_TOKENS` at the end.

    `vocab_size` counts the special tokens. With too little text there are fewer merges; ids stay dense.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise UserError(f"vocab_size {vocab_size}: expected at least {least} (all bytes and the special tokens)")
    raw = tokenizers.Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_PIECE_BYTES,
    )
    raw.train_from_iterator(texts, trainer=trainer)
    for at, token in enumerate(SPECIAL_TOKENS):
        added = AddedToken(token, normalized=False, special=at < _FIRST_PLAIN)
        if added.special:
            raw.add_special_tokens([added])
        else:
            raw.add_tokens([added])
    return raw


def _special(raw: tokenizers.Tokenizer, token: str, name: str) -> int:
    found = raw.token_to_id(token)
    if found is None:
        raise UserError(f"{name}: no token {token}; expected the tokenizer of a Qwen2 or Qwen3 chat model")
    return found
