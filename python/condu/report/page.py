"""One HTML page about finished runs, in one file that needs no network.

Everything that comes from a run is escaped (`condu.report.markup`), and the page allows its own
style and script by their hashes and nothing else. The same runs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup, escape

from condu.report import captions
from condu.report.comparing import published_elsewhere
from condu.report.datasets import data_sets, resolution
from condu.report.embedding import feature_map
from condu.report.experiment import METRICS, Experiment
from condu.report.figures import (
    cost_panels,
    fusion_parts,
    misalignment_panel,
    protocol_parts,
)
from condu.report.gathering import ReportError, differences, gather
from condu.report.heatmaps import LEVELS
from condu.report.markup import digest, environment, source_of
from condu.report.palette import DARK, LIGHT
from condu.report.panels import WIDTH
from condu.report.scatter import Scatter, scatter
from condu.report.taskmarks import HUES, task_marks
from condu.runfolder import write_text


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page about the runs in `folders` as one step.

    Raises `ReportError` for a `path` that is a folder or no .html, before anything is read, and
    what `gather` and `feature_map` raise; then nothing was written.
    """
    if path.is_dir():
        raise ReportError(f"-o: {path} is a folder, it takes a file to write, such as report.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ReportError(f"-o: the page is HTML, its name must end with .html, got {path}")
    text = page(gather(folders))
    try:
        write_text(path, text)
    except OSError as error:  # which would name the file beside it that is written first
        raise ReportError(f"-o: {path} cannot be written: {error.strerror}") from error


def page(experiments: Sequence[Experiment]) -> str:
    """The page about these experiments."""
    templates = environment()
    style = templates.get_template("style.css.j2").render(
        light=LIGHT, dark=DARK, levels=LEVELS, hues=HUES
    )
    script = source_of(templates, "script.js")
    first = experiments[0]
    tasks = first.tasks
    parts = protocol_parts(experiments)
    return templates.get_template("report.html.j2").render(
        style=Markup(style),
        style_hash=digest(style),
        script=Markup(script),
        script_hash=digest(script),
        benchmark=first.first["benchmark"],
        tasks=tasks,
        data_sets=data_sets(experiments),
        resolution=resolution(experiments),
        lead=captions.lead(tasks),
        at_a_glance=captions.at_a_glance(experiments),
        experiments=experiments,
        several_seeds=any(len(experiment.runs) > 1 for experiment in experiments),
        varying=captions.varying(differences(experiments)),
        parts=parts,
        metrics=METRICS,
        explanations=captions.PROTOCOLS,
        map=_map(experiments),
        fusion=fusion_parts(experiments),
        costs=cost_panels(experiments),
        misalignment=misalignment_panel(experiments),
        elsewhere=published_elsewhere(experiments),
        published_note=captions.published_note(experiments),
        configurations=[escape(captions.configuration(each)) for each in experiments],
        marks=task_marks(tasks),
        width=WIDTH,
    )


def _map(experiments: Sequence[Experiment]) -> Scatter | None:
    """The map of the first run that kept features; None where none did."""
    for run in (run for experiment in experiments for run in experiment.runs):
        classes = run.results["classes"]
        layout = feature_map(run.folder, classes)
        if layout is not None:
            return scatter(layout, classes, run.seed)
    return None
