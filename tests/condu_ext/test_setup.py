"""Where setup.py looks for a CUDA toolkit."""

from __future__ import annotations

import runpy
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools

pytest.importorskip("pybind11", reason="setup.py needs the build requirements")
pytest.importorskip("ninja", reason="setup.py needs the build requirements")
SETUP = Path(__file__).resolve().parents[2] / "setup.py"
Search = Callable[[], "Path | None"]


def toolkit_at(root: Path) -> Path:
    for file in ("bin/nvcc", "include/cuda_runtime.h"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    """setup.py's search on a machine without nvcc, with packages in tmp_path / "site"."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    found = runpy.run_path(str(SETUP))["cuda_toolkit"]
    for name in ("CONDU_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "site")})
    return found  # type: ignore[no-any-return]


def test_none(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    assert search() is None
    monkeypatch.setenv("CONDU_CUDA", "1")
    with pytest.raises(SystemExit, match="nvidia-cuda-nvcc"):
        search()


def test_wheels(search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's wheel alone, which torch brings, is no toolkit; with nvcc's it is."""
    root = toolkit_at(tmp_path / "site" / "nvidia" / "cu13")
    assert search() == root
    (root / "bin" / "nvcc").unlink()
    assert search() is None
    toolkit_at(root)
    named = toolkit_at(tmp_path / "named")
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert search() == named
    monkeypatch.setenv("CONDU_CUDA", "0")
    assert search() is None
