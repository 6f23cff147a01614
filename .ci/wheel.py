"""Build the wheel with CUDA kernels for every GPU that they run on, and say how large each part is.

Run by `make wheel`, on a machine with nvcc, g++ and 8 GB of disk; it needs no GPU. torch is
installed into an environment that is deleted at the end. The wheel lies in dist/, and installing it
needs no compiler.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / ".ci" / "requirements-wheel.txt"
OUT = ROOT / "dist"

# Of device code in a library, nvcc's "fat binaries": one header and an entry for each architecture.
FATBIN = struct.Struct("<IHHQ")  # magic, version, bytes of the header, bytes of the entries
ENTRY = struct.Struct("<HHIQ")  # kind, flags, bytes of the header, bytes of the code
FATBIN_MAGIC = 0xBA55ED50
ARCHITECTURE_AT = 28  # in the header of an entry
PTX = 1

# What ptxas -v says of a kernel after its name: each of them is the largest number that counts.
SAID = {
    "spilled bytes": re.compile(r"(\d+) bytes spill stores"),
    "registers": re.compile(r"Used (\d+) registers"),
    "shared bytes": re.compile(r"(\d+) bytes smem"),
}


def main() -> int:
    """Build the wheel and print what is in it."""
    home = toolkit()
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vllm-qoq-wheel-") as folder:
        log = build(Path(folder), home)
        (wheel,) = Path(folder, "dist").glob("*.whl")
        print(table(wheel, log))
        copy = Path(shutil.copy(wheel, OUT))
    print(f"wheel: {copy.relative_to(ROOT)}, {megabytes(copy.stat().st_size)}")
    return 0


def toolkit() -> Path:
    """The folder of CUDA; ends with a message unless its nvcc compiles for every GPU."""
    finding = module("toolkit")
    try:
        found = finding.find()
        known = found.architectures().split()
    except finding.ToolkitError as error:
        raise SystemExit(f"error: {error}") from None
    families = module("cards").FAMILIES
    missing = [one.code for one in families if f"compute_{one.code}" not in known]
    if missing:
        raise SystemExit(
            f"error: {found.nvcc} does not compile for {', '.join(missing)}, and a wheel is for "
            "every GPU; install CUDA 13"
        )
    return Path(found.home)


def module(name: str) -> Any:
    """A module of the package alone: the package needs torch, which is not here."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "vllm_qoq" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


def build(folder: Path, home: Path) -> str:
    """Build the wheel into `folder`/dist; the result is what the compilers said."""
    python = folder / "venv" / "bin" / "python"
    run([sys.executable, "-m", "venv", folder / "venv"])
    print("wheel: installing torch with CUDA into an environment for the build", flush=True)
    quiet = ["--quiet", "--disable-pip-version-check"]
    run([python, "-m", "pip", "install", *quiet, "--requirement", REQUIREMENTS])
    print("wheel: compiling for every GPU, 10 to 20 minutes on 2 cores", flush=True)
    environment = {
        **os.environ,
        # torch looks for ninja there.
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_HOME": str(home),
        "VLLM_QOQ_CUDA": "1",
        "VLLM_QOQ_CUDA_ARCHS": "all",
        "VLLM_QOQ_PORTABLE": "0",
        "NVCC_APPEND_FLAGS": "-Xptxas=-v",
    }
    # By way of an sdist, so that nothing that lies in the clone but does not belong to it goes in.
    command = [python, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT]
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nerror: the build failed; what it said is above")
    return done.stdout


def table(wheel: Path, log: str) -> str:
    """A line for each architecture: its size, and what a kernel of it has or spills at most."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("vllm_qoq/_C.so")
    kernels: dict[str, list[str]] = {}
    for kernel in log.split("Compiling entry function")[1:]:
        # Code for sm_90a is beside that for sm_90.
        code = re.search(r"for '(sm_\d+)", kernel)
        if code:
            kernels.setdefault(code[1], []).append(kernel)
    lines = [("code", "size", "kernels", *SAID)]
    for (kind, architecture), size in sorted(sizes(library).items()):
        code = f"{kind}_{architecture}"
        of_code = kernels.get(code, [])
        most = [largest(pattern, of_code) for pattern in SAID.values()]
        lines.append((code, megabytes(size), *map(str, (len(of_code), *most))))
    return "\n".join("".join(f"{text:>15}" for text in line) for line in lines)


def largest(pattern: re.Pattern[str], texts: Iterable[str]) -> int:
    """The largest number that a pattern finds in texts; 0 where it finds none."""
    return max((int(n) for text in texts for n in pattern.findall(text)), default=0)


def sizes(library: bytes) -> Counter[tuple[str, int]]:
    """Code, as in ("sm", 80), or ("compute", 80) for PTX -> its bytes in a library."""
    total: Counter[tuple[str, int]] = Counter()
    for kind, architecture, size in entries(library):
        total["compute" if kind == PTX else "sm", architecture] += size
    return total


def entries(library: bytes) -> Iterator[tuple[int, int, int]]:
    """Kind, architecture and bytes of each piece of device code in a library."""
    magic = struct.pack("<I", FATBIN_MAGIC)
    at = library.find(magic)
    while at >= 0:
        _, _, header, size = FATBIN.unpack_from(library, at)
        at, end = at + header, at + header + size
        while at < end:
            kind, _, entry_header, code_bytes = ENTRY.unpack_from(library, at)
            (architecture,) = struct.unpack_from("<I", library, at + ARCHITECTURE_AT)
            yield kind, architecture, entry_header + code_bytes
            at += entry_header + code_bytes
        at = library.find(magic, at)


def megabytes(size: int) -> str:
    """Write a number of bytes as MB."""
    return f"{size / 1e6:.1f} MB"


def run(command: Iterable[Path | str]) -> None:
    """Run a command, whose output goes to the terminal, and end where it fails."""
    words = list(map(str, command))
    if subprocess.run(words).returncode:
        raise SystemExit(f"error: {' '.join(words)} failed; what it said is above")


if __name__ == "__main__":
    sys.exit(main())
