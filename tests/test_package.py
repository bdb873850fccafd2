"""The package as a whole: import without compiled libraries, its cost, forced backends, the command line."""

import os
import subprocess
import sys

import pytest

import gradstats
from gradstats.cli import main

WITHOUT_COMPILED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("gradstats._C", "gradstats._C_cuda"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "GRADSTATS_BACKEND": "", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_works_and_says_so_without_any_compiled_library():
    done = python(
        WITHOUT_COMPILED
        + "import torch, gradstats, gradstats.cli\n"
        + "print(gradstats.pairwise(torch.tensor([[3.0, 4.0], [4.0, 3.0]])).gram.tolist())\n"
        + "gradstats.cli.main(['info'])"
    )
    assert done.returncode == 0, done.stderr
    assert "[[25.0, 24.0], [24.0, 25.0]]" in done.stdout
    assert "No module named 'gradstats._C'" in done.stdout
    assert "everything runs on the reference backend" in done.stdout


def test_import_needs_torch_and_numpy_alone():
    third_party = python(
        "import torch, numpy, sys; before = set(sys.modules); import gradstats\n"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    assert third_party.returncode == 0, third_party.stderr
    loaded = set(eval(third_party.stdout)) - set(sys.stdlib_module_names)
    assert loaded <= {"gradstats", "torch", "numpy"}, loaded


def test_a_backend_can_be_forced():
    show = "import gradstats; print([b.name for b in gradstats.backends().values() if b.available])"
    assert python(show, GRADSTATS_BACKEND="reference").stdout.strip() == "['reference']"
    if gradstats.backends()["cpu"].available:
        assert python(show, GRADSTATS_BACKEND="cpu").stdout.strip() == "['reference', 'cpu']"
    unknown = python(show, GRADSTATS_BACKEND="tpu")
    assert "environment variable GRADSTATS_BACKEND is 'tpu'; expected one of reference, cpu, cuda" in unknown.stderr
    missing = python(WITHOUT_COMPILED + show, GRADSTATS_BACKEND="cpu")
    assert "ImportError: GRADSTATS_BACKEND=cpu, but that backend is not loaded" in missing.stderr


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_results_never_require_grad(backend):
    if not gradstats.backends()[backend].available:
        pytest.skip(f"no {backend} kernels")
    done = python(
        "import torch; from gradstats import ops\n"
        "rows, weights = list(torch.ones(2, 3, 4, requires_grad=True)), torch.ones(2, requires_grad=True).double()\n"
        "results = [ops.gram(rows, 2, rows[:1]), ops.GramPlan(rows, 2, [], False)(), *ops.combine(rows, 2, weights),\n"
        "    *ops.gram_combine(rows, 2, weights)[1], ops.gram_combine(rows, 2, weights)[0],\n"
        "    ops.linear_gram(rows[0], rows), *ops.linear_gram_combine(rows[0], rows, weights)]\n"
        "print([result.requires_grad for result in results])",
        GRADSTATS_BACKEND=backend,
    )
    assert done.stdout.strip() == str([False] * 8), done.stderr


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"gradstats {gradstats.__version__}\n")
    for backend in gradstats.backends().values():
        assert backend.name in printed
        assert backend.detail in printed


def test_unknown_command():
    with pytest.raises(SystemExit):
        main(["fly"])


def test_public_names():
    for name in gradstats.__all__:
        assert getattr(gradstats, name) is not None
