"""Everything that runs on a CPU runs on another device: same numbers, few waits (no GPU needed)."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import bilevel_lite as bl
from bilevel_lite import kronecker, models, schedules
from bilevel_lite.experiment import methods
from bilevel_lite.experiment.methods import METHODS
from bilevel_lite.tasks import hypercleaning as hc

# a backend written in Python is new in torch, and its interface private
module = pytest.importorskip("second_device", exc_type=ImportError)
launches, reads, sends = module.launches, module.reads, module.sends
second_device = module.second_device
kronecker.in_numpy = False  # equal to the last bit: the same products on both devices


def test_the_device_is_another_one():
    with second_device() as device:
        there, here = torch.randn(3, 4).to(device), torch.randn(4)
        with pytest.raises(RuntimeError, match="same device"):
            there @ here
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([there[0, 0], here[0]])
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device=device, generator=torch.Generator())
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        assert not reads
        sends.clear()
        assert torch.equal((there @ here.to(device)).cpu(), there.cpu() @ here)
        assert sum(reads.values()) == 2 and sum(sends.values()) == 1
        there.copy_(torch.ones(3, 4))
        torch.tensor(1.0, device=device)
        assert sum(sends.values()) == 3
        there.fill_(1.0), there.new_full((), 2.0), there.masked_fill(there > 0, 3.0), 2 * there
        assert sum(sends.values()) == 3


def test_kernels_are_counted():
    with second_device() as device:
        there = torch.arange(6.0).to(device)
        launches.clear()
        square = there.view(2, 3)[:, :2].T @ there.view(3, 2).T[:, :2]  # views start nothing
        square.add_(1).relu()
        assert launches == {f"aten::{op}": 1 for op in ("mm", "add_", "relu")} and not reads
        assert float(square.sum()) and launches["aten::sum"] == reads.total() == 1
        weight = torch.ones(6, device=device, requires_grad=True)
        loss = (weight * there).sum()
        launches.clear()
        loss.backward()  # also what autograd's own thread starts
        assert launches["aten::mul"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_methods_give_the_same_numbers(method, tmp_path, capsys):
    def losses(device, out):
        settings = {"outer_steps": 2, "evaluate_every": 1, "baselines": False}
        result = hc.run("digits", "linear", method, 0, tmp_path / out, device, **settings)
        return [(row["test_loss"], row["auc"]) for row in result["history"]]

    truth = losses("cpu", "cpu")
    with second_device() as device:
        assert losses(str(device), "there") == truth
        assert sum(reads.values()) > 20  # so it did run there


def test_a_run_goes_on_there(tmp_path, capsys):
    def run(out, steps, device):
        options = {"outer_steps": steps, "evaluate_every": 1, "baselines": False}
        return hc.run("digits", "linear", "aid-ekfac", 0, tmp_path / out, device, **options)

    truth = run("whole", 4, "cpu")["history"]
    with second_device() as device, pytest.MonkeyPatch.context() as patch:

        def stop(*_):
            raise KeyboardInterrupt

        real = hc.Hypercleaning.measure
        looks = iter([real, real, stop])
        patch.setattr(hc.Hypercleaning, "measure", lambda *args: next(looks)(*args))
        with pytest.raises(KeyboardInterrupt):
            run("cut", 4, str(device))
        patch.undo()
        again = run("cut", 4, str(device))["history"]
    keys = set(truth[0]) - {"seconds"}
    assert [{k: row[k] for k in keys} for row in again] == [{k: r[k] for k in keys} for r in truth]


def job(kind: str, solver, device) -> bl.AID:
    """AID on a small task of images, everything on a device."""
    side = 16
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 1, side, side, generator=generator)
    y = torch.randint(4, (90,), generator=generator)
    dataset = bl.data.load("digits")._replace(
        x=x, y=y, x_test=x[:10], y_test=y[:10], num_classes=4, image_shape=(1, side, side)
    )
    torch.manual_seed(0)
    model = models.build(kind, (1, side, side), 4).to(x.dtype)
    split = torch.Generator().manual_seed(0)
    task = hc.build(dataset, model, 0.5, 1e-3, split, device, sizes=(60, 20, 10))
    task.refresh(task.theta0)
    draws = [
        bl.data.Batches(*part, 10, torch.Generator().manual_seed(k))
        for k, part in enumerate((task.train, task.validation, task.train, task.train))
    ]
    roles = ("inner_batch", "outer_batch", "curvature_batch", "cross_batch")
    method = bl.AID(
        task.problem, task.lam0, task.theta0, solver, 3,
        outer_lr=1.0, projection=hc.project, **dict(zip(roles, draws, strict=True)),
        inner_optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    )  # fmt: skip
    if task.uses_batches:
        method.descending = lambda: task.descending(method.theta)
    return method


# solver, and how often one outer iteration waits beside the two looks at its own result
WAITS = {
    "identity": (lambda: bl.Identity(1.0), 0),
    "neumann": (lambda: bl.Neumann(4, 0.1), 1 + 3 + 1),  # start, a look a product, the sum
    "cg": (lambda: bl.CG(3, damping=1.0), 1 + 2 * 3),  # start, p^T H p and the residual
    "cg-ggn": (lambda: bl.CG(3, damping=1.0, curvature="ggn"), 1 + 2 * 3 + 1),  # and the weights
    "kfac": (lambda: bl.KFAC(0.1, seed=0), 1),  # all was well
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_of_an_iteration(name):
    """The inner steps wait for nothing; the rest as often as its decisions need."""
    make, waits = WAITS[name]
    with second_device() as device:
        method = job("lenet", make(), device)
        for _ in range(2):  # the weights' uses 1, 2 and 4 are compared, with a wait each
            method.step()
        reads.clear()
        method.step()
        assert sum(reads.values()) == 2 + waits, reads
        reads.clear()
        method._inner_steps(3)
        assert not reads


def deep(layers: int, device):
    """A risk on an MLP with so many layers of one size, and what a solver takes."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (torch.nn.Linear(5, 5), torch.nn.Tanh())]
    model = torch.nn.Sequential(*parts[:-1]).double()
    x, y = torch.randn(20, 5, generator=g), torch.randint(5, (20,), generator=g)
    risk = bl.WeightedRisk(model.to(device), weight=lambda lam, b: lam[b[2]], l2=1e-3)
    lam, theta = torch.ones(20), bl.flatten(model).cpu()
    batch = tuple(t.to(device) for t in (x, y, torch.arange(20)))
    moved = [t.to(device) for t in (lam, theta)]
    return bl.BilevelProblem(risk, risk), *moved, batch


