"""Statistics against hand-computed values and scipy, tables to the letter, pictures by what they show."""

from __future__ import annotations

import io
import math
import os
import sys

import numpy as np
import pytest
import torch

import gradstats
from gradstats import report

stats = pytest.importorskip("scipy.stats")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_interval_by_hand():
    # mean 2, s = 1, n = 3; with 2 degrees of freedom P(|X| < t) = t / sqrt(2 + t²)
    result = report.interval([1.0, 2.0, 3.0])
    assert result.mean == 2.0
    assert result.half_width == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3), rel=1e-12)
    assert result.values == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 11, 30, 101])
def test_interval_against_scipy(count, confidence):
    values = np.random.default_rng(count).normal(5.0, 2.0, count)
    low, high = stats.t.interval(confidence, count - 1, values.mean(), stats.sem(values))
    result = report.interval(values, confidence=confidence)
    assert result.mean - result.half_width == pytest.approx(low, rel=1e-11)
    assert result.mean + result.half_width == pytest.approx(high, rel=1e-11)


def test_interval_of_one_value_has_no_width():
    result = report.interval([3.25])
    assert result.mean == 3.25
    assert math.isnan(result.half_width)
    assert f"{result:.1f}" == "3.2"


def test_interval_formats_both_numbers():
    result = report.Interval(2.0, 0.456, (1.0, 3.0))
    assert f"{result:.1f}" == "2.0 ± 0.5"
    assert str(result) == "2 ± 0.456"


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_interval_refuses_nothing_and_what_is_not_finite(values):
    with pytest.raises(ValueError, match="values: expected at least one number, all finite"):
        report.interval(values)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_interval_refuses_confidence_outside_0_and_1(confidence):
    with pytest.raises(ValueError, match="confidence: expected"):
        report.interval([1.0, 2.0], confidence=confidence)


def test_relative_drop_by_hand():
    # accuracy 90 -> 81 is 10 % worse, error 2.0 -> 1.5 is 25 % better: (10 - 25) / 2
    drop = report.relative_drop(
        {"accuracy": 81.0, "error": 1.5},
        {"accuracy": 90.0, "error": 2.0},
        higher_is_better={"accuracy": True, "error": False},
    )
    assert drop == pytest.approx(-7.5)


def test_relative_drop_of_the_reference_is_zero():
    metrics = {"a": 3.0, "b": 0.2}
    assert report.relative_drop(metrics, metrics, higher_is_better={"a": True, "b": False}) == 0.0


@pytest.mark.parametrize("reference", [{}, {"b": 1.0}, {"a": 1.0, "b": 1.0}])
def test_relative_drop_refuses_other_names(reference):
    with pytest.raises(ValueError, match="metrics, reference and higher_is_better: expected the same names"):
        report.relative_drop({"a": 1.0}, reference, higher_is_better={"a": True})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_relative_drop_refuses_a_reference_to_divide_by_that_is_not_positive(value):
    with pytest.raises(ValueError, match="reference: expected a positive value for 'a'"):
        report.relative_drop({"a": 1.0}, {"a": value}, higher_is_better={"a": True})


# ---- tables ---------------------------------------------------------------------------------------------------------

HEADER, ROWS = ["method", "Δm"], [["unitary", "1.0 ± 0.2"], ["x", "-3"]]


def test_fixed_width_table():
    assert report.table(HEADER, ROWS) == (
        "method          Δm\n"
        "-------  ---------\n"
        "unitary  1.0 ± 0.2\n"
        "x               -3"
    )  # fmt: skip


def test_markdown_table():
    assert report.table(HEADER, ROWS, markdown=True) == (
        "| method  |        Δm |\n"
        "| ------- | --------: |\n"
        "| unitary | 1.0 ± 0.2 |\n"
        "| x       |        -3 |"
    )  # fmt: skip


def test_table_refuses_ragged_rows_and_no_columns():
    with pytest.raises(ValueError, match="rows: expected 2 cells in row 1, got 1"):
        report.table(HEADER, [["a", "b"], ["c"]])
    with pytest.raises(ValueError, match="header: expected at least one column"):
        report.table([], [])


# ---- pictures -------------------------------------------------------------------------------------------------------


