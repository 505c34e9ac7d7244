"""What the README says is what is there: numbers, chapters, modules, commands."""

import re
from statistics import mean

import form
import pages
import pytest

from bilevel_lite import experiment
from bilevel_lite.tasks.cleaning_comparison import SPACES
from bilevel_lite.tasks.hypercleaning import BASELINES, mean_test_loss

README = (form.ROOT / "README.md").read_text("utf-8")


def result_rows() -> list[str]:
    """The table of results, from the stored runs."""
    runs = experiment.stored("hyperclean_mnist_linear")["runs"]
    sources = {text: [run["baselines"][name] for run in runs] for name, text in BASELINES.items()}
    sources["learned weights, as trained"] = [run["best"] for run in runs]
    sources["learned weights + validation set, retrained"] = [run["retrained"] for run in runs]
    rows = []
    for text, fits in sources.items():
        loss = mean(fit["test_loss"] for fit in fits)
        accuracies = [100 * fit["test_accuracy"] for fit in fits]
        low, high = min(accuracies), max(accuracies)
        rows.append(f"| {text} | {loss:.3f} | {mean(accuracies):.1f} % ({low:.1f} to {high:.1f}) |")
    return rows


def test_the_numbers_are_the_stored_ones():
    for row in result_rows():
        assert row in README, f"README lacks: {row}"
    runs = experiment.stored("hyperclean_mnist_linear")["runs"]
    aucs = [run["best"]["auc"] for run in runs]
    assert f"AUC of {mean(aucs):.3f} ({min(aucs):.3f} to {max(aucs):.3f})" in README
    seconds = [run["provenance"]["seconds"] for run in runs]
    assert f"{min(seconds):.0f} to {max(seconds):.0f} s of training" in README


# results of a search, each with a table in figures/README.md
TABLES = [
    path.stem
    for path in sorted((form.ROOT / "figures" / "data").glob("hyperclean_*.json"))
    if "results" in experiment.stored(path.stem)["runs"][0]
]


def method_rows(name: str) -> list[str]:
    """The table of a comparison or a study, best test loss first."""
    runs = experiment.stored(name)["runs"]
    rows = sorted((row for run in runs for row in run["results"]), key=mean_test_loss)
    lines = []
    for row in rows:
        best = [run["best"] for run in row["runs"]]
        accuracies = [100 * b["test_accuracy"] for b in best]
        auc = f"{mean(b['auc'] for b in best):.3f}" if "auc" in best[0] else "none is wrong"
        lines.append(
            f"| `{row['method']}` | {spread([b['test_loss'] for b in best], '.3f')} "
            f"| {spread(accuracies, '.1f', ' %')} | {auc} "
            f"| {mean(b['seconds'] for b in best):.0f} "
            f"| {mean(b['gradients'] for b in best):,.0f} |"
        )
    return lines


def spread(values: list[float], form: str, unit: str = "") -> str:
    """Mean (lowest to highest) of several seeds."""
    seeds = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{unit}{seeds}"


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_studies_are_the_stored_ones(name):
    rows = method_rows(name)
    assert len(rows) == len({row.split("|")[1] for row in rows})
    figures = (form.ROOT / "figures" / "README.md").read_text("utf-8")
    table = figures.partition(f'name="{name}"')[2]
    at = [table.find(row) for row in rows]
    assert min(at) >= 0, f"figures/README.md lacks: {rows[at.index(min(at))]}"
    assert at == sorted(at)
    if name == "hyperclean_mnist_methods":
        assert len(rows) == len(SPACES)


# README's name of a row -> the benchmark's row, and that of the curvlinops composition
COSTS = {
    "identity": ("identity", None),
    "CG, 3 steps": ("cg-3", "curvlinops cg-3"),
    "CG, 10 steps": ("cg-10", None),
    "Neumann, 10 terms": ("neumann-10", None),
    "KFAC, Monte Carlo": ("kfac-mc", "curvlinops kfac-mc"),
    "the same, first factor kept": ("kfac-mc, first factor kept", None),
    "EKFAC, Monte Carlo": ("ekfac-mc", "curvlinops ekfac-mc"),
    "the same, first basis kept": ("ekfac-mc, first factor kept", None),
    "outer iteration: 10 inner steps, KFAC": ("aid step, kfac-mc", "aid step, curvlinops kfac-mc"),
}


def cost_rows() -> list[str]:
    """The table of costs, from the stored benchmark."""
    (run,) = experiment.stored("bench_cpu")["runs"]
    rows = []
    for text, (ours, theirs) in COSTS.items():
        cells = []
        for case in run["cases"]:
            cell = f"{case['rows'][ours]['ratio']:.1f}"
            if theirs:
                other = case["rows"][theirs].get("ratio")
                cell += " (fails)" if other is None else f" ({other:.1f})"
            cells.append(cell)
        rows.append(f"| {text} | {' | '.join(cells)} |")
    return rows


def test_the_costs_are_the_stored_ones():
    for row in cost_rows():
        assert row in README, f"README lacks: {row}"
    (run,) = experiment.stored("bench_cpu")["runs"]
    rows = next(case["rows"] for case in run["cases"] if case["model"] == "resnet18")
    for name, text in (("kfac-mc", "holds {} MiB beyond"), ("hvp", "product holds {} MiB,"),
                       ("curvlinops kfac-mc", "\n{} MiB.")):  # fmt: skip
        assert text.format(round(rows[name]["bytes"] / 2**20)) in README


def test_the_costs_of_other_libraries_are_the_stored_ones():
    for what in ("CG, 3 steps", "KFAC, Monte Carlo"):
        for library, costs in pages.stored("peers")["costs"][what].items():
            cells = " | ".join("fails" if cost is None else f"{cost:.1f}" for cost in costs)
            assert f"| {what}: {library} | {cells} |" in README


@pytest.mark.parametrize("path", form.chapters(), ids=lambda path: path.stem)
def test_every_chapter_is_in_the_table(path):
    assert f"](chapters/{path.name})" in README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (form.ROOT / target).exists(), target


def test_commands_exist():
    makefile = (form.ROOT / "Makefile").read_text("utf-8")
    for name in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{name}:", makefile, re.MULTILINE) or name in ("sure", "no"), name
