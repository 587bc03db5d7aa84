"""Writes the files of SFT rows, whole or not at all."""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TextIO

_DOMAIN = re.compile(r"[\w.-]+")


class SftFiles:
    """Writes SFT rows. Those for training go to `output`, or to output_DOMAIN each, those for validation to
    `validation`, or to `output` as well without one. They are written to NAME.partial, and renamed by `finish`; `with`
    removes what is left of them.
    """

    def __init__(
        self,
        output: Path,
        validation: Path | None = None,
        by_domain: bool = False,
        force: bool = False,
        inputs: Collection[Path] = (),
    ) -> None:
        """Check where the rows go. inputs: files that must not be overwritten. force: overwrite others."""
        self._output, self._validation, self._by_domain, self._force = output, validation, by_domain, force
        self._inputs = {path.resolve() for path in inputs}
        self._open: dict[Path, TextIO] = {}
        self._closing = ExitStack()
        self.num_rows: Counter[Path] = Counter()
        if validation is not None:
            self._check(validation)
        if not by_domain:
            self._check(output)
        if validation == output:
            raise ValueError(f"validation rows cannot go to {output} too; name another file")

    def claim(self, domain: str) -> None:
        """Check that the file of the domain can be written. Raise ValueError when it cannot."""
        if self._by_domain:
            if not _DOMAIN.fullmatch(domain):
                raise ValueError(f"domain {domain!r} cannot be a part of a file's name; leave --by-domain out")
            self._check(self._path(domain))

    def write(self, row: Mapping[str, Any], domain: str, is_validation: bool) -> None:
        path = self._validation if is_validation and self._validation is not None else self._path(domain)
        if path not in self._open:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open[path] = self._closing.enter_context(_partial(path).open("w", encoding="utf-8"))
        self._open[path].write(json.dumps(row, ensure_ascii=False) + "\n")
        self.num_rows[path] += 1

    def finish(self) -> None:
        self._closing.close()
        for path in self._open:
            _partial(path).replace(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()
        for path in self._open:
            _partial(path).unlink(missing_ok=True)

    def _path(self, domain: str) -> Path:
        return self._output.with_stem(f"{self._output.stem}_{domain}") if self._by_domain else self._output

    def _check(self, path: Path) -> None:
        if path.resolve() in self._inputs:
            raise ValueError(f"{path} is one of the files that are read; name another output")
        if path.exists() and not self._force:
            raise ValueError(f"{path} exists; overwrite it with --force, or name another output")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
