"""What the README says is what is there: numbers, chapters, modules, commands."""

import re
from statistics import mean

import form
import nbformat
import pages
import pytest
import torch

from bilevel_lite import experiment
from bilevel_lite.experiment.comparing import difference, fresh, memory_pairs
from bilevel_lite.tasks.cleaning_comparison import SPACES
from bilevel_lite.tasks.hypercleaning import BASELINES, mean_test_loss

TEACHING = (form.ROOT / "chapters" / "TEACHING.md").read_text("utf-8")
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


def cost_rows(name: str) -> list[str]:
    """The table of costs, from a stored benchmark."""
    (run,) = experiment.stored(name)["runs"]
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


@pytest.mark.parametrize("name", ["bench_cpu", "bench_cuda"])
def test_the_costs_are_the_stored_ones(name):
    said = README.partition(f"(figures/data/{name}.json)")[2].partition(f"(figures/{name}.svg)")[0]
    for row in cost_rows(name):
        assert row in said, f"README lacks, in the table of {name}: {row}"
    (run,) = experiment.stored(name)["runs"]
    rows = next(case["rows"] for case in run["cases"] if case["model"] == "resnet18")
    texts = {
        "bench_cpu": ("holds {} MiB beyond", "product holds {} MiB,", "\n{} MiB."),
        "bench_cuda": ("{} MiB for KFAC", "{} MiB for a Hessian-vector", "{} MiB for the comp"),
    }
    for row, text in zip(("kfac-mc", "hvp", "curvlinops kfac-mc"), texts[name], strict=True):
        assert text.format(round(rows[row]["bytes"] / 2**20)) in README


def test_what_is_said_of_the_gpu_is_what_was_measured():
    (gpu,), (cpu,) = (experiment.stored(f"bench_{name}")["runs"] for name in ("cuda", "cpu"))
    said = " ".join(README.partition("(figures/data/bench_cuda.json)")[2].split())
    times = [f"{case['gradient_ms']:.2f}" for case in gpu["cases"]]
    assert f"one gradient takes {', '.join(times[:3])} and {times[3]} ms" in said
    linear, resnet = gpu["cases"][0], gpu["cases"][3]
    assert (linear["model"], resnet["model"]) == ("linear", "resnet18")
    work, time = (resnet[key] / linear[key] for key in ("gradient_gflop", "gradient_ms"))
    assert f"has {work:.0f} times the operations" in said
    assert f"and takes {time:.0f} times as long" in said
    kfac = [case["rows"]["kfac-mc"] for case in gpu["cases"]]
    ratios, flops = ([row[key] for row in kfac] for key in ("ratio", "flops"))
    assert f"costs {min(ratios):.1f} to {max(ratios):.1f} gradients whatever the model" in said
    assert f"counted operations are {min(flops):.1f} to {max(flops):.0f}." in said
    here, there = (
        [case["rows"]["aid step, kfac-mc"]["ms"] / case["rows"]["aid step, cg-3"]["ms"]
         for case in run["cases"]] for run in (gpu, cpu)
    )  # fmt: skip
    assert f"costs {min(here):.2f} to {max(here):.2f} of CG's" in said
    assert f"it is {there[3]:.2f} on ResNet-18 and {there[0]:.2f} on the linear model" in said
    rows = resnet["rows"]
    assert f"costs {rows['ekfac-mc']['ratio']:.0f} gradients on ResNet-18, more than CG" in said
    assert rows["ekfac-mc"]["ratio"] > rows["cg-10"]["ratio"]
    kept = [
        1 - case["rows"]["kfac-mc, first factor kept"]["ms"] / case["rows"]["kfac-mc"]["ms"]
        for case in gpu["cases"]
    ]
    assert f"first factor saves {100 * min(kept):.0f} to {100 * max(kept):.0f} %" in said
    p = gpu["provenance"]
    assert f"torch {p['versions']['torch']}, commit {p['commit']}" in said
    assert p["device"] == "NVIDIA H200"
    rounds = [row["rounds"] for case in gpu["cases"] for row in case["rows"].values()]
    assert sorted(set(rounds)) == [2, 5] and rounds.count(2) == 1


def test_the_costs_of_other_libraries_are_the_stored_ones():
    for what in ("CG, 3 steps", "KFAC, Monte Carlo"):
        for library, costs in pages.stored("peers")["costs"][what].items():
            cells = " | ".join("fails" if cost is None else f"{cost:.1f}" for cost in costs)
            assert f"| {what}: {library} | {cells} |" in README


