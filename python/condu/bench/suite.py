"""Runs cases one after another: does it fit, is it right, how long does it take."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from condu.bench.baselines import BASELINES, Baseline
from condu.bench.cases import Case
from condu.bench.ceiling import Copy
from condu.bench.check import WrongBaseline, WrongResult, different_elements
from condu.bench.inputs import POOL, Inputs
from condu.bench.measure import Times, paired, repeated, timed
from condu.bench.memory import available_memory, peak_memory
from condu.bench.operation import Operation, operation_of

MEASURED, NO_MEMORY, FAILED, WRONG = "measured", "out of memory", "failed", "wrong result"
RESERVE = 0.05
"""Share of the memory that is left to the rest of the system."""


@dataclass
class BaselineResult:
    """A baseline on one case.

    Attributes:
        status: measured, out of memory, or failed, which includes a result that is not the
            kernel's.
        reason: for the latter two, in one line.
        different: elements in which its result is not the kernel's.
    """

    status: str
    reason: str = ""
    seconds: Times | None = None
    peak_extra_bytes: int | None = None
    different: int | None = None


@dataclass
class CaseResult:
    """A case: the kernel, the copy beside it, and the baselines.

    Attributes:
        status: measured, out of memory, or wrong result.
        reason: for the latter two, in one line.
        ratio: median of the paired ratios of the kernel's rate to the copy's.
        needed_bytes: estimate of the memory that inputs and results take together.
        checked: elements that were compared with the reference, bit for bit.
        peak_extra_bytes: what the call takes above its inputs: its result, for the most part.
    """

    case: Case
    status: str
    needed_bytes: int
    reason: str = ""
    seconds: Times | None = None
    copy_seconds: Times | None = None
    ratio: float | None = None
    peak_extra_bytes: int | None = None
    checked: int | None = None
    baselines: dict[str, BaselineResult] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How a suite is run.

    Attributes:
        baselines: keys of :data:`condu.bench.baselines.BASELINES`.
        repeats: timed calls of the kernel and of each baseline.
        patience: seconds after which a baseline is not called again: one that takes longer has one
            timed call.
        memory: bytes that may be used in all; default what the device has left at the start.
        copy_bytes: see :class:`Copy`.
    """

    device: torch.device
    baselines: tuple[str, ...] = tuple(BASELINES)
    repeats: int = 9
    patience: float = 5.0
    memory: int | None = None
    copy_bytes: int | None = None


