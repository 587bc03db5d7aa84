"""Renders the page: one HTML file with its script, its style, plotly.js and the data in it, and nothing to fetch."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

_SCRIPTS = ("page.js", "curves.js", "responses.js", "start.js")
# No network, no plugins, no scripts but those that are named by their digest. Plotly writes style attributes.
_POLICY = (
    "default-src 'none'; script-src {}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'"
)
_IN_SCRIPT = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


def render(data: Mapping[str, Any]) -> str:
    """Return the page of the data that the scripts read, which `report/build.py` makes. With a version it asks for a
    newer one."""
    from plotly.offline import get_plotlyjs

    script = "\n".join(_part(name) for name in _SCRIPTS)
    plotly = get_plotlyjs()
    parts = {
        "POLICY": _POLICY.format(" ".join(_digest(text) for text in (plotly, script)))
        + ("; connect-src 'self'" if "version" in data else ""),
        "TITLE": html.escape(data["title"]),
        "STYLE": _part("page.css"),
        "DATA": embedded(data),
        "PLOTLY": plotly,
        "SCRIPT": script,
    }
    # In one pass, as data may contain what looks like a place for another part.
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda place: parts[place[1]], _part("page.html"))


def embedded(value: Any) -> str:
    """Return JSON that no text in it can end: pure ASCII without <, > and &, which stand in strings alone."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_IN_SCRIPT)


def _part(name: str) -> str:
    return files("megatron_rl.report").joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """Return the digest by which a Content-Security-Policy names an inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
