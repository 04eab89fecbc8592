"""Text to token ids and back: bytes, chars, any of tiktoken's encodings by name, or a Hugging Face tokenizer from its folder.

Each tokenizer has `n_vocab`, `encode_array(text)` -> array of ids, `encode_prompt(text)` -> list of ids, `decode(ids)` -> text, and
`decodable(vocab_size)` -> bool [vocab_size]: whether each id can be decoded. A data folder's `meta.pkl` names the tokenizer that made
it. For bytes and chars it holds "vocab_size", "stoi" and "itos" as in nanoGPT, and fastgpt's "tokenizer". For another encoding it holds
"vocab_size" and "tokenizer", and for a Hugging Face tokenizer all of its "tokenizer_json". For GPT-2's encoding there is no meta.pkl, as
in nanoGPT.
"""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import tiktoken
import torch

from fastgpt.config import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_END_OF_TEXT = 50256


class Tiktoken:
    """One of tiktoken's encodings. "<|endoftext|>" is the end-of-text token in a prompt, and plain text elsewhere."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.n_vocab = encoding.n_vocab
        self.end_of_text = encoding.eot_token if END_OF_TEXT in encoding.special_tokens_set else None

    def encode_array(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def encode_prompt(self, text: str) -> list[int]:
        allowed = {END_OF_TEXT} & self.encoding.special_tokens_set
        return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def decodable(self, vocab_size: int) -> torch.Tensor:
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        for i in range(min(vocab_size, self.n_vocab)):
            try:
                self.encoding.decode_single_token_bytes(i)
            except KeyError:  # some encodings lack some of their last ids
                continue
            mask[i] = True
        return mask

    def meta(self) -> dict[str, Any] | None:
        # None for gpt2: nanoGPT then pads the vocabulary to 50304, and samples with GPT-2's encoding.
        return None if self.encoding.name == "gpt2" else {"vocab_size": self.n_vocab, "tokenizer": self.encoding.name}


class Bytes(Tiktoken):
    """One token for each byte of UTF-8: 256 ranks, no merges. Bytes that are not UTF-8 decode to U+FFFD.

    In a text to encode they stand as Python's surrogateescape reads them: so any file has a text.
    """

    cut_anywhere = True  # the tokens of a text are those of its parts

    def __init__(self):
        ranks = {bytes([i]): i for i in range(256)}
        super().__init__(
            tiktoken.Encoding("bytes", pat_str=r"[^\n]*\n|[^\n]+", mergeable_ranks=ranks, special_tokens={})
        )

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def meta(self) -> dict[str, Any]:
        # One character for each byte (correct below 128), so that nanoGPT's sample.py can print these tokens too.
        itos = {i: chr(i) for i in range(256)}
        return {"vocab_size": 256, "tokenizer": "bytes", "itos": itos, "stoi": {c: i for i, c in itos.items()}}


class Chars:
    """One token for each character of a corpus. `itos` maps ids to characters, as in nanoGPT."""

    end_of_text = None
    cut_anywhere = True

    def __init__(self, itos: dict[int, str]):
        self.itos = itos
        self.stoi = {c: i for i, c in itos.items()}
        self.n_vocab = max(itos, default=-1) + 1

    @classmethod
    def of(cls, chars: Iterable[str]) -> "Chars":
        return cls(dict(enumerate(sorted(chars))))

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text, uint32. Raises UserError for a character that is not known: prepare has collected them."""
        codes, unknown = [ord(c) for c in self.stoi], np.iinfo(np.uint32).max
        table = np.full(max(codes) + 2, unknown, dtype=np.uint32)  # the last one is for all characters above
        table[codes] = list(self.stoi.values())
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = table[np.minimum(points, len(table) - 1)]
        if (ids == unknown).any():
            new = text[int((ids == unknown).argmax())]
            raise UserError(
                f"the character {new!r} was not in the text when it was first read: it has changed; begin again"
            )
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        unknown = sorted(set(text) - self.stoi.keys())
        if unknown:
            known = "".join(sorted(self.stoi))
            raise UserError(
                f"--start: the character {unknown[0]!r} is not among the {self.n_vocab} that the model has: {known!r}"
            )
        return [self.stoi[c] for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.itos[i] for i in ids)

    def decodable(self, vocab_size: int) -> torch.Tensor:
        return torch.tensor([i in self.itos for i in range(vocab_size)])

    def meta(self) -> dict[str, Any]:
        return {"vocab_size": self.n_vocab, "tokenizer": "chars", "itos": self.itos, "stoi": self.stoi}


