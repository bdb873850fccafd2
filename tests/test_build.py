"""Building and packaging: what lands in the wheel and the sdist, and what the build's environment variables do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = ["csrc", "gradstats", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean copy of the sources: building leaves files behind."""
    target = tmp_path / "checkout"
    target.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif source.exists():
            shutil.copy(source, target / name)
    return target


def python(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def build_wheel(checkout: Path, **env: str) -> Path:
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", "dist", "."]
    built = python(*command, cwd=checkout, **env)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    return wheel


@pytest.mark.slow
def test_wheel_serves_every_python_and_holds_the_cpu_kernels(checkout: Path, tmp_path: Path) -> None:
    wheel = build_wheel(checkout, GRADSTATS_CUDA="0")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert "gradstats/_C.abi3.so" in names
        assert "gradstats/_C_cuda.abi3.so" not in names
        assert "gradstats/py.typed" in names
        assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks"))]
        archive.extractall(tmp_path / "site")
    code = "import gradstats; backend = gradstats.backends()['cpu']; assert backend.available, backend"
    run = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), GRADSTATS_BACKEND="")
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_without_compiling_there_is_a_pure_wheel(checkout: Path) -> None:
    assert build_wheel(checkout, GRADSTATS_BUILD_EXT="0").name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_sdist_holds_all_sources(checkout: Path) -> None:
    code = "import setuptools.build_meta as backend; backend.build_sdist('dist')"
    built = python("-c", code, cwd=checkout, GRADSTATS_BUILD_EXT="0")
    assert built.returncode == 0, built.stderr
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        str(p.relative_to(checkout))
        for p in (checkout / "csrc").rglob("*")
        if p.suffix in {".h", ".cuh", ".cpp", ".cu"}
    }
    assert len(sources) >= 8
    assert sources <= packed


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(
            "1",
            "is built without CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA"),
        ),
        ("yes", "expected 0, 1 or unset"),
    ],
)
def test_a_build_that_cannot_be_as_asked_says_why(checkout: Path, value: str, message: str) -> None:
    failed = python("setup.py", "build_ext", cwd=checkout, GRADSTATS_CUDA=value)
    assert failed.returncode != 0
    assert message in failed.stderr


def test_steps_on_a_gpu_do_not_wait_for_each_other(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "run $GRADSTATS_BACKEND $*"\ncase "$*" in *test_gpu.py) exit 1; esac\n')
    (tmp_path / "compute-sanitizer").write_text('#!/bin/sh\necho "sanitize $*"\n')
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(stand_in), "BENCH_ARGS": "--quick"}
    env.pop("GRADSTATS_BACKEND", None)
    done = subprocess.run([ROOT / ".ci/gpu"], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    verdicts = [line.split()[1:3] for line in done.stdout.splitlines() if line.endswith(" s")]
    failed = [["triton", "FAILED,"]]
    passed = [[name, "passed,"] for name in ("build", "cuda", "memcheck", "racecheck", "bench", "linear")]
    assert sorted(verdicts) == sorted(failed + passed)
    assert "run triton -m pytest" in done.stdout
    assert "--device cuda --quick" in done.stdout
    ran = {word for line in done.stdout.splitlines() for word in line.split() if word.startswith("tests/")}
    assert ran >= {"tests/test_gpu.py", "tests/test_triton.py", "tests/test_bench.py"}
    wrong = subprocess.run([ROOT / ".ci/gpu", "fly"], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert (wrong.returncode, "expected steps of build cuda" in wrong.stderr) == (2, True)
