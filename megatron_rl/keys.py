"""This module makes and shows the keys of servers, and keeps the environment's secrets from them."""

import os
import re
import secrets
from collections.abc import Callable, Collection, Mapping

# The key that the server at a url wants. It raises where the key must not be sent now.
KeyOf = Callable[[str], str]

_NAMES_A_SECRET = re.compile(
    r"(^|_)(API|ACCESS|SECRET|PRIVATE)?(KEY|TOKEN|SECRET|CREDENTIAL|AUTH)S?(_|$)|PASSWORD|PASSWD|PASSPHRASE|_PWD$",
    re.IGNORECASE,
)
_HOLDS_A_PASSWORD = re.compile(r"://[^/\s@]*:[^/\s@]+@")  # a proxy's or a package index's url


def new_key() -> str:
    """Make a key that nobody can guess, of hex digits, which mean nothing to a command line or to YAML."""
    return secrets.token_hex(32)


def no_key(url: str) -> str:
    """Return the key of a server that asks for none, which is empty."""
    del url
    return ""


def bearer(key: str) -> dict[str, str]:
    """Make the headers with which a request shows the key; none without a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def hidden(text: str, key: str) -> str:
    """Take the key out of a text, for messages that quote what a server said."""
    return text.replace(key, "...") if key else text


def key_in_environment(variable: str, setting: str) -> str:
    """Read the key from the variable that the configuration or an option names; "" where it names none.

    setting: what named it, for messages. ValueError when the environment lacks it, or no header takes it.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"{setting} names {variable}, which is not in the environment; set it to the server's key")
    if not (key.isascii() and key.isprintable()):  # httpx would quote it
        raise ValueError(
            f"the environment variable {variable} ({setting}) holds characters that no HTTP header takes; set it to "
            "the server's key alone"
        )
    return key


def without_secrets(environment: Mapping[str, str], named: Collection[str] = ()) -> dict[str, str]:
    """Keep the variables that hold no key, token or password, as far as their names tell, and are not `named`."""
    return {
        name: value
        for name, value in environment.items()
        if name not in named and not _NAMES_A_SECRET.search(name) and not _HOLDS_A_PASSWORD.search(value)
    }
