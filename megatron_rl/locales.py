"""Make commands speak UTF-8 whatever the user's locale says."""

import codecs
import locale
import os
import sys


def use_utf8() -> None:
    """Start this command again in Python's UTF-8 mode where the locale has another encoding, and so what it starts.

    Our own files say their encoding; names of files, words of the command line, the terminal and what libraries read do
    not. To be called first, by what is started as a program.
    """
    if codecs.lookup(locale.getencoding()).name != "utf-8" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
