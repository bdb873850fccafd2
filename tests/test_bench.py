"""``gradstats bench``: the hardware's limits, what is measured and how it is shown."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
import subprocess
import sys
import types

import numpy
import pytest
import render
import torch

import gradstats
from gradstats import bench
from gradstats.bench import machine, measure, methods, shapes, show
from gradstats.cli import main
from gradstats.ops import limits


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if not limits.available(request.param):
        pytest.skip(f"no compiled kernels: {gradstats.backends()[request.param].detail}")
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# ---- the limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 4096])
@pytest.mark.parametrize("words", [[0, 1], [16], [3, 65], [1000, 0, 7, 70_001], [1_000_003]])
def test_reading_misses_no_byte(device, ahead, words, threads):
    generator = torch.Generator().manual_seed(sum(words))
    sizes = [16 * n + 5 for n in words]
    tensors = [torch.randint(256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]
    expected = functools.reduce(operator.xor, (int(numpy.bitwise_xor.reduce(t.numpy())) for t in tensors))
    assert limits.read([t.to(device) for t in tensors], ahead=ahead).item() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multiply_adds_are_all_done(device, dtype, threads):
    like = torch.empty(0, dtype=dtype, device=device)
    few, many = (limits.multiply_add(like, count).item() for count in (1, 50 * 10**6))
    assert few > 0
    assert few % 4096 == 0  # steps in a piece
    assert 50 * 10**6 <= many < 50 * 10**6 + few
    assert many % few == 0


def test_limits_refuse_what_they_cannot_do(device):
    with pytest.raises(RuntimeError, match="contiguous"):
        limits.read([torch.zeros(4, 4, device=device).T[1:]])
    with pytest.raises(RuntimeError, match="float32 or float64"):
        limits.multiply_add(torch.empty(0, dtype=torch.float16, device=device), 1)


# ---- what is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "entries"),
    [
        ("resnet18", 62, 11_689_512),
        ("resnet18-narrow", 62, 11_660),
        ("resnet50", 161, 25_557_032),
        ("vit-b", 152, 86_567_656),
        ("bert-base", 199, 109_482_240),
        ("llama-shard", 291, 8_030_261_248 // 64),
    ],
)
def test_lists_have_the_sizes_of_the_models(name, tensors, entries):
    found = shapes.MODELS[name]()
    assert (len(found), sum(map(math.prod, found))) == (tensors, entries)


@pytest.fixture(params=[[(7, 5)], [(30, 11), (), (257,)]], ids=["flat", "list"])
def gradients(request):
    return methods.Gradients.random(request.param, 3, torch.float32)


def test_all_forms_hold_the_same_gradients(gradients):
    by_row = torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients.rows])
    by_block = torch.cat([block.reshape(3, -1) for block in gradients.blocks], 1)
    assert torch.equal(by_row, gradients.matrix)
    assert torch.equal(by_block, gradients.matrix)
    assert gradients.matrix.unique().numel() == gradients.matrix.numel()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile imports what it deprecates
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * method.compiled) for name, method in methods.METHODS.items()],
)
def test_every_method_is_right(name, gradients):
    exact = gradients.matrix.double() @ gradients.matrix.double().T
    call = measure.bound(methods.METHODS[name], gradients)
    assert measure.worst_error(call(), exact) < 1e-6
    assert torch.get_float32_matmul_precision() == "highest"


def case(**changes):
    values = {"threads": 1, "dtype": torch.float32, "num_tasks": 3, "name": "flat", "shapes": [(1000,)]}
    return measure.Case(torch.device("cpu"), **(values | changes))


@pytest.fixture
def few_calls(monkeypatch, one_thread):
    """Five rounds on any machine, and caches that need not be filled."""
    monkeypatch.setattr(measure, "_FLUSHED", 0)


def eager_methods():
    return {name: method for name, method in methods.METHODS.items() if not method.compiled}


def test_a_method_that_raises_is_absent_with_its_reason(monkeypatch, few_calls):
    def refuse(gradients):
        if gradients.matrix.numel() > 3:
            raise NotImplementedError("not built yet\nbut soon")
        return gradients.matrix

    monkeypatch.setitem(methods.METHODS, "stack(cat) @ .T", methods.Method(refuse))
    records = {r["method"]: r for r in measure.measure_case(case(), eager_methods(), seconds=0.0, fits=True)}
    absent = records.pop("stack(cat) @ .T")
    assert absent["absent"] == "NotImplementedError: not built yet"
    assert "milliseconds" not in absent
    assert all(record["rounds"] == 5 for record in records.values())


def test_without_compiled_limits_there_are_no_shares(monkeypatch, few_calls):
    monkeypatch.setattr(limits, "available", lambda device_type: False)
    records = measure.measure_case(case(), eager_methods(), seconds=0.0, fits=True)
    assert records[0]["method"] == "pairwise"
    assert all("gigaflops_per_second" in r and not any(key.startswith("percent") for key in r) for r in records)


def test_methods_take_turns_in_rotating_order(monkeypatch):
    monkeypatch.setattr(measure, "_FLUSHED", 0)
    log = []
    calls = {name: functools.partial(log.append, name) for name in "abc"}
    small = {"b": functools.partial(log.append, "warm b")}
    times = measure.interleaved(calls, small, torch.device("cpu"), seconds=0.0)
    assert " ".join(log).replace("warm b b", "b") == "a b c b c a c a b a b c b c a"
    assert {name: len(values) for name, values in times.items()} == {"a": 5, "b": 5, "c": 5}


def test_graphs_of_calls_that_take_much_memory_are_not_kept(monkeypatch):
    captured = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=captured.append))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    calls = {name: functools.partial(captured.append, name) for name in ("read", "small", "large")}
    facts = {"small": {"extra_bytes": 1 << 20}, "large": {"extra_bytes": 64 << 30}}
    replays = measure._captured(calls, facts)
    assert captured == ["read", "small"]
    assert list(replays) == ["read, graph", "small, graph"]


def test_a_case_that_does_not_fit_after_all_leaves_the_host_cost(monkeypatch, few_calls, capsys):
    def measure_case(case, methods, *, seconds, fits):
        if fits:
            raise torch.OutOfMemoryError
        return measure.measure_case(case, methods, seconds=seconds, fits=fits)

    monkeypatch.setattr(bench, "measure_case", measure_case)
    assert main(["bench", "--quick", "--tasks", "2", "--entries", "100", "--dtypes", "float32"]) == 0
    assert "host cost alone" in capsys.readouterr().out.replace("\n", " ")


def test_only_the_named_methods_are_timed_beside_the_limits(few_calls, tmp_path):
    sizes = ["--tasks", "2", "--entries", "100", "--lists", "--dtypes", "float32", "--seconds", "0"]
    files = ["--out", str(tmp_path / "results.json")]
    assert main(["bench", "--device", "cpu", *sizes, *files, "--methods", "mm, ready-made", "pairwise"]) == 0
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert [r["method"] for r in records if "host_microseconds" in r] == ["pairwise", "mm, ready-made"]
    assert {r["method"] for r in records} - {"pairwise", "mm, ready-made"} <= {"read", "read ahead", "multiply-add"}


def test_a_case_without_methods_is_left_out(few_calls, tmp_path):
    sizes = ["--tasks", "17", "2", "--entries", "100", "--lists", "--dtypes", "float32", "--memory", "0"]
    files = ["--out", str(tmp_path / "results.json")]
    assert main(["bench", "--device", "cpu", *sizes, *files, "--methods", "torch.dot by pair"]) == 0
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert [(r["num_tasks"], r["method"]) for r in records] == [(2, "torch.dot by pair")]


def test_shares_are_of_the_limits_in_the_same_rounds():
    times = {"read": [0.5, 0.1, 0.2], "read ahead": [0.1] * 3, "multiply-add": [2.0] * 3, "pairwise": [0.2, 0.4, 0.1]}
    facts = {name: {} for name in times} | {"absent": {"absent": "reason"}}
    measure.add_shares(case(dtype=torch.bfloat16, num_tasks=4, shapes=[(10**6,)]), times, facts, 8e9)
    ours = facts["pairwise"]
    assert ours["milliseconds"] == pytest.approx(200.0)
    assert ours["quartiles"] == pytest.approx([150.0, 300.0])
    assert ours["gigabytes_per_second"] == pytest.approx(4 * 2e6 / 0.2 / 1e9)
    assert ours["percent_of_read"] == pytest.approx(50.0)  # of the faster loop
    assert ours["gigaflops_per_second"] == pytest.approx(20e6 / 0.2 / 1e9)
    assert ours["percent_of_peak"] == pytest.approx(100 * (20e6 / 0.2) / 4e9)
    assert facts["multiply-add"]["gigaflops_per_second"] == pytest.approx(4.0)
    assert "percent_of_read" not in facts["multiply-add"]
    assert facts["read"]["percent_of_read"] == pytest.approx(50.0)
    assert facts["absent"] == {"absent": "reason"}


def test_shares_on_a_gpu_are_of_replayed_graphs():
    times = {"read": [0.4] * 3, "pairwise": [0.6] * 3} | {"read, graph": [0.1] * 3, "pairwise, graph": [0.2] * 3}
    facts = {"read": {}, "pairwise": {}}
    measure.add_shares(case(), times, facts, 0.0)
    assert facts["pairwise"]["milliseconds"] == pytest.approx(600.0)
    assert facts["pairwise"]["graph_milliseconds"] == pytest.approx(200.0)
    assert facts["pairwise"]["gigabytes_per_second"] == pytest.approx(12e3 / 0.2 / 1e9)
    assert facts["pairwise"]["percent_of_read"] == pytest.approx(50.0)


def test_the_error_is_relative_to_both_norms():
    exact = torch.tensor([[4.0, 0.0], [0.0, 100.0]], dtype=torch.float64)
    gram = exact + torch.tensor([[1e-6, 5e-6], [0.0, 1e-6]], dtype=torch.float64)
    assert measure.worst_error(gram, exact) == pytest.approx(5e-6 / (2 * 10))


@pytest.mark.skipif(sys.platform != "linux", reason="needs the Linux kernel's counts")
def test_extra_memory_is_that_at_the_peak():
    device = torch.device("cpu")

    def hungry():
        large = torch.ones(8 << 20, dtype=torch.float64)
        return large.sum()

    found = measure.extra_bytes(hungry, device)
    if found is None:
        pytest.skip("the kernel does not let the peak start again")
    assert 62 << 20 < found < 72 << 20
    assert measure.extra_bytes(lambda: None, device) < 2 << 20


def test_only_a_checkout_has_a_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(gradstats, "__file__", str(tmp_path / "site-packages" / "gradstats" / "__init__.py"))
    assert machine.describe()["commit"] is None


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_run(device, tmp_path_factory):
    """What a run printed and wrote: flat gradients that fit in its memory, and a list that does not."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("bench")
    files = ("--out", f"{folder}/results.json", "--picture", f"{folder}/roofline.png")
    sizes = ("--tasks", "5", "--entries", "3e3", "--lists", "resnet18", "--memory", "0.01", "--seconds", "0")
    command = [sys.executable, "-m", "gradstats.cli", "bench", "--device", device, "--threads", "1", *sizes, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "results.json").read_text()), (folder / "roofline.png").read_bytes()