SOLVES = {  # and how often one waits
    "kfac": (lambda: bl.KFAC(0.1), 1),
    "exact fisher": (lambda: bl.KFAC(0.1, "exact", damping_rule="factored", bias="separate"), 1),
    "kept": (lambda: bl.KFAC(0.1, every=2), 2 + 1 + 1),  # weights, outputs; factors; v
    "averaged": (lambda: bl.KFAC(0.1, ema=0.5), 2 + 1 + 1),  # weights, outputs; factors; v
    "exact rule": (lambda: bl.KFAC(0.1, damping_rule="exact"), 2 + 1 + 2 + 1),  # sizes 5 and 6
    "ekfac": (lambda: bl.EKFAC(0.1), 2 + 1 + 2 + 1),  # the same
}


@pytest.mark.parametrize("name", SOLVES)
def test_waits_of_a_solve_do_not_grow_with_the_layers(name):
    make, waits = SOLVES[name]
    counts = []
    with second_device() as device:
        for layers in (3, 9):
            problem, lam, theta, batch = deep(layers, device)
            for _ in range(3):  # the weights' uses 1, 2 and 4 are compared
                make().prepare(problem, lam, theta, batch)
            make().prepare(problem, lam, theta, batch)
            solver = make()
            reads.clear()
            at = solver.prepare(problem, lam, theta, batch, cross=True)
            v, _ = at.solve(torch.ones_like(theta), diagnose=False)
            at.cross(v)
            counts.append(sum(reads.values()))
    assert counts == [waits, waits], reads


