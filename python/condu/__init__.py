"""condu: continual learning of vision-language models by fusing fine-tuned models.

The tensor level is :mod:`condu_ext`; this package adds the objects round a live model (`ConDU`,
`AlignedMerging`), semantic voting, the trainer, the benchmarks and the command line.
"""

from __future__ import annotations

from condu.fusion import ConDU
from condu.metrics import Summary, summarize
from condu.pam import AlignedMerging
from condu.prototypes import PrototypeSet
from condu.voting import SemanticVoting
from condu_ext import __version__

__all__ = [
    "AlignedMerging",
    "ConDU",
    "PrototypeSet",
    "SemanticVoting",
    "Summary",
    "__version__",
    "summarize",
]
