"""Compilation of the kernels; everything else about the package is in pyproject.toml.

Environment variables:
    GRADSTATS_BUILD_EXT: 0 compiles nothing; the package then runs on its reference backend.
    GRADSTATS_CUDA: 1 insists on the CUDA kernels, 0 leaves them out. Unset, they are compiled if this torch is
        built with CUDA and a CUDA toolkit is found (CUDA_HOME). Whether a GPU is visible does not matter.
    TORCH_CUDA_ARCH_LIST: GPU architectures, as for any torch extension.
"""

import os
from pathlib import Path

from setuptools import setup

# The kernels use the LibTorch stable ABI of this version, so one wheel serves it and every later torch.
TORCH_TARGET_VERSION = "0x020a000000000000"
PYTHON_TAG = "cp310"

COMMON_FLAGS = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h*"))


def wants_cuda() -> bool:
    """Whether to compile the CUDA kernels: decided by this torch and the toolkit, never by a visible GPU."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    choice = os.environ.get("GRADSTATS_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"GRADSTATS_CUDA is {choice!r}; expected 0, 1 or unset")
    toolkit = CUDA_HOME is not None and Path(CUDA_HOME, "include", "cuda_runtime.h").exists()
    if choice == "1" and torch.version.cuda is None:
        raise SystemExit(f"GRADSTATS_CUDA=1, but torch {torch.__version__} is built without CUDA")
    if choice == "1" and not toolkit:
        raise SystemExit(f"GRADSTATS_CUDA=1, but CUDA_HOME ({CUDA_HOME}) holds no CUDA toolkit; set CUDA_HOME")
    return choice != "0" and torch.version.cuda is not None and toolkit


def default_architectures() -> str:
    """Ampere to Blackwell, as far as the toolkit that goes with this torch knows them; the PTX serves all others."""
    import torch

    major, minor = (int(part) for part in torch.version.cuda.split(".")[:2])
    return "8.0+PTX;9.0a;10.0;12.0" if (major, minor) >= (12, 8) else "8.0+PTX;9.0a"


def extensions() -> list:
    """The compiled libraries. They are two because one linked to CUDA cannot load beside a torch without it."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    found = [
        CppExtension(
            "gradstats._C",
            ["csrc/cpu/gram.cpp", "csrc/cpu/dual_cone.cpp", "csrc/cpu/limits.cpp"],
            depends=HEADERS,
            extra_compile_args=[*COMMON_FLAGS, "-g0", "-Wall"],
            py_limited_api=True,
        )
    ]
    if wants_cuda():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures())
        flags = [*COMMON_FLAGS, "-DUSE_CUDA"]
        found.append(
            CUDAExtension(
                "gradstats._C_cuda",
                ["csrc/cuda/gram.cu", "csrc/cuda/limits.cu"],
                depends=HEADERS,
                extra_compile_args={"cxx": [*flags, "-g0"], "nvcc": flags},
                py_limited_api=True,
            )
        )
    return found


if os.environ.get("GRADSTATS_BUILD_EXT", "1") == "0":
    setup()
else:
    from torch.utils.cpp_extension import BuildExtension

    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    )
