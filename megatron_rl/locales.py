"""This module makes commands use UTF-8 whatever the user's locale says."""

import codecs
import locale
import os
import sys


def use_utf8() -> None:
    """Start this command, and so what it starts, again in Python's UTF-8 mode where the locale has another encoding.

    Our own code states the encoding of its files. Names of files, words of the command line, the terminal and what
    libraries read have none. Whatever is started as a program calls this first.
    """
    if codecs.lookup(locale.getencoding()).name != "utf-8" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
