"""Continual-learning methods, one file each. Importing this package registers them by name."""

from condu.methods import (
    condu,
    dpeclip_id,
    emr,
    individual,
    lwf,
    pam,
    rail_dual,
    rail_primal,
    sequential,
    task_arithmetic,
    wise_ft,
    zero_shot,
    zscl,
)
from condu.methods.base import METHODS, Method, register
from condu.record import Learned

ALL = (
    *("zero_shot", "individual"),
    *("sequential", "wise_ft", "lwf", "zscl", "rail_primal", "rail_dual"),
    *("condu", "dpeclip_id", "emr", "task_arithmetic"),
    *("individual_lora", "condu_lora", "sequential_lora", "lora_average", "pam"),
)
"""The methods of this package in the order of a table: lower and upper line, one model or adapter
for all tasks, fusion of all weights, fusion of adapters."""

__all__ = [
    "ALL",
    "METHODS",
    "Learned",
    "Method",
    "condu",
    "dpeclip_id",
    "emr",
    "individual",
    "lwf",
    "pam",
    "rail_dual",
    "rail_primal",
    "register",
    "sequential",
    "task_arithmetic",
    "wise_ft",
    "zero_shot",
    "zscl",
]