def drawn(figure, tmp_path):
    """The saved picture as an array [height, width, 3]; several colours, so it is not empty."""
    path = tmp_path / "figure.png"
    report.save_figure(figure, path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.std() > 5
    assert min(pixels.shape[:2]) > 200
    return pixels


def task_gradients(num_tasks=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_tasks, 50, generator=generator, dtype=torch.float64)


def test_plot_stats_shows_cosines_and_norms(tmp_path):
    measured = gradstats.pairwise(task_gradients(), names=["seg", "depth", "normal"])
    figure = measured.plot()
    drawn(figure, tmp_path)
    heat, norms = figure.axes[:2]
    assert np.array_equal(heat.images[0].get_array(), measured.cosine.numpy())
    assert [label.get_text() for label in heat.get_yticklabels()] == ["seg", "depth", "normal"]
    assert f"{measured.cosine[0, 1]:.2f}".replace("-", "−") in {text.get_text() for text in heat.texts}
    assert list(norms.lines[0].get_xdata()) == pytest.approx(measured.norms.tolist())
    assert list(norms.lines[0].get_ydata()) == [0, 1, 2]


@pytest.mark.parametrize("num_tasks", [1, 2, 13, 40])
def test_plot_stats_of_any_number_of_tasks(num_tasks, tmp_path):
    drawn(report.plot_stats(gradstats.pairwise(task_gradients(num_tasks))), tmp_path)


def test_plot_stats_of_zero_not_finite_and_absent_tasks(tmp_path):
    gradients = task_gradients(4)
    gradients[1], gradients[2, 0] = 0.0, math.nan
    measured = gradstats.pairwise(gradients)
    present = torch.tensor([True, True, True, False])
    gapped = gradstats.GradStats(gram=measured.gram, names=measured.names, present=present)
    figure = report.plot_stats(gapped)
    drawn(figure, tmp_path)
    beside = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert beside[1:] == ["0", "nan", "absent"]
    blank = np.ma.getmaskarray(np.ma.masked_invalid(figure.axes[0].images[0].get_array()))
    assert blank[2].all()
    assert blank[3].all()
    assert not blank[:2, :2].any()


def test_plot_stats_of_gradients_at_the_ends_of_float64(tmp_path):
    gradients = task_gradients()
    gradients[0] *= 1e-140
    gradients[2] *= 1e140
    drawn(report.plot_stats(gradstats.pairwise(gradients)), tmp_path)


def grouped_stats(groups=("stem", "block.0", "block.1"), *, seed=0, num_tasks=3, zero=None):
    """Random gradients by group; ``zero`` is a group that the last task does not reach."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for group in groups:
        gradients = torch.randn(num_tasks, 20, generator=generator, dtype=torch.float64)
        if group == zero:
            gradients[-1] = 0.0
        parts[group] = gradstats.pairwise(gradients)
    total = sum(list(parts.values())[1:], parts[groups[0]])
    return gradstats.GradStats(gram=total.gram, names=total.names, present=total.present, groups=parts)


def shown(values):
    """A picture's values, NaN where it shows none."""
    return np.ma.filled(np.ma.masked_invalid(values), np.nan)


def test_conflict_by_group_shows_pairs_and_metrics_of_every_group_and_of_all(tmp_path):
    measured = grouped_stats()
    figure = report.conflict_by_group(measured)
    drawn(figure, tmp_path)
    heat, *metrics = figure.axes
    rows = [*measured.groups.values(), measured]
    expected = [[row.cosine[0, 1], row.cosine[0, 2], row.cosine[1, 2]] for row in rows]
    assert np.array_equal(shown(heat.images[0].get_array()), np.array(expected))
    assert [label.get_text() for label in heat.get_yticklabels()] == ["stem", "block.0", "block.1", "all"]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["task0\ntask1", "task0\ntask2", "task1\ntask2"]
    assert f"{measured.cosine[0, 1]:.2f}".replace("-", "−") in {text.get_text() for text in heat.texts}
    titles = {"mean cosine": "mean_cosine", "conflict rate": "conflict_rate"}
    titles["magnitude\nsimilarity"] = "mean_magnitude_similarity"
    assert [panel.get_title() for panel in metrics] == list(titles)
    for panel in metrics:
        (dots,) = panel.lines
        assert list(dots.get_xdata()) == [float(getattr(row, titles[panel.get_title()])) for row in rows]
        assert list(dots.get_ydata()) == [0, 1, 2, 3]
        assert panel.get_ylim() == (3.5, -0.5)  # first group at the top


def test_conflict_by_group_of_a_network_follows_its_layers():
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5), torch.nn.Tanh())
    heads = torch.nn.ModuleList([torch.nn.Linear(5, 1), torch.nn.Linear(5, 1)])
    model = torch.nn.ModuleDict({"trunk": trunk, "heads": heads})
    features = trunk(torch.randn(6, 4))
    losses = {name: head(features).square().mean() for name, head in zip("ab", heads, strict=True)}
    figure = report.conflict_by_group(gradstats.from_losses(losses, model, group_by="module"))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["trunk.0", "trunk.2", "heads.0", "heads.1", "all"]
    known = ~np.isnan(shown(figure.axes[0].images[0].get_array()))
    assert list(known[:, 0]) == [True, True, False, False, True]  # one task alone reaches a head: no pair