class Suite:
    """Measures cases; neighbours of one model and precision share their inputs."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self.settings, self.say = settings, say
        device = settings.device
        found = available_memory(device)
        self.copy = Copy(device, settings.copy_bytes, memory=found)
        own = 2 * self.copy.source.nbytes + 4 * POOL
        memory = found if settings.memory is None else settings.memory
        self.memory = int((1 - RESERVE) * memory) - own
        self._inputs: Inputs | None = None
        self._shared: dict[tuple[Any, ...], dict[str, BaselineResult]] = {}

    def run(self, cases: Sequence[Case]) -> Iterator[CaseResult]:
        """Measure case by case, saying how far it is."""
        for k, case in enumerate(cases, 1):
            yield self.measure(case, f"[{k}/{len(cases)}] ")

    def measure(self, case: Case, number: str = "") -> CaseResult:
        """Measure one case; what does not fit into memory or is not what the reference computes is
        a result too, without a time."""
        needed = case.resident_bytes
        if needed > self.memory:
            reason = f"needs {_gib(needed)}, there are {_gib(self.memory)}"
            self.say(f"{number}{case}: out of memory: {reason}")
            return CaseResult(case, NO_MEMORY, needed, reason)
        try:
            result = self._measure(case, needed)
        except WrongResult as error:
            self._inputs = None  # a broken kernel may have written anywhere
            self.say(f"{number}{case}: wrong result: {_line(error)}")
            return CaseResult(case, WRONG, needed, _line(error))
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            self._inputs = None
            self.say(f"{number}{case}: out of memory")
            return CaseResult(case, NO_MEMORY, needed, _line(error))
        assert result.seconds is not None
        assert result.ratio is not None
        self.say(
            f"{number}{case}: {1e3 * result.seconds.median:.4g} ms, "
            f"{100 * result.ratio:.0f} % of the copy"
        )
        return result

    def operation(self, case: Case) -> Operation:
        """The calls of a case, on inputs that the next other case overwrites."""
        return operation_of(case, self._inputs_of(case))

    def _measure(self, case: Case, needed: int) -> CaseResult:
        device = self.settings.device
        operation = self.operation(case)
        argument = operation.prepare()
        with peak_memory(device) as peak:
            result = operation.run(argument)
        checked = operation.check(result)
        baselines = self._baselines(case, operation, result)
        del argument, result
        pairs = paired(
            operation.prepare,
            operation.run,
            case.floor_bytes,
            self.copy,
            device,
            self.settings.repeats,
        )
        return CaseResult(
            case,
            MEASURED,
            needed,
            seconds=pairs.kernel,
            copy_seconds=pairs.copy,
            ratio=pairs.ratio,
            peak_extra_bytes=peak.extra,
            checked=checked,
            baselines=baselines,
        )

    def _inputs_of(self, case: Case) -> Inputs:
        kept = self._inputs
        if kept is None or (kept.shapes, kept.precision) != (case.shapes, case.dtypes):
            self._inputs = None  # before the new ones are made
            del kept
            gc.collect()
            self._inputs = Inputs(case.shapes, case.dtypes, self.settings.device)
        assert self._inputs is not None
        return self._inputs

    def _baselines(
        self, case: Case, operation: Operation, result: Any
    ) -> dict[str, BaselineResult]:
        """The baselines' results; all kinds of absorb share theirs."""
        kind = "absorb" if case.operation.startswith("absorb") else case.operation
        key = (kind, case.model, case.tasks, case.precision)
        if key not in self._shared:
            self._shared[key] = {
                name: self._baseline(name, case, operation, result)
                for name in self.settings.baselines
            }
        return self._shared[key]

    def _baseline(self, name: str, case: Case, operation: Operation, result: Any) -> BaselineResult:
        baseline = BASELINES[name]
        needed = case.resident_bytes + baseline.extra_bytes(case, self.settings.device)
        if needed > self.memory:
            reason = f"needs about {_gib(needed)}, there are {_gib(self.memory)}"
            self.say(f"    {name}: out of memory: {reason}")
            return BaselineResult(NO_MEMORY, reason)
        try:
            found = self._time_baseline(baseline, case, operation, result)
        except WrongBaseline as error:
            self.say(f"    {name}: {FAILED}: {_line(error)}")
            return BaselineResult(FAILED, _line(error), different=error.different)
        except Exception as error:  # what a compiler may raise has no common class
            status = NO_MEMORY if _is_out_of_memory(error) else FAILED
            self.say(f"    {name}: {status}: {_line(error)}")
            return BaselineResult(status, _line(error))
        assert found.seconds is not None
        self.say(f"    {name}: {1e3 * found.seconds.median:.4g} ms")
        return found

    def _time_baseline(
        self, baseline: Baseline, case: Case, operation: Operation, result: Any
    ) -> BaselineResult:
        device, patience = self.settings.device, self.settings.patience
        baseline.reset()
        call = operation.baseline(baseline)
        if baseline.compiles:
            call()
        with peak_memory(device) as peak:
            first, theirs = timed(call, device)
        if not isinstance(theirs, dict):  # a state, not an expert
            theirs = baseline.named(theirs)
        base = self._inputs_of(case).pretrained if baseline.compiles else None
        different = different_elements(result, theirs, str(case), base)
        del theirs
        seconds = [first]
        if first < patience:
            repeats = self.settings.repeats
            seconds = repeated(lambda: None, lambda _: call(), device, repeats, patience)
        return BaselineResult(
            MEASURED,
            seconds=Times.of(seconds),
            peak_extra_bytes=peak.extra,
            different=different,
        )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error)  # torch's CPU allocator raises a RuntimeError
    )


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
