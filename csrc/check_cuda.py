#!/usr/bin/env python3
"""What can be shown of the CUDA kernels without a GPU: that they compile to the machine code that is meant.

Compiles every ``csrc/cuda/*.cu`` for all architectures that are shipped, with the stable-ABI headers of any torch, and
fails on warnings, register spills and registers over budget. With ``cuobjdump`` (of a CUDA toolkit, or Triton's) it
looks into the machine code too: 16-byte loads, the intended arithmetic, nothing in local memory.

Environment variables: ``NVCC``, ``CUOBJDUMP``, ``CUDA_ARCHITECTURES``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

SOURCES = sorted((Path(__file__).parent / "cuda").glob("*.cu"))
ARCHITECTURES = os.environ.get("CUDA_ARCHITECTURES", "80 90a 100 120").split()
DEFINES = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000")
LOAD = re.compile(r"LDG\.E\S*\.128")
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class Meant:
    """What the kernels whose name starts with ``name`` may and must do."""

    name: str
    registers: int
    arithmetic: str | None  # a pattern of an instruction; with one, 16-byte loads are wanted too


# The registers leave room for the blocks that the kernels' launch bounds ask for.
MEANT = [
    *(
        Meant(
            f"register_kernel<{dtype}, {tasks}, {beside},", registers, "DFMA" if "double" in (dtype, sums) else "FFMA"
        )
        for dtype in ("float", "BFloat16", "Float16", "double")
        for beside, sums, budget in (  # of 2, 4, 6 and 8 tasks
            ("nothing", "float", (40, 96, 128, 168)),
            ("metric", "double", (80, 128, 128, 168)),
            ("combination", "float", (80, 128, 128, 168)),
        )
        for tasks, registers in zip((2, 4, 6, 8), budget, strict=True)
    ),
    *(
        Meant(f"combine_kernel<{dtype},", 40, "DFMA" if dtype == "double" else "FFMA")
        for dtype in ("float", "BFloat16", "Float16", "double")
    ),
    *(
        Meant(name.format(dtype), registers, "HMMA.16816.F32" + (".BF16" if dtype != "Float16" else ""))
        for dtype in ("float", "BFloat16", "Float16")
        for name, registers in (
            ("fragment_kernel<{}, 2, nothing,", 96),
            ("fragment_kernel<{}, 2, combination,", 96),
            ("fragment_kernel<{}, 4, nothing,", 168),
            ("fragment_kernel<{}, 4, combination,", 168),
            ("pair_kernel<{},", 168),
        )
    ),
    *(
        Meant(f"wide_kernel<{dtype}, {groups}, {beside},", registers, r"DMMA\.(8x8x4|884)")
        for dtype in ("float", "BFloat16", "Float16", "double")
        for beside in (("nothing", "metric", "combination") if dtype == "double" else ("metric",))
        for groups, registers in ((2, 80), (4, 168))
    ),
]
OTHER = Meant("", 255, None)
# On sm_120 the compiler needs more for these kernels, and gets it.
MORE_REGISTERS = {(f"pair_kernel<{dtype},", "sm_120"): 255 for dtype in ("float", "BFloat16", "Float16")}


@dataclass
class Kernel:
    """What the compiler says of a kernel for one architecture, and the instructions in its machine code."""

    name: str
    architecture: str
    registers: int
    spilled: int
    instructions: Counter[str] = field(default_factory=Counter)

    def complaints(self, sass: bool) -> Iterator[str]:
        """What is not as meant."""
        meant = next((m for m in MEANT if self.name.startswith(m.name)), OTHER)
        budget = MORE_REGISTERS.get((meant.name, self.architecture), meant.registers)
        if self.spilled:
            yield f"{self.spilled} bytes of registers spilled"
        if self.registers > budget:
            yield f"{self.registers} registers, over its budget of {budget}"
        if not sass:
            return
        if any(LOCAL_MEMORY.match(i) for i in self.instructions):
            yield "reads or writes local memory"
        if meant.arithmetic and not any(LOAD.match(i) for i in self.instructions):
            yield "no 16-byte loads"
        if meant.arithmetic and not any(re.fullmatch(meant.arithmetic, i) for i in self.instructions):
            yield f"no {meant.arithmetic}"


def demangled(names: list[str]) -> dict[str, str]:
    """Short forms of the linker's names."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    text = text.replace("(anonymous namespace)::", "")
    for value, beside in enumerate(("nothing", "metric", "combination")):  # as the enum of csrc/cuda/table.h
        text = text.replace(f"(gradstats::cuda::Beside){value}", beside)
    short = [re.sub(r"^void |\(.*|gradstats::(cuda::)?", "", line) for line in text.splitlines()]
    return dict(zip(names, short, strict=True))


