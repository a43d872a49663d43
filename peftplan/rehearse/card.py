"""The emulated card: `card.c`, compiled once for the CUDA build of torch that is installed, and kept in the cache.

The library answers every function of CUDA that torch and bitsandbytes import: those that `card.c` defines with a meaning, all
others with success; and those of NVML that pynvml knows: others are not supported. Three files result: one is loaded before the
program (`LD_PRELOAD`), triton opens the second (`libcuda.so.1`), monitors open the third (`libnvidia-ml.so.1`).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from peftplan.errors import MissingExtraError, RefusedError

SOURCE = Path(__file__).with_name("card.c")
NOT_SUPPORTED = 3
"""NVML's code for what a card does not tell."""
NAMES = re.compile(r"^(cu[A-Z]|cuda|__cuda|cublas|cusolver|cusparse|nccl[A-Z])")
OPENED_BY_TRITON = [
    "cuCtxGetDevice",
    "cuCtxGetLimit",
    "cuCtxSetCurrent",
    "cuCtxSetLimit",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuFuncSetAttribute",
    "cuFuncSetCacheConfig",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveClusters",
    "cuPointerGetAttribute",
    "cuTensorMapEncodeTiled",
]
"""Functions that triton looks up when it runs, and that no library imports."""
OLDEST = (2, 8)
"""The oldest torch that rehearses. Tried: 2.8 to 2.15, and 2.4, which fails: its memory history tells less."""
OPENED = ("libnvidia-ml.so.1", "libcuda.so.1")
"""Libraries that programs open by these names."""


def library() -> Path:
    """The folder that holds the card's libraries for the installed torch; compiled where it is not there yet.

    Raises RefusedError for another platform, a CPU build or an old release of torch, or a missing compiler, MissingExtraError
    without torch.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise RefusedError(
            f"rehearse runs on Linux on x86-64 only (this is {sys.platform} on {platform.machine()}); "
            "elsewhere in a container: docs/rehearse.md shows the command"
        )
    packages = _packages()
    version, _ = torch_version()
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RefusedError(
            f"rehearse needs torch {oldest} or newer (this is {version}): torch._C._cuda_memorySnapshot takes no arguments yet"
        )
    libraries = [*packages.glob("torch/lib/*.so"), *packages.glob("bitsandbytes/libbitsandbytes_cuda1[23]*.so")]
    spec = find_spec("pynvml")
    pynvml = [Path(spec.origin)] if spec is not None and spec.origin is not None else []
    folder = _cache() / _key([*libraries, *pynvml])
    if not (folder / OPENED[-1]).exists():  # moved there last
        _compile(packages, libraries, pynvml, folder)
    return folder


def torch_version() -> tuple[str, str | None]:
    """The installed torch's version and its CUDA's, None for a CPU build, without importing it."""
    text = (_packages() / "torch" / "version.py").read_text(encoding="utf-8")
    constants = dict(re.findall(r"^(\w+)(?:: [^=]+)? = '([^']+)'", text, re.MULTILINE))
    return constants["__version__"], constants.get("cuda")


def _packages() -> Path:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise MissingExtraError("rehearse (torch)", "rehearse")
    return Path(spec.origin).parent.parent


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftplan" / "card"


def _key(libraries: Iterable[Path]) -> str:
    """Changes with the source, with torch and with each library whose functions are answered."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    for path in sorted(libraries):
        stat = path.stat()
        digest.update(f"{path}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _compile(packages: Path, libraries: list[Path], pynvml: list[Path], folder: Path) -> None:
    version, cuda = torch_version()
    if cuda is None:
        raise RefusedError(
            f"torch {version} is built without CUDA; rehearse needs the CUDA build of torch (no driver, no GPU): "
            f"pip install 'torch=={version.partition('+')[0]}' from an index that has it"
        )
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    lister = shutil.which("nm")
    if compiler is None or lister is None:
        raise RefusedError("rehearse compiles its card once and needs a C compiler and nm: install gcc and binutils")
    headers = [next(iter(sorted(packages.glob(pattern))), None) for pattern in HEADERS]
    if None in headers:
        raise RefusedError(
            f"rehearse needs the headers of CUDA {cuda}, which belong to torch's own packages and are not installed"
        )
    include = [f"-I{path.parent}" for path in headers if path is not None]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        work = Path(scratch)
        imported = _symbols(lister, libraries, "--undefined-only") | set(OPENED_BY_TRITON)
        _cc(compiler, include, [SOURCE], work / "some.so")
        answered = _symbols(lister, [work / "some.so"], "--defined-only")
        others = sorted(name for name in imported - answered if NAMES.match(name))
        rest = work / "rest.c"
        monitored = {name for path in pynvml for name in re.findall(r'"(nvml[A-Z]\w+)"', path.read_text(encoding="utf-8"))}
        codes = {**dict.fromkeys(others, 0), **dict.fromkeys(sorted(monitored - answered), NOT_SUPPORTED)}
        rest.write_text("".join(f"int {name}() {{ return {code}; }}\n" for name, code in codes.items()), encoding="utf-8")
        _cc(compiler, include, [SOURCE, rest], work / "card.so")
        for name in OPENED:
            _cc(compiler, include, [SOURCE, rest, f"-Wl,-soname,{name}"], work / name)
        folder.mkdir(exist_ok=True)
        for name in ("card.so", *OPENED):
            os.replace(work / name, folder / name)


HEADERS = ("nvidia/**/include/cuda_runtime_api.h", "triton/backends/nvidia/include/cuda.h")


def _cc(compiler: str, include: list[str], parts: list[Path | str], output: Path) -> None:
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", *include, *map(str, parts), "-lpthread", "-o", str(output)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        reason = next((line for line in process.stderr.splitlines() if "error" in line), process.stderr.strip())
        raise RefusedError(f"the emulated card does not compile with torch {torch_version()[0]}: {reason[:300]}")


def _symbols(lister: str, libraries: Iterable[Path], which: str) -> set[str]:
    process = subprocess.run([lister, "-D", which, *map(str, libraries)], capture_output=True, text=True, check=False)
    return {line.split()[-1].partition("@")[0] for line in process.stdout.splitlines() if line.strip()}