def test_conflict_leaves_out_tasks_without_a_gradient_in_a_group(tmp_path):
    measured = grouped_stats(zero="block.0")
    figure = report.conflict_by_group(measured)
    drawn(figure, tmp_path)
    assert list(np.isnan(shown(figure.axes[0].images[0].get_array()))[1]) == [False, True, True]
    of_two = float(measured.groups["block.0"].cosine[0, 1])
    assert figure.axes[1].lines[0].get_xdata()[1] == of_two
    over_time = report.conflict_over_time({0: measured})
    assert shown(over_time.axes[0].collections[0].get_array())[1, 0] == of_two


@pytest.mark.parametrize(("num_groups", "num_tasks"), [(1, 2), (3, 6), (70, 3), (3, 20)])
def test_conflict_of_any_number_of_groups_and_tasks(num_groups, num_tasks, tmp_path):
    measured = grouped_stats([f"layers.{k}" for k in range(num_groups)], num_tasks=num_tasks)
    by_group, over_time = report.conflict_by_group(measured), report.conflict_over_time([(5, measured)])
    for figure, last in ((by_group, "all"), (over_time, f"layers.{num_groups - 1}")):
        assert max(drawn(figure, tmp_path).shape[:2]) < 4000
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert len(labels) <= 30
        assert labels[-1] == last


def test_conflict_over_time_shows_mean_cosines_by_group_and_step(tmp_path):
    steps = {step: grouped_stats(seed=step) for step in (30, 0, 10)}
    figure = report.conflict_over_time(steps)
    drawn(figure, tmp_path)
    panel, bar = figure.axes
    (cells,) = panel.collections
    expected = [[float(steps[s].groups[g].mean_cosine) for s in (0, 10, 30)] for g in ("stem", "block.0", "block.1")]
    assert np.array_equal(shown(cells.get_array()), np.array(expected))
    assert list(cells.get_coordinates()[0, :, 0]) == [-5.0, 5.0, 20.0, 40.0]  # half-way to the neighbours
    assert cells.norm.vmin == -cells.norm.vmax == -np.abs(expected).max()
    assert [label.get_text() for label in panel.get_yticklabels()] == ["stem", "block.0", "block.1"]
    assert panel.get_ylim() == (2.5, -0.5)
    assert panel.get_xlabel() == "optimizer step"
    assert "mean cosine" in bar.get_ylabel()
    pairs = report.conflict_over_time(iter(steps.items()))
    assert np.array_equal(pairs.axes[0].collections[0].get_array(), cells.get_array())


def test_conflict_over_time_leaves_what_is_not_finite_grey(tmp_path):
    good, bad = grouped_stats(), grouped_stats(seed=1)
    bad.groups["stem"].gram[0] = bad.groups["stem"].gram[:, 0] = math.nan
    figure = report.conflict_over_time({0: good, 1: bad})
    drawn(figure, tmp_path)
    blank = np.isnan(shown(figure.axes[0].collections[0].get_array()))
    assert blank.tolist() == [[False, True], [False, False], [False, False]]


def test_conflict_needs_groups_and_pairs():
    plain = gradstats.pairwise(task_gradients())
    with pytest.raises(ValueError, match="stats: expected statistics by group"):
        report.conflict_by_group(plain)
    with pytest.raises(ValueError, match="stats: expected at least two tasks, got 1"):
        report.conflict_by_group(grouped_stats(num_tasks=1))
    with pytest.raises(ValueError, match="steps: step 7: expected statistics by group"):
        report.conflict_over_time({3: grouped_stats(), 7: plain})
    with pytest.raises(ValueError, match="steps: expected at least one"):
        report.conflict_over_time([])
    with pytest.raises(ValueError, match=r"steps: expected different ones, got \[3, 3\]"):
        report.conflict_over_time([(3, grouped_stats()), (3, grouped_stats())])
    with pytest.raises(ValueError, match=r"same groups at each, got \['stem', .*\] at step 3 and \['stem'\] at step 4"):
        report.conflict_over_time({3: grouped_stats(), 4: grouped_stats(["stem"])})


