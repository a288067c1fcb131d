"""MTIL: eleven image classification data sets, 1201 classes, learnt one after the other.

The benchmark of ZSCL (arXiv 2303.06628). Images are on disk, below one root folder, as
torchvision's readers expect them. What is imported here needs no torchvision; the tasks are in
`condu.tasks.mtil.tasks`.
"""

from __future__ import annotations

from condu.tasks.mtil.sources import ORDERS, SOURCES

__all__ = ["ORDERS", "SOURCES"]