@pytest.mark.parametrize("want_v", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_solve_without_a_look_neither_waits_nor_sends(samples, want_v):
    """So it can be recorded; the numbers are those that the generator would have given."""

    def run(at, b):
        v, _ = at.solve(b, diagnose=False, want_v=want_v)
        return v, at.cross(v)[0]

    how = {"cross": True, "once": True}
    with second_device() as device:
        problem, lam, theta, batch = deep(3, device)
        b = torch.ones_like(theta)
        plain, solver = bl.KFAC(0.1, samples=samples), bl.KFAC(0.1, samples=samples)
        truths = [run(plain.prepare(problem, lam, theta, batch, **how), b) for _ in range(4)]
        generator = solver._generator
        solver._generator = drawn = bl.curvature.Drawn(generator)
        for k, (v, jv) in enumerate(truths):
            reads.clear(), sends.clear()
            at = solver.prepare(problem, lam, theta, batch, **how)
            at.looks = False
            got, got_jv = run(at, b)
            if k in (1, 2):  # their uses 6 and 7 of the weights, which are not compared there
                assert not reads and not sends
            assert torch.equal(got_jv, jv) and (v is None or torch.equal(got, v))
            assert not at.failed and not at.look()
            if k < 3:
                drawn.again()
        assert torch.equal(generator.get_state(), plain._generator.get_state())
        with pytest.raises(ValueError, match="draw 0 was made for outputs of shape"):
            drawn.again()
            solver.prepare(problem, lam, theta, tuple(t[:7] for t in batch))


@pytest.mark.parametrize("want_v", [True, False])
@pytest.mark.parametrize("make", [bl.KFAC, bl.EKFAC])
@pytest.mark.parametrize("sigma, spoilt", [(-1.0, 0.0), (torch.nan, 0.0), (1.0, torch.nan)])
def test_what_is_refused_reads_the_same(sigma, spoilt, make, want_v):
    """Negative weights, and outputs that are not finite: looked at where they were made, or not."""

    def message(device, first):
        problem, lam, theta, (x, *others) = deep(3, device)

        def solve():
            at = make(0.1).prepare(problem, lam, theta, (x, *others), cross=True)
            at.solve(torch.ones_like(theta), diagnose=False, want_v=want_v)

        if not first:
            solve()
        lam[4], x[3, 2] = sigma, x[3, 2] + spoilt
        with pytest.raises(ValueError) as failure:
            solve()
        return str(failure.value)

    truth = message("cpu", True)
    assert ("weight: the smallest" if spoilt == 0 else "model: its outputs") in truth
    with second_device() as device:
        assert message(device, True) == message(device, False) == truth


@pytest.mark.parametrize(
    "kind, solver", [("lenet", bl.KFAC), ("lenet", bl.EKFAC), ("resnet18", bl.KFAC)]
)
def test_networks_give_the_same_numbers(kind, solver):
    truth = job(kind, solver(0.1, seed=0), torch.device("cpu"))
    truth.step()
    with second_device() as device:
        there = job(kind, solver(0.1, seed=0), device)
        there.step()
        assert there.lam.device == device
        assert torch.equal(there.lam.cpu(), truth.lam)
        assert torch.equal(there.theta.cpu(), truth.theta)
    assert not torch.equal(truth.lam, torch.full_like(truth.lam, 0.5))


def test_a_forgotten_tensor_is_found():
    """The check itself: a constant left on the CPU stops the step."""
    with second_device() as device:
        method = job("lenet", bl.Identity(1.0), device)
        inner, outer = method.problem.inner_loss, method.problem.outer_loss
        forgotten = torch.ones(10)

        def weighted(lam, theta, batch):
            return inner(lam, theta, batch) + (theta[:10] * forgotten).sum()

        method.problem = bl.BilevelProblem(weighted, outer)
        with pytest.raises(RuntimeError, match="same device"):
            method.step()


@pytest.mark.parametrize("method", METHODS)
def test_failures_read_the_same(method, tmp_path):
    """Only the end of a step is looked at there; a failed one says what it says on a CPU."""

    def message(device):
        huge = {"inner_lr": 1e200, "step": 1e200}
        settings = hc.Hypercleaning.settings(method=method, **huge)
        run = methods.build(settings, hc.Hypercleaning.make(settings, device))
        with pytest.raises(bl.refuse.NotFinite) as failure:
            for _ in range(20):
                before = run.state_dict()
                run.step()
        after = run.state_dict()
        for name in ("lam", "theta"):
            assert torch.equal(after[name].cpu(), before[name].cpu())
        return str(failure.value)

    truth = message(torch.device("cpu"))
    with second_device() as device:
        assert message(device) == truth


def test_a_schedule_stays_where_its_caller_has_it():
    problem = bl.BilevelProblem(
        lambda lam, theta, _: theta @ theta, lambda _, theta, __: theta.sum()
    )
    with second_device() as device:
        rates = torch.full((2,), 0.3)
        h, _ = schedules.forward_schedule(problem, torch.ones(3).to(device), 4, rates)
        outer = schedules.SignSteps({"lr": rates}, {"lr": 0.1})
        outer.step(h)
        outer.step({"lr": h["lr"].to(device)})
    assert h["lr"].device == outer.values["lr"].device == rates.device


SUMMED = [0.234, 0.0847, 0.1868]  # a third of it is 0.1685: 0.168 in Python 3.11, 0.169 in 3.12
CELLS = {
    "setup": ("import torch\n\nimport bilevel_lite as bl\n\ndevice = bl.setup(seed=0)", ""),
    "good": ("a = torch.arange(3.0, device=device) / 7\nprint(f'{a.sum():.4f}')", "0.4286\n"),
    "left behind": ("total = (a @ torch.ones(3)).item()", ""),
    "last digit": ("print(a.sum().item())", "0.42857142857142855\n"),
    "sum": (
        "print(f'{sum(SUMMED) / 3:.3f}')".replace("SUMMED", str(SUMMED)),
        f"{sum(SUMMED) / 3:.3f}\n",
    ),
    "long": ("for _ in range(100):\n    a = a + 1", ""),
}


def chapter(cells, folder) -> Path:
    import nbformat.v4 as nb

    notebook = nb.new_notebook()
    for source, printed in map(CELLS.get, cells):
        out = [nb.new_output("stream", name="stdout", text=printed)] if printed else []
        notebook.cells.append(nb.new_code_cell(source, outputs=out))
    path = folder / "00_chapter.ipynb"
    path.write_text(nb.writes(notebook), "utf-8")
    return path


def elsewhere(path, way, budget=90):
    code = f"sys.path.insert(0, sys.argv[2]); import elsewhere; elsewhere.BUDGET = {budget}"
    code = f"import sys; {code}; sys.exit(elsewhere.main({way!r}, [sys.argv[1]]))"
    command = [sys.executable, "-W", "ignore", "-c", code, str(path), str(Path(__file__).parent)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "way, cells, complaint",
    [
        ("device", ["setup", "good", "last digit"], None),
        ("device", ["setup", "good", "left behind"], "cell 2 fails"),
        ("rounding", ["setup", "good", "left behind"], None),
        ("rounding", ["setup", "good", "last digit"], "cell 2 prints something else"),
        ("rounding", ["setup", "good", "sum"], "cell 2 prints something else"),
    ],
)
def test_chapters_elsewhere(way, cells, complaint, tmp_path):
    path = chapter(cells, tmp_path)
    done = elsewhere(path, way)
    assert done.returncode == (complaint is not None), done.stdout + done.stderr
    assert ("no faults" if complaint is None else complaint) in done.stdout


def test_launches_of_a_chapter(tmp_path):
    """A long loop over three numbers: counted in its cell, and a fault beyond the budget."""
    done = elsewhere(chapter(["setup", "good", "long"], tmp_path), "launches", budget=0.001)
    assert "cell 2: 100 operations and 0 reads" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1 and "would take more than 0.001 s" in done.stdout  # it is 0.004