@pytest.mark.parametrize("path", form.chapters(), ids=lambda path: path.stem)
def test_every_chapter_is_in_the_table(path):
    assert f"](chapters/{path.name})" in README


@pytest.mark.parametrize("path", form.chapters(), ids=lambda path: path.stem)
def test_minutes_are_those_of_the_chapter(path):
    said = form.MINUTES.search(nbformat.v4.reads(path.read_text("utf-8")).cells[0].source)
    if said is None:  # of the older form
        assert form.NAME.fullmatch(path.name)[1] not in form.CONVERTED
        return
    assert re.search(rf"\]\(chapters/{path.name}\) \| [^|]*\| {said[1]} \|", README)
    table = re.findall(r"^\| (.+) \|$", TEACHING, re.MULTILINE)
    rows = {row.split(" | ")[0]: row.split(" | ")[1:] for row in table}
    column = rows["chapter"].index(form.number(path))
    for name, minutes in zip(
        ("core", "with *Going deeper*", "all exercises"), said.groups(), strict=True
    ):
        assert rows[f"{name}, min"][column] == (minutes or said[1]), name


def test_the_first_example_runs_and_says_its_number(capsys):
    code = re.search(r"## The package\n\n```python\n(.*?)```", README, re.DOTALL)[1]
    before, names = torch.get_default_dtype(), {}
    try:
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    finally:
        torch.set_default_dtype(before)
    said = float(re.search(r"solver=bl.CG\(10\)\)  # (-?[\d.]+)", code)[1])
    assert abs(float(names["h"]) - said) < 1e-4
    assert capsys.readouterr().out.count("agrees to") == 2
    # the hypergradient by hand: grad f . d theta* / d lam, from two solves a little apart
    up, down = (
        names["outer_loss"](None, names["solve"](names["lam"] + s), names["held"])
        for s in (1e-5, -1e-5)
    )
    assert abs(float((up - down) / 2e-5) - said) < 1e-4
    assert float(names["method"].lam) > -1  # h is negative


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (form.ROOT / target).exists(), target


def test_commands_exist():
    makefile = (form.ROOT / "Makefile").read_text("utf-8")
    for name in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{name}:", makefile, re.MULTILINE) or name in ("sure", "no"), name


def test_pairs_in_the_prose_are_those_of_the_stored_runs():
    """README and figures/README quote differences over fresh seeds; here they are computed."""
    figures = (form.ROOT / "figures" / "README.md").read_text("utf-8")
    linear = fresh("hyperclean_mnist_solvers", "hyperclean_mnist_solvers_fresh")
    batch, equal = fresh("hyperclean_mnist_batch"), fresh("hyperclean_mnist_ema_equal")

    def said(one, other):
        _, middle, half = difference(one, other)
        return f"{middle:+.3f} ± {half:.3f}"

    pairs = [said(linear["kfac"], linear[f"{m}"]) for m in ("cg-3", "cg-10", "ekfac", "pcg-3")]
    pairs += [said(linear["kfac"], linear[f"{m}"]) for m in ("neumann-10", "cg-normal-3")]
    wide = fresh("hyperclean_mnist_solvers_wide")
    pairs += [said(wide["kfac"], row) for name, row in wide.items() if not name.startswith("kfac")
              if name != "identity"]  # fmt: skip
    pairs += [
        said(batch[f"kfac-b{size}"], batch[f"{rival}-b{size}"])
        for size in (64, 128, 256) for rival in ("cg-3", "cg-normal-3")
    ]  # fmt: skip
    lenet = fresh("hyperclean_cifar10_solvers_large", "hyperclean_cifar10_solvers_large_fresh")
    three = ("kfac", "cg-3"), ("kfac", "identity"), ("cg-3", "identity")
    pairs += [said(lenet[one], lenet[other]) for one, other in three]
    large = fresh("hyperclean_mnist_batch_5000")
    pairs += [
        said(large["kfac-b5000"], large[f"{rival}-b5000"])
        for rival in ("identity", "cg-3", "cg-normal-3")
    ]
    for pair in memory_pairs(list(equal.values())).values():
        pairs.append(f"{pair[1]:+.4f} ± {pair[2]:.4f}")
    assert [text for text in pairs if text not in figures] == []
    for name in ("cg-10", "kfac"):
        assert f"({mean_test_loss(linear[name]):.3f})" in README
