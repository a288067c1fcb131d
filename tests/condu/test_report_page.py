"""The page as text: what it holds, and when it is not written. How it looks and behaves is in
test_report_browser.py."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result
from written_run import results, write_run

from condu.cli import app
from condu.methods import ALL
from condu.report.gathering import ReportError
from condu.report.page import write_page
from condu.report.palette import DARK, LIGHT, Theme, contrast
from condu.runfolder import RunFolderError
from condu.tasks.mtil import ORDERS


class Reader(HTMLParser):
    """Checks that tags are balanced and collects texts, tags and attributes."""

    void = ("meta", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def written(tmp_path: Path, found: dict[str, Any], **options: Any) -> str:
    folder = write_run(tmp_path / "run", found, **options)
    write_page([folder], tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def condu(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "\"><img src=x onerror='alert(1)'>",
        "</svg></style></title>&amp;",
        "{{ 7 * 7 }}{% endraw %}",
        "{row} {value}",
    ],
)
def test_names_are_text(tmp_path: Path, name: str) -> None:
    found = results(tasks=(name, "tones"), methods=("condu", "pam"))
    found["classes"][name] = [name, "b", "c"]
    reader = Reader(written(tmp_path, found))
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    assert all(tag != "img" for tag, _ in reader.tags)
    assert not any(key.startswith("on") for _, attributes in reader.tags for key in attributes)
    assert any(name == text for text in reader.texts)
    tips = [attributes["data-tip"] for _, attributes in reader.tags if "data-tip" in attributes]
    assert any(name in (tip or "") for tip in tips)


def test_characters_that_do_not_print_are_shown_by_number(tmp_path: Path) -> None:
    names = ("a\x00b", "turned\u202eround", "half \ud800")
    reader = Reader(written(tmp_path, results(tasks=names, methods=("condu",)), features=None))
    for shown in ("a\\x00b", "turned\\u202eround", "half \\ud800"):
        assert shown in reader.texts


def test_nothing_is_fetched_and_only_our_script_may_run(tmp_path: Path) -> None:
    reader = Reader(written(tmp_path, results()))
    for tag, attributes in reader.tags:
        assert "style" not in attributes, tag  # the policy would refuse it
        assert "src" not in attributes, tag
        if tag == "link":
            assert attributes["href"] == "data:,"
        elif "href" in attributes:
            target = attributes["href"] or ""
            assert target.startswith(("#", "https://arxiv.org/abs/")), target


def test_every_anchor_has_its_section(tmp_path: Path) -> None:
    for features, methods in ((20, ("condu",)), (None, ("zero_shot",))):
        folder = tmp_path / methods[0]
        reader = Reader(written(folder, results(methods=methods), features=features))
        sections = {attributes.get("id") for tag, attributes in reader.tags if tag == "section"}
        links = [attributes.get("href") for tag, attributes in reader.tags if tag == "a"]
        anchors = {link[1:] for link in links if link and link.startswith("#")}
        assert anchors == sections
        assert ("votes" in sections) == ("fusion" in sections) == (methods == ("condu",))
        assert ("features" in sections) == (features is not None)


def test_votes_are_shown_where_the_task_is_not_given(tmp_path: Path) -> None:
    both = results(methods=("condu",))
    page = written(tmp_path / "both", both, features=None)
    votes = page[page.index('id="votes"') : page.index('id="fusion"')]
    assert "<summary>agnostic" in votes
    assert "<summary>task-id" not in votes  # there, it is the data set's own task
    given = results(methods=("condu",), protocols=("task-id",))
    assert 'id="votes"' not in written(tmp_path / "given", given, features=None)


def votes_of(page: str) -> list[str]:
    """Captions of the matrices of votes."""
    section = page[page.index('id="votes"') : page.index('id="fusion"')]
    return [part.partition("<span>")[0].strip() for part in section.split("<figcaption>")[1:]]


def test_votes_that_are_the_same_are_shown_once(tmp_path: Path) -> None:
    found = results(methods=("condu", "emr", "dpeclip_id"))
    methods = found["methods"]
    for name in ("emr", "dpeclip_id"):
        methods[name] = json.loads(json.dumps(methods["condu"]))
    votes = methods["dpeclip_id"]["protocols"]["agnostic"]["votes"][-1]
    votes[0][1] += 1
    assert votes_of(written(tmp_path, found, features=None)) == ["condu, emr", "dpeclip_id"]


def test_bwt_and_forgetting_are_explained(tmp_path: Path) -> None:
    page = " ".join(written(tmp_path, results(), features=None).split())
    assert "at its best from then until before the final session" in page
    assert "never less than −BWT" in page


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(seed), results(seed=seed)) for seed in (1, 2)]
    for name, given in (("a.html", folders), ("b.html", folders[::-1])):
        write_page(given, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_single_task_has_a_page(tmp_path: Path) -> None:
    page = written(tmp_path, results(tasks=("hues",), methods=("condu", "pam")))
    assert "1 task in a row" in page
    assert "Every method learns hues and is tested on it." in page


def test_a_task_of_one_image_and_one_class_has_a_map(tmp_path: Path) -> None:
    found = results(tasks=("hues",), methods=("condu",), classes=1)
    assert "t-SNE of frozen features" in written(tmp_path, found, features=1)


def test_questions_have_no_classes_and_no_features(tmp_path: Path) -> None:
    found = results(benchmark="mini_vqa", methods=("pam",), protocols=("task-id",))
    found["classes"] = {}
    page = written(tmp_path, found, features=None)
    assert "mini_vqa, 4 tasks in a row" in page
    assert "misaligned before merging" in page
    assert "Tasks and classes" not in page


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_the_staircase_divides_seen_from_unseen(tmp_path: Path, tasks: int) -> None:
    names = [f"task {n}" for n in range(tasks)]
    found = results(tasks=names, methods=("zero_shot",), protocols=("task-id",))
    reader = Reader(written(tmp_path, found, features=None))
    cells = [
        (attributes["class"] or "").split() for tag, attributes in reader.tags
        if tag == "td" and (attributes.get("class") or "").startswith("h")
    ]  # fmt: skip
    rows = [cells[start : start + tasks] for start in range(0, len(cells), tasks)]
    assert len(rows) == tasks
    for session, row in enumerate(rows):
        for task, classes in enumerate(row):
            last = session == tasks - 1
            assert ("unseen" in classes) == (task > session)
            assert ("step-right" in classes) == (task == session and not last)
            assert ("step-below" in classes) == (task == session + 1)


def test_published_rows_are_apart_from_measured_ones(tmp_path: Path) -> None:
    found = results(benchmark="mtil", tasks=ORDERS["I"], methods=("zero_shot", "condu"))
    page = written(tmp_path, found, features=None)
    bodies = page.split("<tbody")[1:]
    measured = [body for body in bodies if body.startswith(' class="measured"')]
    assert measured
    assert not any("DPeCLIP" in body for body in measured)
    apart = [body for body in bodies if "DPeCLIP" in body]
    assert len(apart) == 1  # beside the runs, so not again for context
    assert apart[0].startswith(' class="published"')
    assert "not measured here" in apart[0]
    assert "(voting code, rescale tensor_mean); the runs here have voting paper, " in page


def test_changes_of_a_voting_preset_are_said(tmp_path: Path) -> None:
    voting = {"preset": "code", "k": 1, "include_pretrained": False}
    found = results(benchmark="mtil", tasks=ORDERS["I"], methods=("condu",), voting=voting)
    page = written(tmp_path, found, features=None)
    assert "have voting code with k 1, include_pretrained False, rescale global" in page


@pytest.mark.parametrize(
    ("model", "another"),
    [
        ({"name": "ViT-B-16", "pretrained": "openai"}, None),
        ({"name": "ViT-B-16-quickgelu", "pretrained": "openai"}, None),
        ({"name": "ViT-B-16", "pretrained": "laion2b_s34b_b88k"}, "ViT-B-16 (laion2b_s34b_b88k)"),
        ({"name": "ViT-L-14", "pretrained": "openai"}, "ViT-L-14 (openai)"),
        ({"name": "mini", "pretrained": None}, "mini"),
    ],
)
def test_published_rows_beside_another_model_say_so(
    tmp_path: Path, model: dict[str, Any], another: str | None
) -> None:
    found = results(benchmark="mtil", tasks=ORDERS["I"], methods=("zero_shot",), model=model)
    texts = Reader(written(tmp_path, found, features=None)).texts
    (divider,) = (text for text in texts if "not measured here" in text)
    said = f"here; the runs above have {another}" if another else "here"
    assert divider.endswith(f"not measured {said}")


def test_what_differs_between_configurations_is_said(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "-".join(methods), results(methods=methods), features=None)
        for methods in (("zero_shot", "condu"), ("zero_shot",))
    ]
    write_page(folders, tmp_path / "report.html")
    texts = Reader((tmp_path / "report.html").read_text()).texts
    assert texts.count("zero_shot · A") > 0
    assert texts.count("zero_shot · B") > 0
    at = texts.index("methods", texts.index("what differs"))
    assert [text for text in texts[at : at + 5] if text.strip()][1:3] == [
        "zero_shot, condu",
        "zero_shot",
    ]


def test_of_other_benchmarks_published_numbers_are_context(tmp_path: Path) -> None:
    page = written(tmp_path, results(), features=None)
    summary, _, context = page.partition('id="published"')
    assert "DPeCLIP" not in summary
    assert "not comparable with the numbers above" in context
    assert "DPeCLIP" in context
    assert "the runs here have voting paper, rescale global" in context


def test_a_report_of_everything_stays_small(tmp_path: Path) -> None:
    """Eleven tasks, every method, every protocol, each method voting; the map comes on top, with
    less than 100 bytes an image or a class."""
    protocols = ("task-id", "agnostic", "union-odcl-cil", "union-x-tail")
    folders = []
    for seed in (1, 2):
        found = results(
            benchmark="mtil", tasks=ORDERS["I"], methods=ALL, protocols=protocols, seed=seed
        )
        for method in found["methods"].values():
            method["protocols"] = found["methods"]["condu"]["protocols"]
        folders.append(write_run(tmp_path / str(seed), found, features=None))
    write_page(folders, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 4_500_000


def test_what_is_no_page_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "there.html").mkdir()
    with pytest.raises(ReportError, match=r"there\.html is a folder"):
        write_page([tmp_path / "none"], tmp_path / "there.html")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ReportError, match=r"must end with \.html, got .*results\.json"):
        write_page([tmp_path / "none"], tmp_path / "results.json")
    assert (tmp_path / "results.json").read_text() == "{}"


def test_the_page_may_be_called_html_in_capitals(tmp_path: Path) -> None:
    write_page([write_run(tmp_path / "run", results(), features=None)], tmp_path / "PAGE.HTML")
    assert (tmp_path / "PAGE.HTML").stat().st_size > 0


def test_a_page_that_cannot_be_written_is_named_as_it_was_given(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", results(), features=None)
    path = tmp_path / ("x" * 250 + ".html")  # longer than a name may be, with what is added to it
    with pytest.raises(ReportError, match=r"-o: \S*/x{250}\.html cannot be written: File name too"):
        write_page([folder], path)


def test_a_run_has_a_name_where_its_folder_is_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_run(tmp_path / "seven-tasks", results(), features=None))
    write_page([Path()], tmp_path / "report.html")
    assert "seven-tasks" in Reader((tmp_path / "report.html").read_text()).texts


def test_after_an_error_the_old_page_is_there(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    folder = write_run(tmp_path / "run", results())
    (folder / "results.json").unlink()
    with pytest.raises(RunFolderError):
        write_page([folder], path)
    assert path.read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {"run", "report.html"}


def damage(file: Path, change: str) -> None:
    tensors = load_file(file)
    if change == "missing":
        del tensors["1.labels"]
    elif change == "dimension":
        tensors["1.features"] = tensors["1.features"][:, :5].contiguous()
    elif change == "classes":
        tensors["1.labels"] = torch.full_like(tensors["1.labels"], 3)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "no tensor '1.labels' for task 'tones'"),
        ("dimension", r"task 'tones' .* features \[20, 5\]"),
        ("classes", "task 'tones' has 3 classes, but a label 3"),
    ],
)
def test_features_that_do_not_fit_are_refused(tmp_path: Path, change: str, message: str) -> None:
    folder = write_run(tmp_path / "run", results())
    damage(folder / "features.safetensors", change)
    with pytest.raises(ValueError, match=message):
        write_page([folder], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", results())
    (folder / "features.safetensors").write_bytes(b"nothing")
    result = condu("report", folder, "-o", tmp_path / "report.html")
    assert result.exit_code == 2
    assert "run/features.safetensors: not a readable safetensors file" in result.stderr


def test_the_command_writes_the_page_and_compares_without_one(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(seed), results(seed=seed)) for seed in (1, 2)]
    result = condu("report", *folders, "-o", tmp_path / "new" / "report.html")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().endswith("report.html")
    assert (tmp_path / "new" / "report.html").exists()

    result = condu("report", *folders)
    assert result.exit_code == 0, result.output
    assert "mini, agnostic" in result.stdout
    assert "(seed 1)" in result.stdout
    assert not (folders[0] / "report").exists()


def test_of_one_run_the_summary_comes_first_and_then_the_rest(tmp_path: Path) -> None:
    protocols = ("task-id", "union-x-tail")
    folder = write_run(tmp_path / "run", results(methods=("pam", "condu"), protocols=protocols))
    result = condu("report", folder)
    assert result.exit_code == 0, result.output
    said = ["protocol task-id", "protocol union-x-tail", "misaligned", "condu, task-id (%)"]
    places = [result.stdout.index(words) for words in (*said, "summary.png")]
    assert places == sorted(places)


def test_pictures_are_there_before_anything_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(Console, "print", ends)  # as under `| head`
    folder = write_run(tmp_path / "run", results(methods=("condu",)))
    condu("report", folder)
    assert {file.name for file in (folder / "report").iterdir()} == {
        *("accuracy-condu-task-id.png", "accuracy-condu-agnostic.png", "summary.png")
    }


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_everything_can_be_read_and_told_apart(theme: Theme) -> None:
    colours = theme.properties
    for level, colour in enumerate(theme.heat):
        assert contrast(colour, colours[f"ink-{level}"]) >= 4.5
    for text in ("ink", "muted", "accent"):
        for ground in ("paper", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for drawn in theme.hues:
        assert contrast(drawn, colours["card"]) >= 3, drawn
    lightness = [contrast(colour, colours["card"]) for colour in theme.heat]
    assert lightness == sorted(lightness)  # a higher value stands out more from the card