def compile_source(source: Path, target: Path) -> dict[tuple[str, str], Kernel]:
    """Compiles one file and returns its kernels by linker name and architecture."""
    includes = [Path(find_spec("torch").origin).parent / "include", sysconfig.get_paths()["include"]]
    command = [os.environ.get("NVCC", "nvcc"), "-std=c++17", "-O3", "--threads", "0", "-c", "-o", target, source]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command += ["-Xptxas", "-v", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Werror,-fPIC", *DEFINES]
    command += [option for path in includes for option in ("-isystem", path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{done.stderr}\nCUDA check: {source.name} does not compile")
    pattern = r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = re.findall(pattern, done.stderr, re.DOTALL)
    names = demangled([name for name, *_ in found])
    return {
        (name, architecture): Kernel(names[name], architecture, int(registers), int(spilled))
        for name, architecture, spilled, registers in found
    }


def cuobjdump() -> str | None:
    """The disassembler, if there is one."""
    candidates = [os.environ.get("CUOBJDUMP"), shutil.which("cuobjdump")]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((path for path in candidates if path and Path(path).exists()), None)


def count_instructions(tool: str, binary: Path, kernels: dict[tuple[str, str], Kernel]) -> None:
    """Fills in ``Kernel.instructions``."""
    architecture, counts = "", Counter[str]()
    with subprocess.Popen([tool, "-sass", binary], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if match := re.match(r"arch = (\S+)", line):
                architecture = match[1]
            elif match := re.match(r"\s*Function : (\S+)", line):
                counts = kernels[match[1], architecture].instructions
            elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
                counts[match[1]] += 1
    if run.returncode != 0 or not all(kernel.instructions for kernel in kernels.values()):
        sys.exit(f"CUDA check: {tool} could not read all of the machine code")


def main() -> None:
    """Checks all sources; exits with 1 if anything is not as meant."""
    tool, failed, checked, seen = cuobjdump(), 0, 0, set()
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "object.o"
            kernels = compile_source(source, binary)
            if tool is not None:
                count_instructions(tool, binary, kernels)
        registers: dict[str, list[str]] = {}
        for kernel in kernels.values():
            registers.setdefault(kernel.name, []).append(f"{kernel.architecture} {kernel.registers}")
            seen.update(meant.name for meant in MEANT if kernel.name.startswith(meant.name))
            for complaint in kernel.complaints(tool is not None):
                print(f"FAILED {kernel.name} for {kernel.architecture}: {complaint}")
                failed += 1
        checked += len(kernels)
        print(f"{source.name}: registers")
        for name, counts in sorted(registers.items()):
            print(f"  {name:60} {', '.join(counts)}")
    for name in {meant.name for meant in MEANT} - seen:
        print(f"FAILED {name}...: no such kernel")
        failed += 1
    looked = "machine code as meant" if tool else "machine code not looked into: no cuobjdump"
    if failed or not checked:
        sys.exit(f"CUDA check: {failed} complaints about {checked} kernels")
    print(f"CUDA check: {checked} kernels for sm_{', sm_'.join(ARCHITECTURES)}, no warnings, no spills; {looked}")


if __name__ == "__main__":
    main()
