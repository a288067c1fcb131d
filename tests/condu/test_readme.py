"""README's examples, run as they stand; what follows a block is what it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:```\n(.*?)```)?", README, flags=re.DOTALL)
WHOLE = [(code, printed) for code, printed in BLOCKS if code.startswith("import torch\n")]


def test_there_are_examples() -> None:
    assert len(WHOLE) >= 5


@pytest.mark.parametrize(("code", "printed"), WHOLE)
@pytest.mark.filterwarnings("error::UserWarning")
def test_an_example_runs_and_prints_what_it_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: str,
    printed: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "__main__"})
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("code", [code for code, _ in BLOCKS])
def test_every_example_is_python(code: str) -> None:
    compile(code, "README.md", "exec")


def test_checkpoints_may_be_fused_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is not replaced by another, so an example must not leave one."""
    monkeypatch.chdir(tmp_path)
    (code,) = (code for code, _ in WHOLE if "checkpoint.unify" in code)
    for _ in range(2):
        exec(code, {"__name__": "__main__"})
