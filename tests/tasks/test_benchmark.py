from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from condu.tasks import Benchmark, Task, load_benchmark


class Plain(Dataset):
    def __init__(self, shade: int) -> None:
        self.shade = shade

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (4, 2), (self.shade, 0, 0)), index


def make_task(name: str = "plain", **changes) -> Task:
    fields = {
        "name": name,
        "classnames": ("a", "b", "c"),
        "templates": ("a photo of {}.",),
        "load": lambda split: Plain({"train": 10, "test": 20}[split]),
    }
    return Task(**(fields | changes))


def red(image: Image.Image) -> torch.Tensor:
    return torch.full((3, image.height, image.width), float(image.getpixel((0, 0))[0]))


@pytest.mark.parametrize(("split", "shade"), [("train", 10.0), ("test", 20.0)])
def test_dataset_applies_the_transform_to_the_images_of_its_split(split, shade):
    data = make_task().dataset(split, red)
    assert len(data) == 3
    image, label = data[2]
    assert image.shape == (3, 2, 4)
    assert image.unique().tolist() == [shade]
    assert label == 2


def test_dataset_refuses_an_unknown_split():
    with pytest.raises(ValueError, match=r"'plain'.*'validation'"):
        make_task().dataset("validation", red)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classnames": ("a", "a")}, "unique"),
        ({"classnames": ()}, "not empty"),
        ({"templates": ()}, "at least one template"),
        ({"templates": ("no place",)}, "'no place' needs exactly one"),
        ({"templates": ("{} and {}",)}, "exactly one"),
    ],
)
def test_task_refuses_words_that_cannot_become_prompts(changes, message):
    with pytest.raises(ValueError, match=rf"'plain'.*{message}"):
        make_task(**changes)


def test_benchmark_is_a_sequence_of_tasks_found_by_name():
    a, b = make_task("a"), make_task("b")
    benchmark = Benchmark("two", (a, b))
    assert len(benchmark) == 2
    assert list(benchmark) == [a, b]
    assert benchmark["b"] is b
    with pytest.raises(KeyError, match="'two' has no task 'c'"):
        benchmark["c"]


def test_benchmark_refuses_two_tasks_of_one_name():
    with pytest.raises(ValueError, match="unique"):
        Benchmark("twins", (make_task(), make_task()))


def test_subset_and_order():
    benchmark = Benchmark("three", tuple(make_task(n) for n in "abc"))
    assert [t.name for t in benchmark.subset(2)] == ["a", "b"]
    assert [t.name for t in benchmark.order(["c", "a", "b"])] == ["c", "a", "b"]
    assert [t.name for t in benchmark.order(["c", "a"])] == ["c", "a"]
    assert [t.name for t in benchmark] == ["a", "b", "c"]


@pytest.mark.parametrize("n", [0, -1, 4])
def test_subset_refuses_sizes_outside_the_benchmark(n):
    with pytest.raises(ValueError, match=f"3 tasks, cannot take {n}"):
        Benchmark("three", tuple(make_task(n) for n in "abc")).subset(n)


def test_an_order_names_tasks_that_there_are_once():
    benchmark = Benchmark("three", tuple(make_task(n) for n in "abc"))
    with pytest.raises(ValueError, match="unique"):
        benchmark.order(["a", "b", "b"])
    with pytest.raises(KeyError, match="no task 'd'"):
        benchmark.order(["a", "d"])


def test_load_benchmark_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown benchmark 'maxi'"):
        load_benchmark("maxi")
