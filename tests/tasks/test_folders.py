"""`benchmark: {name: folders, …}`: images of a user's own, a folder for each task and class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from condu.cli import app
from condu.config import ConfigError, find_config, load_config, make_config
from condu.tasks.configured import make_benchmark
from condu.tasks.folders import folders_benchmark
from condu.tasks.images import DataError
from condu.trainer import ContinualTrainer

COLOURS = {"red": (200, 30, 30), "dark_blue": (20, 20, 120), "green": (30, 180, 40)}


def write(root: Path, task: str, classes: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """A task whose classes are colours: images of both splits, of another size each."""
    for split in ("train", "test"):
        for name in classes:
            folder = root / task / split / name
            folder.mkdir(parents=True)
            for number in range(6):
                size = (20 + number, 24)
                Image.new("RGB", size, COLOURS[name]).save(folder / f"{number}.png")
    return root / task


def config(root: Path, **changes: Any) -> Any:
    return make_config({"benchmark": {"name": "folders", "root": str(root), **changes}})


def test_tasks_classes_and_images(tmp_path: Path) -> None:
    write(tmp_path, "second")
    task = write(tmp_path, "first", ("red", "dark_blue"))
    templates = "a {} square\n\n  a photo of a {} thing.\n"
    (task / "templates.txt").write_text(templates, encoding="utf-8-sig")
    for name in ("labels.csv", "scan.pdf", "film.mpg", "drawing.eps", "._0.png"):
        (task / "train" / "red" / name).write_text("no image")
    Image.new("RGB", (9, 9), COLOURS["red"]).save(task / "train" / "red" / "more.GIF")
    (tmp_path / ".hidden").mkdir()
    (task / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "notes.txt").write_text("no task")
    first, second = folders_benchmark(tmp_path)
    assert (first.name, second.name) == ("first", "second")
    assert first.classnames == ("dark blue", "red")
    assert first.templates == ("a {} square", "a photo of a {} thing.")
    assert second.templates == ("a photo of a {}.",)
    images = first.load("test")
    assert [label for _, label in images] == [0] * 6 + [1] * 6
    assert images[0][0].getpixel((0, 0)) == COLOURS["dark_blue"]
    assert "train" in str(first.load("train").files[0])
    assert len(first.load("train")) == 13
    assert "test" in str(images.files[0])


def test_order_number_and_shots_are_the_configurations(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path, name)
    chosen = config(tmp_path, order=["c", "a", "b"], tasks=2, shots=5, workers=3)
    benchmark = make_benchmark(chosen)
    assert [task.name for task in benchmark] == ["c", "a"]
    assert (len(benchmark["c"].load("train")), len(benchmark["c"].load("test"))) == (15, 18)
    assert benchmark.workers == 3
    assert [task.name for task in make_benchmark(config(tmp_path, order=["c", "a"]))] == ["c", "a"]
    with pytest.raises(ConfigError, match=r"benchmark\.order: 'c' is listed twice"):
        make_benchmark(config(tmp_path, order=["c", "c"]))
    with pytest.raises(ConfigError, match=r"benchmark\.order: benchmark 'folders' has no task 'd'"):
        make_benchmark(config(tmp_path, order=["c", "a", "d"]))
    with pytest.raises(ConfigError, match="download is for 'mtil' only"):
        config(tmp_path, download=True)
    with pytest.raises(ConfigError, match="'folders' needs root"):
        make_config({"benchmark": {"name": "folders"}})


def test_a_run_over_folders(tmp_path: Path) -> None:
    write(tmp_path / "data", "colours", ("red", "green"))
    write(tmp_path / "data", "others", ("green", "red"))
    values = {
        "benchmark": {"name": "folders", "root": str(tmp_path / "data"), "workers": 0},
        "methods": ["condu"],
        "training": {"steps": 2, "batch_size": 4},
    }
    results = ContinualTrainer.from_config(make_config(values), tmp_path / "run").run()
    assert (results["benchmark"], results["tasks"]) == ("folders", ["colours", "others"])


def remove_images(task: Path) -> None:
    for file in (task / "test" / "red").iterdir():
        file.unlink()


def rename_class(task: Path) -> None:
    (task / "test" / "red").rename(task / "test" / "purple")


def remove_test(task: Path) -> None:
    (task / "test").rename(task / "validation")


def spoil_template(task: Path) -> None:
    (task / "templates.txt").write_text("a photo of something\n")


def name_a_field(task: Path) -> None:
    (task / "templates.txt").write_text("a {} photo of a {nice} thing\n")


def open_brace(task: Path) -> None:
    (task / "templates.txt").write_text("a photo of a {} {\n")


def remove_train(task: Path) -> None:
    (task / "train").rename(task / "training")


def empty_templates(task: Path) -> None:
    (task / "templates.txt").write_text("\n")


def same_class_twice(task: Path) -> None:
    for split in ("train", "test"):
        (task / split / "green").rename(task / split / "dark blue")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_images, r"test: .*no valid file for the classes red"),
        (rename_class, "class 'purple' is in test only"),
        (remove_test, "test is not there"),
        (spoil_template, r"template 'a photo of something' needs exactly one '\{\}'"),
        (name_a_field, r"template 'a \{\} photo of a \{nice\} thing' needs exactly one"),
        (open_brace, r"template 'a photo of a \{\} \{' needs exactly one"),
        (remove_train, "train is not there"),
        (empty_templates, "at least one template"),
        (same_class_twice, "class names must be unique"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, damage: Any, expected: str) -> None:
    write(tmp_path, "fine")
    damage(write(tmp_path, "broken"))
    with pytest.raises(DataError, match=expected) as error:
        folders_benchmark(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "broken"))
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--benchmark", "folders"])
    assert result.exit_code == 1
    assert str(error.value).removeprefix(str(tmp_path))[:30] in result.stdout


def test_a_forgotten_option_is_named(tmp_path: Path) -> None:
    write(tmp_path, "colours")
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stdout.endswith("that is --benchmark folders\n")


def test_no_task_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"benchmark\.root: .*nowhere is not a folder"):
        make_benchmark(config(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no task"):
        folders_benchmark(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        folders_benchmark(tmp_path / "nowhere")


def test_a_damaged_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    task = write(tmp_path, "colours")
    bad = task / "test" / "red" / "3.png"
    bad.write_bytes(b"no image")
    images = folders_benchmark(tmp_path)["colours"].load("test")
    with pytest.raises(DataError, match=r"red/3\.png cannot be read"):
        images[images.files.index(bad)]


def test_check_counts_and_finds_empty_files(tmp_path: Path) -> None:
    write(tmp_path, "colours")
    command = ["data", "check", str(tmp_path), "--benchmark", "folders"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "complete" in result.stdout
    (tmp_path / "colours" / "train" / "red" / "0.png").write_bytes(b"")
    (tmp_path / "colours" / "train" / "red" / "1.png").write_bytes(b"<html>not found</html>")
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 1
    (finding,) = json.loads(result.stdout)["datasets"]
    assert finding["found"] == {"classes": 3, "train": 18, "test": 18}
    assert "2 of 18 training images are missing or no images" in finding["problems"][0]


def test_the_ready_configuration_needs_only_the_folder() -> None:
    ready = load_config(find_config(Path("configs", "folders_condu.yaml")))
    assert (ready.benchmark.name, ready.benchmark.root) == ("folders", "data/own")
