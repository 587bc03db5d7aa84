"""Knows what a generation server can do, by its version; no other place does."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Says what a server can do. weight_update_sessions: updates over a process group must lie between
    begin_weight_update and end_weight_update. routed_experts: they can return the experts that the router chose
    (BailingMoE)."""

    weight_update_sessions: bool
    routed_experts: bool


def capabilities(version: str) -> Capabilities:
    """Return what a server of this version can do. version: of `/server_info`. Raise ValueError for one that is neither
    SGLang's nor the embedded server's."""
    if version.startswith("embedded-"):
        return Capabilities(weight_update_sessions=True, routed_experts=True)
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if numbers is None:
        raise ValueError(f"a generation server calls its version {version!r}; expected one such as '0.5.21'")
    release = tuple(int(part) for part in numbers.groups())
    return Capabilities(
        weight_update_sessions=release >= (0, 5, 21),
        routed_experts=release >= (0, 5, 22),
    )
