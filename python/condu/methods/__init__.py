"""Continual-learning methods, one file each. Importing this package registers them by name."""

from condu.methods import (
    condu,
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
from condu.methods.base import METHODS, Learned, Method, register

__all__ = [
    "METHODS",
    "Learned",
    "Method",
    "condu",
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
