"""`condu data check`: what it says of folders that are whole, empty, incomplete, damaged."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import mtil_folders
import pytest
from typer.testing import CliRunner, Result

from condu.cli import app
from condu.tasks.finding import Sizes
from condu.tasks.mtil import SOURCES, check

RANDOM = Sizes(classes=3, train=57, test=15)
OFFICIAL = Sizes(classes=3, train=36, test=36)
TINY = dict.fromkeys(mtil_folders.WRITERS, OFFICIAL) | {
    "Caltech101": RANDOM,
    "EuroSAT": RANDOM,
    "SUN397": RANDOM,
    "Flowers102": Sizes(classes=102, train=102, test=102),
    "MNIST": Sizes(classes=10, train=100, test=50),
}


def condu(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "check", *(str(argument) for argument in arguments)])


def findings(root: Path, status: int) -> dict[str, dict[str, Any]]:
    result = condu(root, "--json")
    assert result.exit_code == status, result.output
    found = json.loads(result.stdout)
    assert (found["benchmark"], found["root"]) == ("mtil", str(root))
    assert found["complete"] == (status == 0)
    return {finding["name"]: finding for finding in found["datasets"]}


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All eleven data sets, of the sizes that are expected."""
    tiny = tuple(dataclasses.replace(source, sizes=TINY[source.name]) for source in SOURCES)
    monkeypatch.setattr(check, "SOURCES", tiny)
    return mtil_folders.write(tmp_path, monkeypatch=monkeypatch)


def tree(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_complete_folder_ends_with_status_0_and_is_not_touched(whole: Path) -> None:
    before = tree(whole)
    assert {f["state"] for f in findings(whole, 0).values()} == {"complete"}
    result = condu(whole, "--benchmark", "mtil")
    assert result.exit_code == 0
    assert re.search(r"^ *Aircraft +3 / 3 +36 / 36 +36 / 36 +complete *$", result.stdout, re.M)
    assert tree(whole) == before


def test_an_empty_folder_is_told_where_everything_goes(tmp_path: Path) -> None:
    found = findings(tmp_path, 1)
    assert [finding["state"] for finding in found.values()] == ["missing"] * 11
    assert found["MNIST"]["found"] is None
    assert found["MNIST"]["expected"] == {"classes": 10, "train": 60000, "test": 10000}
    assert f"{tmp_path}/MNIST/raw/train-images-idx3-ubyte is missing" in found["MNIST"]["problems"]
    output = condu(tmp_path).stdout
    for source in SOURCES:
        assert source.how.format(root=tmp_path) in output
    (line,) = [line for line in output.splitlines() if "download: true" in line]
    assert "SUN397" in line
    assert "StanfordCars" not in line
    assert list(tmp_path.iterdir()) == []


def test_real_sizes_are_expected_of_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mtil_folders.write(tmp_path, "EuroSAT", monkeypatch=monkeypatch)
    found = findings(tmp_path, 1)
    assert found["EuroSAT"]["state"] == "incomplete"
    assert found["EuroSAT"]["found"] == {"classes": 3, "train": 57, "test": 15}
    assert found["EuroSAT"]["problems"] == [
        "found 3 classes, 57 training and 15 test images; "
        "there should be 10 classes, 21600 training and 5400 test images"
    ]
    assert found["DTD"]["state"] == "missing"


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_images_that_are_listed_but_not_there_are_counted(whole: Path, spoil) -> None:
    images = sorted((whole / "food-101" / "images" / "hot_dog").iterdir())
    test = [path for path in images if int(path.stem) >= 900]
    for path in test[:2]:
        spoil(path)
    food = findings(whole, 1)["Food101"]
    assert food["state"] == "incomplete"
    assert food["found"] == dataclasses.asdict(OFFICIAL)
    (problem,) = food["problems"]
    first = min(test[:2], key=lambda path: int(path.stem))
    assert problem == f"2 of 36 test images are missing or no images, the first is {first}"


def test_a_hole_in_a_folder_of_caltech101_is_found(whole: Path) -> None:
    folder = whole / "caltech101" / "101_ObjectCategories" / "Faces"
    (folder / "image_0003.jpg").rename(folder / "stray.jpg")
    caltech = findings(whole, 1)["Caltech101"]
    assert "image_0003.jpg" in caltech["problems"][0]
    assert caltech["how"].startswith("unpack the 101_ObjectCategories.tar.gz")


def test_a_class_without_images_is_named(whole: Path) -> None:
    variants = whole / "fgvc-aircraft-2013b" / "data" / "variants.txt"
    variants.write_text(variants.read_text() + "Yak-42\n")
    problems = findings(whole, 1)["Aircraft"]["problems"]
    assert "found 4 classes" in problems[0]
    assert problems[1:] == [
        f"1 of 4 classes have no {split} images, the first is 'Yak-42'"
        for split in ("training", "test")
    ]


def test_what_cannot_be_read_is_damaged_and_the_rest_is_looked_at(whole: Path) -> None:
    (whole / "food-101" / "meta" / "train.json").write_text("{")
    (whole / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    found = findings(whole, 1)
    states = {name: finding["state"] for name, finding in found.items()}
    assert (states.pop("Food101"), states.pop("MNIST")) == ("damaged", "missing")
    assert set(states.values()) == {"complete"}
    (problem,) = found["Food101"]["problems"]
    assert problem.startswith(f"Food101: what is in {whole} is damaged (JSONDecodeError: ")
    assert problem.endswith(")")
    output = condu(whole).stdout
    assert output.count("unpack food-101.tar.gz") == 1
    assert output.count("Food101: ") == 1
    assert "fetches: MNIST" in output


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    result = condu(tmp_path / "nowhere")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path / 'nowhere'} is not a folder\n"
    result = condu(tmp_path, "--benchmark", "mini")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--benchmark: must be mtil or folders, got 'mini'" in result.stderr