def test_plot_weights_draws_a_panel_a_method_and_a_line_a_task(tmp_path):
    runs = {"SLAW": ([0, 10], [[1.0, 1.0], [1.9, 0.1]]), "AutoScale": ([0, 5, 9], [[1, 1], [1, 2], [1, 3]])}
    figure = report.plot_weights(runs, ["a", "b"])
    drawn(figure, tmp_path)
    assert [panel.get_title() for panel in figure.axes] == ["SLAW", "AutoScale"]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[1.0, 1.9], [1.0, 0.1]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert figure.axes[1].get_yscale() == "log"


def test_plot_weights_takes_weights_that_have_no_logarithm(tmp_path):
    figure = report.plot_weights({"IMTL-G": ([0, 1], [[1.0, -0.5], [0.0, 2.0]])}, ["a", "b"])
    drawn(figure, tmp_path)
    assert figure.axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("run", [([], []), ([0], [[1.0]]), ([0, 1], [[1.0, 1.0]]), ([0, 1], [[1, 1], [1]])])
def test_plot_weights_refuses_other_shapes(run):
    with pytest.raises(ValueError, match="runs: expected 2 weights at each of"):
        report.plot_weights({"SLAW": run}, ["a", "b"])


def test_plot_curves(tmp_path):
    curves = {f"method {k}": (range(20), np.sin(np.arange(20) / (k + 1))) for k in range(9)}
    figure = report.plot_curves(curves, ylabel="similarity", ylim=(-1, 1))
    drawn(figure, tmp_path)
    (panel,) = figure.axes
    looks = {(line.get_color(), line.get_linestyle(), line.get_dashes() if hasattr(line, "get_dashes") else None)
             for line in panel.lines[:7]}  # fmt: skip
    assert len(looks) == 7
    assert panel.get_ylabel() == "similarity"
    assert panel.get_ylim() == (-1, 1)


def test_plot_curves_refuses_uneven_curves():
    with pytest.raises(ValueError, match="curves: expected one value a step for 'a', got 1 for 2 steps"):
        report.plot_curves({"a": ([0, 1], [0.5])}, ylabel="similarity")


def test_plot_intervals_draws_mean_interval_and_runs(tmp_path):
    results = {
        "single-task": {"accuracy (%)": report.interval([96.0, 97.0, 98.0])},
        "unitary": {"accuracy (%)": report.interval([90.0, 91.0]), "Δm (%)": report.interval([4.0])},
    }
    figure = report.plot_intervals(results, reference="single-task")
    drawn(figure, tmp_path)
    accuracy, drop = figure.axes
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["single-task", "unitary"]
    assert [panel.get_xlabel() for panel in (accuracy, drop)] == ["accuracy (%)", "Δm (%)"]
    segments = [bar.get_segments()[0][:, 0] for bar in accuracy.collections if hasattr(bar, "get_segments")]
    single = results["single-task"]["accuracy (%)"]
    assert list(segments[0]) == pytest.approx([single.mean - single.half_width, single.mean + single.half_width])


def test_plots_refuse_nothing():
    with pytest.raises(ValueError, match="runs: expected at least one"):
        report.plot_weights({}, ["a"])
    with pytest.raises(ValueError, match="curves: expected at least one"):
        report.plot_curves({}, ylabel="similarity")
    with pytest.raises(ValueError, match="results: expected at least one method"):
        report.plot_intervals({})
    with pytest.raises(ValueError, match="reference: expected one of \\['a'\\], got 'b'"):
        report.plot_intervals({"a": {"m": report.interval([1.0])}}, reference="b")


def test_plots_leave_the_style_of_others_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    report.plot_curves({"a": ([0, 1], [0.5, 1.0])}, ylabel="similarity")
    assert dict(mpl.rcParams) == before


def test_plots_name_the_extra_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"gradstats\[plot\]"):
        gradstats.pairwise(task_gradients()).plot()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_write_file_replaces_the_whole_content(tmp_path):
    path = tmp_path / "results.md"
    report.write_file(path, "a longer first version")
    report.write_file(path, "Δm")
    assert path.read_text(encoding="utf-8") == "Δm"
    assert [file.name for file in tmp_path.iterdir()] == ["results.md"]


def test_write_file_keeps_the_old_content_where_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "results.md"
    report.write_file(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_file(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["results.md"]


@pytest.mark.parametrize(("ending", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_save_figure_goes_by_the_ending(tmp_path, ending, start):
    path = tmp_path / f"figure{ending}"
    report.save_figure(report.plot_curves({"a": ([0, 1], [0.5, 1.0])}, ylabel="similarity"), path)
    assert io.BytesIO(path.read_bytes()).read(len(start)) == start
