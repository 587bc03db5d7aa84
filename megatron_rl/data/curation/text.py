"""Makes the normal form of a prompt, in which two prompts are compared, and the hashes that are kept of it.

A normal form is a sequence of tokens: words in one case, numbers, single ideographs, and the signs that mean something.
What carries no meaning (spaces, prose punctuation, quotation marks, LaTeX's dollar signs, backslashes and spacing) is
no token; `3 + 4` and `3 - 4`, `5!` and `5`, or `1.5` and `15` stay different.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash

# Left out: LaTeX that only spaces, sizes or delimits.
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|d(?=frac)|t(?=frac)|q?quad|[,;:!\s()\[\]])|[$`]")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))")
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(
    rf"\d*\.?\d+|[{_IDEOGRAPHS}]|[^\W\d_{_IDEOGRAPHS}]+"
    r"|(?<=[\d)])!|(?<=\b[a-z])[!']"  # a factorial or a derivative, not the end of a sentence
    r"|[^\w\s.,;:?!'\"\\、。「」]"
)
_SAME_SIGN = str.maketrans({"−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "’": "'", "‘": "'", "“": '"', "”": '"',
                            "×": "*", "·": "*"})  # fmt: skip
_NUMBER_WORDS = re.compile(
    r"zero|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|twenty|"
    r"(?:thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|million|billion|dozen|half|quarter|twice|thrice|double|"
    r"triple|second|third|(?:four|fif|six|seven|eigh|nin|ten)th"
)

_BASE = 0xD6E8FEB86659FD93  # odd, so it has an inverse
_CACHED_TOKENS = 1 << 17


def tokens(text: str) -> list[str]:
    """Return the normal form of `text`."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_SAME_SIGN))
    text = text.casefold()
    if "\\" in text or "$" in text or "`" in text:
        text = _LAYOUT.sub(" ", text)
    return _TOKEN.findall(_THOUSANDS.sub("", text))


def digest(text: str) -> bytes:
    """Return 16 bytes that stand for `text`."""
    return xxhash.xxh3_128_digest(text.encode())


def short_digest(text: str) -> int:
    """Return 64 bits that stand for `text`."""
    return xxhash.xxh3_64_intdigest(text.encode())


def numbers_digest(words: Sequence[str]) -> int:
    """Return a digest of the numbers among the tokens, in their order, written in digits or in English.

    Without "one" and "first", which are also a pronoun and an adverb: swapped for another number they still show.
    """
    return short_digest(" ".join(filter(_is_number, words)))


def token_hashes(words: Sequence[str]) -> np.ndarray:
    """Return a hash of each token, uint64 [number of tokens]."""
    return np.fromiter(map(_token_hash, words), np.uint64, len(words))


def ngram_hashes(hashes: np.ndarray, size: int) -> np.ndarray:
    """Return uint64 [number of tokens - size + 1]: one hash for each run of `size` tokens, empty where there are fewer.

    h_i + h_(i+1) B + h_(i+2) B^2 + ... modulo 2^64, as a difference of sums from the beginning, divided by B^i: that
    takes as long for long runs as for short ones.
    """
    count = len(hashes) - size + 1
    if count < 1:
        return np.empty(0, np.uint64)
    powers, inverses = _powers(len(hashes).bit_length())
    sums = np.cumsum(hashes * powers[: len(hashes)])
    runs = sums[size - 1 :].copy()
    runs[1:] -= sums[: count - 1]
    runs *= inverses[:count]
    return runs ^ (runs >> np.uint64(32))


def shingles(hashes: np.ndarray, size: int) -> np.ndarray:
    """Return the set of runs of `size` tokens, sorted; a shorter text is one run. hashes: of the tokens, at least
    one."""
    return np.unique(ngram_hashes(hashes, min(size, len(hashes))))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return |A and B| / |A or B| of two sets as `shingles` gives them."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common) if common else 0.0


@lru_cache(_CACHED_TOKENS)
def _is_number(word: str) -> bool:
    return word[-1].isdigit() or _NUMBER_WORDS.fullmatch(word) is not None


@lru_cache(_CACHED_TOKENS)
def _token_hash(word: str) -> int:
    return short_digest(word)


@lru_cache
def _powers(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return B^i and B^-i modulo 2^64 for i below 2^bits."""
    bases = _BASE, pow(_BASE, -1, 1 << 64)
    powers, inverses = (np.cumprod(np.array([1] + [base] * ((1 << bits) - 1), np.uint64)) for base in bases)
    return powers, inverses