def by_method(results, dtype, name):
    return {r["method"]: r for r in results["records"] if (r["dtype"], r["list"]) == (dtype, name)}


def taken(record):
    return record.get("graph_milliseconds", record["milliseconds"])


def test_a_run_prints_tables_and_draws(small_run):
    printed, results, picture = small_run
    assert "float32, T = 5, flat: 3,000 entries a task" in printed
    assert all(column in printed for column in ("% of read", "% of peak", "host µs", "stack(cat) @ .T"))
    assert "medians of interleaved rounds" in printed
    assert picture.startswith(b"\x89PNG")
    assert results["machine"]["torch"] == torch.__version__
    assert results["machine"]["date"][:2] == "20"
    assert {"cpu", "cores", "gpus", "commit", "backends", "load_average"} <= set(results["machine"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_numbers_go_together(small_run, dtype):
    records = by_method(small_run[1], dtype, "flat")
    usual = {name for name, method in methods.METHODS.items() if not method.compiled and not method.tf32}
    assert {"read", "multiply-add"} | usual <= set(records)
    fastest = min(taken(r) for name, r in records.items() if name.startswith("read"))
    for name, r in records.items():
        low, high = r["quartiles"]
        assert 0 < low <= r["milliseconds"] <= high
        if name == "multiply-add":
            continue
        assert r["bytes"] == 5 * 3000 * getattr(torch, dtype).itemsize
        assert r["gigabytes_per_second"] == pytest.approx(r["bytes"] / taken(r) / 1e6)
        assert r["percent_of_read"] == pytest.approx(100 * fastest / taken(r))
        if name in usual:
            peak = records["multiply-add"]["gigaflops_per_second"]
            assert r["gigaflops_per_second"] == pytest.approx(30 * 3000 / taken(r) / 1e6)
            assert r["percent_of_peak"] == pytest.approx(100 * r["gigaflops_per_second"] / peak)
            assert r["host_microseconds"] > 0
            assert r["error"] < (1e-7 if name.startswith("pairwise") else 1e-2)
            assert r["extra_bytes"] is None or r["extra_bytes"] >= 0


def test_of_what_does_not_fit_the_host_cost_is_left(small_run):
    printed, results, _ = small_run
    assert "host cost alone" in printed.replace("\n", " ")
    records = by_method(results, "float32", "resnet18")
    assert records["pairwise"]["tensors"] == 62
    assert 0 < records["pairwise, stacked"]["host_microseconds"] < records["torch.dot by pair"]["host_microseconds"]
    assert not any("milliseconds" in r for r in records.values())


def test_documents_can_quote_a_run(small_run, device, monkeypatch):
    results = small_run[1]
    monkeypatch.setattr(render, "load", lambda name: {f"bench_{device}": results}[name])
    flat = by_method(results, "float32", "flat")
    reading = min(taken(r) for name, r in flat.items() if name.startswith("read"))
    ours = taken(flat["pairwise"])
    (cells,) = rows_of(render.bench_table(device, "float32", "flat"))
    assert cells[:3] == ["flat", "5", "3,000"]
    assert [float(cell) for cell in cells[3:5]] == pytest.approx([reading, ours], rel=0.01)
    assert float(cells[5]) == pytest.approx(100 * reading / ours, abs=0.6)
    assert float(cells[-2]) == pytest.approx(flat["pairwise"]["error"], rel=0.5)
    assert rows_of(render.bench_table(device, "float32", "lists")) == []  # did not fit
    hosts = rows_of(render.host_table(device))
    assert [row[:2] for row in hosts] == [["flat", "1"], ["resnet18", "62"]]
    assert float(hosts[0][2].split(" / ")[0]) == pytest.approx(flat["pairwise"]["host_microseconds"], rel=0.05)


def rows_of(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--tasks", "0"], 2, "expected a positive whole number, got '0'"),
        (["--entries", "1e-3"], 2, "expected a positive whole number, got '1e-3'"),
        (["--lists", "alexnet"], 2, "invalid choice: 'alexnet'"),
        (["--methods", "guess"], 2, "invalid choice: 'guess'"),
        (["--tasks", "2", "--entries", "--lists", "--picture", "roofline.png"], 1, "--picture: expected flat"),
        (["--tasks", "17", "--methods", "torch.dot by pair"], 1, "--methods: expected one for these tasks, dtypes and"),
        pytest.param(
            ["--device", "cuda"],
            1,
            "--device: expected cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
    ],
)
def test_bad_options_are_refused(options, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *options])
    assert stopped.value.code == status
    assert message in capsys.readouterr().err


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(SystemExit):
        main(["bench", "--quick"])
    assert "pip install 'gradstats[bench]'" in capsys.readouterr().err


# ---- showing it -----------------------------------------------------------------------------------------------------


def record(method, num_tasks, entries, **values):
    where = {"device": "cpu", "threads": 2, "dtype": "float32", "list": "flat", "tensors": 1}
    return where | {
        "method": method,
        "num_tasks": num_tasks,
        "entries": entries,
        "bytes": 4 * num_tasks * entries,
        "milliseconds": 1.0,
        **values,
    }


RECORDS = [
    record(method, num_tasks, entries, gigabytes_per_second=read, gigaflops_per_second=rate)
    for num_tasks, entries, scale in ((2, 10**6, 1.0), (2, 10**4, 9.0), (8, 10**5, 2.0))
    for method, read, rate in (("read", 10 * scale, None), ("multiply-add", None, 99.0), ("pairwise", 1, 3 * scale))
]


def test_rooflines_are_of_the_largest_flat_gradients():
    others = [record("pairwise", 2, 10**9, list="resnet18"), record("pairwise", 2, 10**9, threads=1)]
    ((title, roofline),) = show.rooflines(RECORDS + others).items()
    assert title == "float32, 2 CPU threads"
    assert (roofline.read, roofline.peak, roofline.bytes_per_entry) == (20.0, 99.0, 4)
    assert roofline.methods == {"pairwise": {2: 3.0, 8: 6.0}}
    with pytest.raises(ValueError, match="flat gradients with times and limits"):
        show.rooflines([r for r in RECORDS if r["method"] == "pairwise"])


def test_the_picture_shows_rates_under_the_limit():
    pytest.importorskip("matplotlib")
    (panel,) = gradstats.report.plot_roofline(show.rooflines(RECORDS)).axes
    limit, ours = panel.lines
    assert ours.get_xydata().tolist() == [[0.75, 3.0], [2.25, 6.0]]
    corners = dict(limit.get_xydata().tolist())
    assert corners == pytest.approx({0.75 / 1.3: 15 / 1.3, 2.25 * 1.3: 20 * 2.25 * 1.3})
    assert [label.get_text() for label in panel.get_xticklabels()] == ["2", "8"]
    with pytest.raises(ValueError, match="at least one"):
        gradstats.report.plot_roofline({})
