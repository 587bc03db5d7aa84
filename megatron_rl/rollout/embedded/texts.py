"""Decodes the text of what was generated, and looks for stop strings in it."""

from pathlib import Path
from typing import Any

from megatron_rl.rollout.embedded.fields import RequestError
from megatron_rl.rollout.embedded.protocol import SamplingParams


class Detokenizer:
    """Gives the text of output ids when the model directory holds a tokenizer.json, "" otherwise; reads it at the first
    use.

    May be used by several threads.
    """

    def __init__(self, model_path: str) -> None:
        self._path = Path(model_path) / "tokenizer.json"
        self._exists = self._path.is_file()
        self._tokenizer: Any = None

    def check(self, params: SamplingParams) -> None:
        """Raise RequestError where stop strings are asked for and nobody knows the text of a token."""
        if not params.stop:
            return
        problem = "" if self._exists else "does not exist"
        try:
            self._text([], skip_special_tokens=False)
        except Exception as error:  # the library raises no kind of its own
            problem = problem or f"cannot be read ({error})"
        if problem:
            raise RequestError(
                f"sampling_params.stop needs {self._path}, which {problem}; put one there, or use stop_token_ids"
            )

    def decode(self, ids: list[int], params: SamplingParams, finish_reason: dict[str, Any] | None) -> str:
        """Return the text of an answer, as SGLang trims it: without the token or the string that ended it."""
        if not self._exists:
            return ""
        matched = None if finish_reason is None or finish_reason["type"] != "stop" else finish_reason["matched"]
        if isinstance(matched, int) and not params.no_stop_trim:
            ids = ids[:-1]
        text = self._text(ids, params.skip_special_tokens)
        if isinstance(matched, str) and (start := text.find(matched)) >= 0:
            text = text[: start + len(matched)] if params.no_stop_trim else text[:start]
        return text

    def matched(self, ids: list[int], stops: tuple[str, ...]) -> str | None:
        """Return the first of the strings that is in the text of the ids, special tokens included."""
        text = self._text(ids, skip_special_tokens=False)
        return next((stop for stop in stops if stop in text), None)

    def _text(self, ids: list[int], skip_special_tokens: bool) -> str:
        if self._tokenizer is None:
            from tokenizers import Tokenizer  # 50 ms that a server without a tokenizer saves

            self._tokenizer = Tokenizer.from_file(str(self._path))
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text
