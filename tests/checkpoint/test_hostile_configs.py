"""Any value of a state's config.json replaced by junk: an error that names the state, faults, or
nothing; never a crash, and no memory for what is not there."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from small_states import make_state, save

from condu.checkpoint.inspecting import inspect
from condu.checkpoint.verifying import verify

JUNK = [None, -1, 1 << 50, 10**400, 1.5, float("nan"), "", "cars", [], {}]


def first_places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside nested JSON; of a list only to its first."""
    for key in value if isinstance(value, dict) else range(min(1, len(value))):
        yield (*path, key)
        if isinstance(value[key], (dict, list)):
            yield from first_places(value[key], (*path, key))


def look(at: Callable[[Path], object], folder: Path) -> str:
    try:
        return "faults" if at(folder) else "harmless"
    except (ValueError, OSError) as error:
        return "refused" if str(folder) in str(error) else f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_any_value_may_be_wrong(tmp_path: Path) -> None:
    save(make_state(), tmp_path, 1 << 30)
    config = json.loads((tmp_path / "config.json").read_text())
    config["zero_sums"] = [0] * 7
    outcomes: Counter[str] = Counter()
    for place in first_places(config):
        for junk in JUNK:
            broken = copy.deepcopy(config)
            parent = broken
            for key in place[:-1]:
                parent = parent[key]
            parent[place[-1]] = junk
            (tmp_path / "config.json").write_text(json.dumps(broken))
            outcomes[look(verify, tmp_path)] += 1
            outcomes[look(lambda path: json.dumps(inspect(path).as_dict()) and None, tmp_path)] += 1
    assert set(outcomes) == {"refused", "faults", "harmless"}
    assert outcomes["refused"] > 500
