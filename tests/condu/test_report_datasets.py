"""What a page says about the data behind its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from written_run import results, write_run

from condu.report.datasets import data_sets, resolution
from condu.report.experiment import Experiment
from condu.report.gathering import gather
from condu.report.page import page

COUNTS = {"hues": {"train": 120, "test": 25}, "tones": {"train": 60, "test": 16}}


def experiments(
    folder: Path, *images: dict[str, Any] | None, same: bool = False
) -> list[Experiment]:
    """Runs with these numbers of images, `same`: of one configuration, by seed."""
    folders = []
    for n, counts in enumerate(images):
        changes: dict[str, Any] = {} if same else {"training": {"steps": 10 + n}}
        found = results(tasks=("hues", "tones"), methods=("condu",), seed=n, **changes)
        del found["images"]
        if counts is not None:
            found["images"] = counts
        folders.append(write_run(folder / str(n), found, features=None))
    return gather(folders)


def counted(given: list[Experiment]) -> list[tuple[str, str, str]]:
    return [(each.task, each.train, each.test) for each in data_sets(given)]


def test_each_task_has_its_images_and_classes(tmp_path: Path) -> None:
    given = experiments(tmp_path, COUNTS)
    assert counted(given) == [("hues", "120", "25"), ("tones", "60", "16")]
    assert data_sets(given)[1].classes == ["tones 0", "tones 1", "tones 2"]
    text = page(given)
    assert "<td>60</td><td>16</td><td>tones 0, tones 1, tones 2</td>" in text
    assert "One test image of tones, which has the fewest (16), is 6.2 points" in text


def test_older_runs_do_not_know(tmp_path: Path) -> None:
    given = experiments(tmp_path, None)
    assert counted(given) == [("hues", "–", "–"), ("tones", "–", "–")]
    assert resolution(given) is None
    assert "One test image" not in page(given)


def test_of_several_seeds_one_that_knows_is_enough(tmp_path: Path) -> None:
    (experiment,) = experiments(tmp_path, None, COUNTS, same=True)
    assert counted([experiment])[0] == ("hues", "120", "25")


def test_configurations_that_differ_are_told_apart(tmp_path: Path) -> None:
    fewer = {task: counts | {"train": 10} for task, counts in COUNTS.items()}
    given = experiments(tmp_path, COUNTS, fewer)
    assert counted(given)[0] == ("hues", "A 120, B 10", "25")
    assert counted(experiments(tmp_path / "old", COUNTS, None))[0] == ("hues", "A 120", "A 25")


@pytest.mark.parametrize(
    ("test", "points"), [(1, "100.0"), (18, "5.6"), (100, "1.0"), (3000, "0.033")]
)
def test_what_an_image_is_worth(tmp_path: Path, test: int, points: str) -> None:
    given = experiments(tmp_path, {"hues": {"train": 9, "test": test}})
    text = resolution(given)
    assert text is not None
    assert f"is {points} points" in text


def test_questions_without_classes_have_no_table(tmp_path: Path) -> None:
    found = results(benchmark="mini_vqa", methods=("pam",), protocols=("task-id",))
    found["classes"] = {}
    given = gather([write_run(tmp_path / "run", found, features=None)])
    assert data_sets(given) == []
    assert resolution(given) is None
