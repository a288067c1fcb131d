"""Published numbers, as data: constants to stand beside measured rows, never among them.

Accuracies in percent, as printed in the papers. `arxiv` says which paper a row is of, where that is
known; the protocols are named as those of a run (`condu.evaluation`).
"""

from __future__ import annotations

from dataclasses import dataclass

from condu.tasks.mtil import ORDERS


@dataclass(frozen=True)
class PublishedRow:
    """One method's line of a published table; None is a number that was not published."""

    method: str
    arxiv: str | None = None
    transfer: float | None = None
    average: float | None = None
    last: float | None = None
    acc: float | None = None
    bwt: float | None = None


@dataclass(frozen=True)
class PublishedTable:
    """Rows that were measured alike.

    `benchmark`, `protocol`, `shots` (None: all training images) and `order` are what a run has to
    agree in to stand beside these rows; where its `model` is another one, that has to be said.
    """

    title: str
    benchmark: str
    protocol: str
    model: str
    rows: tuple[PublishedRow, ...]
    order: str | None = None
    shots: int | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that any of the rows has."""
        names = ("transfer", "average", "last", "acc", "bwt")
        return tuple(n for n in names if any(getattr(row, n) is not None for row in self.rows))


CONDU, PAM = "2503.10705", "2506.03189"
CLIP = "CLIP ViT-B/16"
CONFIGURED = {CLIP: ("ViT-B-16", "openai")}
"""What `model.name` begins with in a run of a model, and what its `model.pretrained` is."""

ZERO_SHOT = dict(
    zip(
        ORDERS["I"],
        (24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2),
        strict=True,
    )
)
"""Accuracy of the pretrained CLIP ViT-B/16 on each data set of MTIL."""

MTIL = PublishedTable(
    title="MTIL, Order I",
    benchmark="mtil",
    protocol="task-id",
    model=CLIP,
    order="I",
    rows=(
        PublishedRow("Zero-shot", transfer=69.4, average=65.3, last=65.3),
        PublishedRow("Individual fine-tuning", last=89.2),
        PublishedRow("Continual fine-tuning", transfer=44.6, average=55.9, last=77.3),
        PublishedRow("LwF", transfer=56.9, average=64.7, last=74.6),
        PublishedRow("iCaRL", transfer=50.4, average=65.7, last=80.1),
        PublishedRow("LwF-VR", transfer=57.2, average=65.1, last=76.6),
        PublishedRow("WiSE-FT", transfer=52.3, average=60.7, last=77.7),
        PublishedRow("ZSCL", "2303.06628", transfer=68.1, average=75.4, last=83.6),
        PublishedRow("MoE-Adapters", transfer=68.9, average=76.7, last=85.0),
        PublishedRow("DIKI", transfer=68.7, average=76.3, last=85.1),
        PublishedRow("Dual-RAIL", transfer=69.4, average=77.8, last=86.8),
        PublishedRow("DPeCLIP", "2408.09984", transfer=69.1, average=77.5, last=86.9),
        PublishedRow("MulKI", "2411.06764", transfer=70.1, average=77.3, last=85.1),
        PublishedRow("ConDU (LoRA)", CONDU, transfer=70.3, average=78.3, last=86.2),
        PublishedRow("ConDU (FT)", CONDU, transfer=70.8, average=78.8, last=87.1),
    ),
)

MTIL_AGNOSTIC = PublishedTable(
    title="MTIL, Order I, expert unknown",
    benchmark="mtil",
    protocol="agnostic",
    model=CLIP,
    order="I",
    rows=(
        PublishedRow("ConDU (LoRA)", CONDU, average=78.0, last=85.1),
        PublishedRow("ConDU (FT)", CONDU, average=78.1, last=86.4),
    ),
)

MTIL_FIVE_SHOT = PublishedTable(
    title="MTIL, Order I, 5-shot",
    benchmark="mtil",
    protocol="task-id",
    model=CLIP,
    order="I",
    shots=5,
    rows=(
        PublishedRow("ConDU (LoRA)", CONDU, transfer=70.3, average=72.7, last=77.4),
        PublishedRow("ConDU (FT)", CONDU, transfer=70.0, average=72.3, last=76.6),
    ),
)

COIN = PublishedTable(
    title="CoIN",
    benchmark="coin",
    protocol="agnostic",
    model="PaliGemma",
    rows=(
        PublishedRow("Fine-tuning", PAM, acc=43.4, bwt=-39.5),
        PublishedRow("TIES after training", PAM, acc=47.8, bwt=-22.9),
        PublishedRow("PAM", PAM, acc=49.9, bwt=-19.5),
        PublishedRow("PAM + TALL masks", PAM, acc=52.0, bwt=-9.3),
        PublishedRow("Independent LoRAs", PAM, acc=76.5),
    ),
)

TABLES = (MTIL, MTIL_AGNOSTIC, MTIL_FIVE_SHOT, COIN)