class HuggingFace:
    """What a tokenizer.json says, by the library `tokenizers`. "<|endoftext|>" is a token in a prompt, and plain text elsewhere.

    Raises UserError if it says no tokenizer, or the library is missing.
    """

    def __init__(self, tokenizer_json: str):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(
                "this tokenizer needs the library tokenizers, which is not installed: pip install tokenizers"
            ) from None
        self.json = tokenizer_json
        try:
            self.tokenizer = Tokenizer.from_str(tokenizer_json)
            ids = self.tokenizer.get_vocab(with_added_tokens=True)
        except BaseException as e:  # a panic of the library is no Exception
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            raise UserError(f"tokenizer.json: the library tokenizers cannot read it ({e})") from None
        self.ids = set(ids.values())
        self.n_vocab = max(self.ids, default=-1) + 1
        if not 0 < self.n_vocab <= 2**24:
            raise UserError(f"tokenizer.json: its token ids end at {self.n_vocab - 1:,}, and not below 2^24")
        self.end_of_text = ids.get(END_OF_TEXT)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # as plain text

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def encode_prompt(self, text: str) -> list[int]:
        self.tokenizer.encode_special_tokens = False
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self.tokenizer.encode_special_tokens = True

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def decodable(self, vocab_size: int) -> torch.Tensor:
        return torch.tensor([i in self.ids for i in range(vocab_size)])

    def meta(self) -> dict[str, Any]:
        return {"vocab_size": self.n_vocab, "tokenizer": "huggingface", "tokenizer_json": self.json}


Tokenizer = Tiktoken | Chars | HuggingFace


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer "bytes", one of tiktoken's encodings, or that in a folder in Hugging Face's format.

    Raises UserError if it is unknown or cannot be downloaded.
    """
    if name == "bytes":
        return Bytes()
    if name not in tiktoken.list_encoding_names():
        if os.path.isdir(folder := os.path.expanduser(name)):
            from fastgpt import huggingface  # which reads its files, and needs this module

            return from_meta(huggingface.tokenizer_meta(folder))
        raise UserError(
            f"tokenizer {name}: unknown; choose bytes, chars, a folder with a tokenizer.json, or one of "
            f"{', '.join(tiktoken.list_encoding_names())}"
        )
    try:
        return Tiktoken(tiktoken.get_encoding(name))
    except (OSError, ValueError) as e:  # requests raises OSErrors; a damaged cache file raises ValueError
        raise UserError(
            f"tokenizer {name}: its table is downloaded from the network on first use, and that failed ({type(e).__name__}); go online "
            "once, point TIKTOKEN_CACHE_DIR at a folder that has it, or prepare the data with --tokenizer=bytes or chars"
        ) from None


def separator(meta: dict[str, Any] | None) -> int:
    """The token id between the documents of a dataset with this meta. Raises UserError if its tokenizer has none."""
    if meta is None:
        return GPT2_END_OF_TEXT  # needs no download of GPT-2's table
    if type(meta.get("separator")) is int:  # that of `prepare --separator`, if it is one token
        return meta["separator"]
    name = meta.get("tokenizer", "chars")
    end_of_text = None if name == "chars" else from_meta(meta).end_of_text
    if end_of_text is None:
        raise UserError(
            f"--doc_mask=True: the dataset's tokenizer, {name}, has no token between documents; "
            "prepare the data with --tokenizer=gpt2, or with a --separator of one token, or leave the flag out"
        )
    return end_of_text


def from_meta(meta: dict[str, Any] | None) -> Tokenizer:
    """The tokenizer that a dataset's meta names; None means GPT-2's. Raises UserError."""
    if meta is None:
        return get_tokenizer("gpt2")
    name, itos = meta.get("tokenizer", "chars"), meta.get("itos")
    if name == "huggingface":
        if type(meta.get("tokenizer_json")) is not str:
            raise UserError("the dataset's meta.pkl has no `tokenizer_json`: its tokens cannot be shown as text")
        return HuggingFace(meta["tokenizer_json"])
    if name != "chars":
        return get_tokenizer(name)
    if isinstance(itos, (list, tuple)):
        itos = dict(enumerate(itos))
    if (
        not itos
        or not isinstance(itos, dict)
        or not all(type(i) is int and i >= 0 and type(c) is str for i, c in itos.items())
    ):
        raise UserError(
            "the dataset's meta.pkl has no `itos` from ids to characters: its tokens cannot be shown as text"
        )
    return Chars(itos)
