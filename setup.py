"""The native extension (csrc/): what is built, and how. All other metadata is in pyproject.toml.

AAPO_FAST_NATIVE says what to build:

    auto   (default) the CPU kernels where a compiler and torch are found; elsewhere one line says why not, and the
           installation goes on without them
    cpu    the CPU kernels, or an error
    cuda   an error: on a GPU the row kernels are Triton's
    off    nothing

CXX names another compiler; CXXFLAGS and LDFLAGS are added. Objects stay in build/native and are compiled again only
when sources, compiler or flags change. The library uses PyTorch's stable ABI and no Python API, so one build serves
every Python and every torch from 2.10 on, and torch's headers may be any environment's.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
OBJECTS = ROOT / "build" / "native"
NOTE = "_native.txt"
"""Stands beside the modules where there is no library, and says why: ``aapo-fast doctor`` shows it."""

TORCH_AT_LEAST = (2, 10)
TARGET = f"0x{TORCH_AT_LEAST[0]:02x}{TORCH_AT_LEAST[1]:02x}000000000000"

# Without -ffp-contract=off a logit could be rounded in one sweep and not in the other: see csrc/vector.h.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi"]
LEVELS = {"plain": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]

WISH = os.environ.get("AAPO_FAST_NATIVE", "auto")


class NotBuiltError(Exception):
    """Why there is no native extension, and the remedy, in one line."""


def compiler() -> list[str]:
    """The C++ compiler's command."""
    named = os.environ.get("CXX")
    for command in [named.split()] if named else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise NotBuiltError(f"no C++ compiler ({named or 'g++'}) in PATH; install one (apt-get install g++)")


def find_torch() -> Path:
    """The folder of an installed torch, for its headers.

    An isolated build does not see the environment it builds for, though it runs that environment's Python.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    places += sorted(Path(os.environ.get("VIRTUAL_ENV", "/nowhere")).glob("lib/python3*/site-packages/torch"))
    found = []
    for folder in places:
        header = folder / "include" / "torch" / "headeronly" / "version.h"
        if not header.is_file():
            continue
        numbers = dict(re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR) (\d+)", header.read_text()))
        version = (int(numbers["MAJOR"]), int(numbers["MINOR"]))
        if version >= TORCH_AT_LEAST:
            return folder
        found.append("{}.{}".format(*version))
    instead = f"only torch {found[0]} was found" if found else "torch was not found"
    raise NotBuiltError(
        f"{instead}, and its headers (of 2.10 or newer) are needed to build; install torch first and then aapo-fast, "
        "with pip's --no-build-isolation and --no-cache-dir"
    )


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise NotBuiltError(f"{command[0]} failed: {first.strip()}; update the compiler, or name another with CXX")


def compile_object(name: str, command: list[str]) -> Path:
    """An object file, made by ``command`` unless it is newer than every source and was made by the same command."""
    path, made_by = OBJECTS / f"{name}.o", OBJECTS / f"{name}.command"
    newest = max(source.stat().st_mtime for source in SOURCES.glob("*.*"))
    fresh = path.exists() and path.stat().st_mtime > newest and made_by.exists()
    if not fresh or made_by.read_text() != " ".join(command):
        made_by.unlink(missing_ok=True)
        run([*command, "-o", str(path)])
        made_by.write_text(" ".join(command))
    return path


def build_library() -> Path:
    """The library in build/native."""
    if os.name != "posix":
        raise NotBuiltError(f"the native extension is not built on {platform.system()}")
    cxx, torch = compiler(), find_torch()
    base = [*cxx, *FLAGS, *os.environ.get("CXXFLAGS", "").split()]
    jobs = {
        f"kernels_{level}": [*base, *flags, f"-DAAPO_LEVEL={level}", "-c", "kernels.cpp"]
        for level, flags in LEVELS.items()
    }
    jobs |= {name: [*base, "-c", f"{name}.cpp"] for name in ("levels", "entries")}
    headers = ["-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={TARGET}"]
    jobs["operators"] = [*base, *headers, "-c", "operators.cpp"]
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compile_object, jobs, jobs.values())]
    library = OBJECTS / "library.so"
    flags = [f"-L{torch / 'lib'}", "-ltorch_cpu", *os.environ.get("LDFLAGS", "").split()]
    run([*cxx, "-shared", *objects, *flags, "-o", str(library)])
    return library


class BuildNative(build_ext):
    """Builds the library, or leaves a note that says why not."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_built(target.parent)
        try:
            if WISH == "off":
                raise NotBuiltError("switched off by AAPO_FAST_NATIVE=off when aapo-fast was installed")
            self.copy_file(str(build_library()), str(target))
        except NotBuiltError as reason:
            if WISH == "cpu":
                raise SystemExit(f"error: AAPO_FAST_NATIVE=cpu cannot be met: {reason}") from None
            target.with_name(NOTE).write_text(f"{reason}\n")
            print(f"aapo-fast: no native CPU kernels, everything works without them: {reason}", file=sys.stderr)

    def get_output_mapping(self) -> dict[str, str]:
        """For editable installations: what was built, and where it goes among the sources."""
        built = (Path(self.build_lib) / "aapo_fast" / "ops").glob("_native*")
        return {str(path): str(ROOT / "aapo_fast" / "ops" / path.name) for path in built}

    def copy_extensions_to_source(self) -> None:
        remove_built(ROOT / "aapo_fast" / "ops")
        for built, source in self.get_output_mapping().items():
            self.copy_file(built, source)


def remove_built(folder: Path) -> None:
    """An older build must not outlive the wish for another."""
    for path in [*folder.glob("_native*.so"), folder / NOTE]:
        path.unlink(missing_ok=True)


class Wheel(bdist_wheel):
    """A wheel for one platform and every Python; for all platforms where nothing native was wished for."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = WISH == "off"


def main() -> None:
    if WISH == "cuda":
        raise SystemExit(
            "error: AAPO_FAST_NATIVE=cuda cannot be met: there are no CUDA kernels, because on a GPU the row kernels "
            "are Triton's and need no building (pip install triton); use AAPO_FAST_NATIVE=auto, cpu or off"
        )
    if WISH not in ("auto", "cpu", "off"):
        raise SystemExit(f"error: AAPO_FAST_NATIVE={WISH!r} is unknown; use auto, cpu, cuda or off")
    # Free-threaded Pythons have no limited API; the library does not care, but the names of wheels do.
    limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
    setup(
        ext_modules=[Extension("aapo_fast.ops._native", ["csrc/operators.cpp"], py_limited_api=limited, optional=True)],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {},
    )


if __name__ == "__main__":
    main()
