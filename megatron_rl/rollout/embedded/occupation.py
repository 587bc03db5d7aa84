"""Tracks which parts of its memory the server was told to release, and refuses what SGLang could not do without them.

On a GPU SGLang gives the memory of weights, cache and graphs back to the driver. This server keeps its memory and only
follows the rules. It refuses what would end SGLang: a release while requests run, or a resume of what was not released.
It also refuses what would make SGLang answer nonsense: generating without a cache, or with resumed weights before new
ones came, whose memory holds whatever lay there.
"""

from typing import Any

from megatron_rl.rollout.embedded.fields import RequestError, cut
from megatron_rl.rollout.embedded.updates import UpdateError

TAGS = ("kv_cache", "weights", "cuda_graph")


class Occupation:
    """Tracks which parts are released. It belongs to one event loop."""

    def __init__(self) -> None:
        self._released: set[str] = set()
        self._has_weights = True

    def release(self, body: dict[str, Any], idle: bool) -> None:
        tags = _tags(body)
        if not idle:
            raise UpdateError("release_memory_occupation needs an idle server, and requests run or wait")
        if again := self._released & tags:
            raise UpdateError(f"{', '.join(sorted(again))} is released already")
        self._released |= tags
        self._has_weights &= "weights" not in tags

    def resume(self, body: dict[str, Any]) -> None:
        tags = _tags(body)
        if present := tags - self._released:
            raise UpdateError(f"{', '.join(sorted(present))} was not released; resume what is: {self._told()}")
        self._released -= tags

    def check_generates(self) -> None:
        if self._released:
            raise RequestError(f"memory is released: {self._told()}; resume it before anything is generated")
        if not self._has_weights:
            raise RequestError("the weights were released and no new ones came since; update them first")

    def check_takes_weights(self) -> None:
        if "weights" in self._released:
            raise UpdateError("the memory of the weights is released; resume it before new ones come")

    def weights_came(self) -> None:
        self._has_weights = True

    def _told(self) -> str:
        return ", ".join(sorted(self._released)) or "nothing"


def _tags(body: dict[str, Any]) -> set[str]:
    """Return the tags that a body names. None and an empty list mean all, as in SGLang."""
    tags = body.get("tags") or TAGS
    if not isinstance(tags, list | tuple) or not all(tag in TAGS for tag in tags):
        raise RequestError(f"tags must be a list out of {', '.join(TAGS)}, got {cut(body.get('tags'))}")
    return set(tags)
