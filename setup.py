"""Builds ``condu_ext._C``: CPU kernels always, CUDA kernels when nvcc is found.

The kernels have a plain C interface, so neither torch nor a GPU is needed to build them, and one
binary serves every torch version. Objects are compiled by ninja, in parallel and only when they
changed.

Environment: ``CONDU_CUDA=0|1`` forbids or requires the CUDA side (default: by finding nvcc),
``CONDU_CUDA_ARCHS="80;90"`` overrides the architectures, ``CUDA_HOME`` names the toolkit. Without a
toolkit, nvcc from its PyPI wheels (``nvidia-cuda-nvcc``, ``nvidia-cuda-cccl``) is found as well.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
X86 = platform.machine().lower() in ("x86_64", "amd64")

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # results are equal bit for bit on every instruction set: no FMA
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror=return-type",
    f'-DCONDU_VERSION=\\"{VERSION}\\"',
]
# One file per instruction set, each with its own flags; other architectures build the baseline.
ISA_FLAGS = {
    "isa_avx2": ["-mavx2", "-mf16c"],
    # gcc 12 warns about its own _mm512_undefined_ps
    "isa_avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi"),
        *("-mgfni", "-mf16c"),
        "-Wno-maybe-uninitialized",
    ],
}
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")


def cuda_toolkit() -> Path | None:
    """Root of the CUDA toolkit, or None. nvcc on PATH may be a wrapper, so nvcc itself is asked."""
    wanted = os.environ.get("CONDU_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"CONDU_CUDA must be 0 or 1, not {wanted!r}")
    if wanted == "0":
        return None
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr + dry.stdout, re.M)
        roots += [Path(top.group(1).strip()).resolve()] if top else []
    # The PyPI wheels share one folder a major version, laid out as a toolkit. Where packages are
    # installed is asked of sysconfig: under build isolation sys.path does not list them.
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    roots += sorted(wheels.glob("cu[0-9]*"), reverse=True)
    for root in roots:
        if (root / "include" / "cuda_runtime.h").is_file() and (root / "bin" / "nvcc").is_file():
            return root
    if wanted == "1":
        raise SystemExit(
            "CONDU_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME, or install the packages "
            "nvidia-cuda-nvcc and nvidia-cuda-cccl"
        )
    return None


def cuda_archs(nvcc: Path) -> list[str]:
    """Architectures to compile: CONDU_CUDA_ARCHS, or our list as far as this nvcc knows it."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"compute_(\d+)", listed.stdout))
    chosen = re.findall(r"\d+[a-z]?", os.environ.get("CONDU_CUDA_ARCHS", ""))
    if unknown := [arch for arch in chosen if arch.rstrip("af") not in known]:
        raise SystemExit(f"CONDU_CUDA_ARCHS: {nvcc} does not know {', '.join(unknown)}")
    return chosen or [arch for arch in CUDA_ARCHS if arch in known]


class BuildKernels(build_ext):
    """Writes one build.ninja for all objects and the shared library, and runs it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not build_temp, which pip removes: what was compiled is compiled once, and the tests read
        # what the CUDA compiler said of it.
        work = ROOT / "build" / f"kernels-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(self.ninja_file(target))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", work, "-j", jobs], check=True)

    def ninja_file(self, target: Path) -> str:
        compiler = os.environ.get("CXX", "g++")
        includes = [
            f"-I{CSRC}",
            f"-isystem {pybind11.get_include()}",
            f"-isystem {sysconfig.get_paths()['include']}",
        ]
        flags, link = [*CXX_FLAGS, *includes], ["-shared", "-fopenmp", "-Wl,--exclude-libs,ALL"]
        rules, objects, builds = [], [], []

        toolkit = cuda_toolkit()
        if toolkit:
            nvcc = toolkit / "bin" / "nvcc"
            archs = cuda_archs(nvcc)
            print(f"condu: CPU and CUDA kernels ({toolkit}, sm_{' sm_'.join(archs)})")
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            flags.append(f'-DCONDU_CUDA_ARCHS=\\"{",".join(archs)}\\"')
            library = next(d for d in ("lib64", "lib") if (toolkit / d).is_dir())
            # Static runtime: the module loads on machines without driver or GPU.
            link += [f"-L{toolkit / library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            nvcc_flags = [
                "-std=c++17 -O3 --fmad=false -lineinfo -Xptxas -v --threads 2",
                f"-I{CSRC} -ccbin {compiler} -Xcompiler -fPIC,-fvisibility=hidden",
                *codes,
            ]
            rules.append(
                f"rule nvcc\n  command = {nvcc} {' '.join(nvcc_flags)} "
                "-MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)\n"
                "  depfile = $out.d\n  deps = gcc\n"
            )
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                objects.append(f"cuda_{source.stem}.o")
                builds.append(f"build {objects[-1]}: nvcc {source}\n")
        else:
            print("condu: CPU kernels only (no CUDA toolkit found, or CONDU_CUDA=0)")

        for source in sorted([*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]):
            isa = ISA_FLAGS.get(source.stem, [])
            if (isa and not X86) or (source.stem == "bindings_cuda" and not toolkit):
                continue
            objects.append(f"{source.stem}.o")
            builds.append(f"build {objects[-1]}: cxx {source}\n  isa = {' '.join(isa)}\n")
        rules.append(
            f"rule cxx\n  command = {compiler} {' '.join(flags)} $isa "
            "-MD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n"
        )
        rules.append(f"rule link\n  command = {compiler} $in {' '.join(link)} -o $out\n")
        builds.append(f"build {target}: link {' '.join(objects)}\n")
        return "\n".join([*rules, *builds])


setup(
    ext_modules=[Extension("condu_ext._C", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)
