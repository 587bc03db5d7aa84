"""Tests that an installed package which cannot be loaded counts as absent where megatron-core is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.unloadable import unloadable_counts_as_absent

# As in flash_mla 1.0, which SGLang 0.5.23 brings along, on a machine without a driver.
NO_DRIVER = "raise OSError('libcuda.so.1: cannot open shared object file')"


def package(folder: Path, name: str, inner: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(f"from {name}.inner import value\n")
    (folder / name / "inner.py").write_text(f"{inner}\nvalue = 7\n")
    return folder


@pytest.mark.parametrize("wrong", [NO_DRIVER, "raise RuntimeError('no NVIDIA driver')", "{}['sm_90']"])
def test_a_package_that_cannot_be_loaded_is_an_import_error_within_the_block_alone(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(package(tmp_path, "cannot_be_loaded", wrong))
    finders = [*sys.meta_path]
    with unloadable_counts_as_absent(), pytest.raises(ImportError, match=r"^cannot_be_loaded cannot be loaded: "):
        import cannot_be_loaded
    assert sys.meta_path == finders
    assert "cannot_be_loaded" not in sys.modules
    with pytest.raises((OSError, RuntimeError, KeyError)):
        import cannot_be_loaded  # noqa: F401


def test_other_packages_are_imported_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(package(tmp_path, "can_be_loaded", ""))
    with unloadable_counts_as_absent():
        import can_be_loaded

        with pytest.raises(ModuleNotFoundError, match="No module named 'is_not_there'"):
            import is_not_there  # noqa: F401
    assert can_be_loaded.value == 7
    monkeypatch.delitem(sys.modules, "can_be_loaded")


def test_megatron_is_imported_beside_kernels_that_want_a_driver(tmp_path: Path) -> None:
    for name in ("flash_mla", "apex"):
        package(tmp_path, name, NO_DRIVER)
    code = "from megatron_rl import device; device.import_megatron(); import megatron.core.models.gpt.gpt_model"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)
