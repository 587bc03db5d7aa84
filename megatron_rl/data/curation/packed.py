"""Unpacks LiveCodeBench's private tests: JSON, in a pickle, compressed, in base64. Nothing in it is run."""

import base64
import pickletools
import zlib

from megatron_rl.parsing import MAX_DOCUMENT_BYTES

# A pickle of one text needs these opcodes only. None of them can name, call or build another object.
_FRAME = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}
_TEXT = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}


def unpacked_text(packed: str, most: int = MAX_DOCUMENT_BYTES) -> str:
    """Unpack the text, also where it was compressed without a pickle around it. Raise ValueError for anything else, and
    for more than `most` bytes."""
    try:
        content = _decompressed(base64.b64decode(packed, validate=True), most)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"neither JSON nor compressed tests in base64 ({error})") from None
    return content.decode() if content.lstrip()[:1] in (b"[", b"{") else _pickled_text(content)


def _decompressed(data: bytes, most: int) -> bytes:
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(data, most + 1)
    if len(content) > most:
        raise ValueError(f"{len(data):,} bytes unpack to more than {most:,}, which looks like a trap")
    if not unpacker.eof:
        raise ValueError("the compressed tests are cut short")
    return content


def _pickled_text(content: bytes) -> str:
    """Return the one text of a pickle, by looking at its instructions; no unpickler runs."""
    texts = []
    for instruction, argument, _ in pickletools.genops(content):
        if instruction.name in _TEXT:
            texts.append(argument)
        elif instruction.name not in _FRAME:
            raise ValueError(f"the pickle of the tests holds {instruction.name} and must be one text; it is not read")
    if len(texts) != 1:
        raise ValueError(f"the pickle of the tests holds {len(texts)} texts and must be one; it is not read")
    return str(texts[0])
