"""The benchmark does the work it names; how long it takes is not tested."""

import json

import pytest
import torch

import bilevel_lite as bl
from bilevel_lite import experiment, plotting
from bilevel_lite.__main__ import main
from bilevel_lite.experiment import bench

CPU = torch.device("cpu")


def test_operations_are_counted():
    x, w = torch.randn(30, 7), torch.randn(7, 5, requires_grad=True)
    assert bench.flops(lambda: (x @ w).sum().backward()) == 2 * (2 * 30 * 7 * 5)
    s = torch.eye(12)
    chol = torch.linalg.cholesky(s)
    assert bench.flops(lambda: torch.linalg.cholesky(s)) == 12**3 // 3
    assert bench.flops(lambda: torch.cholesky_solve(torch.ones(12, 4), chol)) == 2 * 12**2 * 4
    assert bench.flops(lambda: torch.cholesky_inverse(chol)) == 2 * 12**3 // 3
    assert bench.flops(lambda: torch.linalg.eigh(s)) == 9 * 12**3
    assert bench.flops(lambda: torch.linalg.qr(torch.randn(12, 3))) == 4 * 12 * 3**2


@pytest.fixture(scope="module")
def linear():
    return bench.measure_case("linear", CPU, bench.Budget(1, 10.0))


def test_linear_case(linear):
    rows = linear["rows"]
    assert linear["parameters"] == 7850 and linear["examples"] == 1000
    assert linear["gradient_gflop"] == pytest.approx(2 * 2 * 1000 * 784 * 10 / 1e9)
    # forward, and for each of J v's two parts (784 columns each) one product: 1.5 gradients;
    # a kept first factor leaves no cubic cost
    assert rows["cross double backward"]["flops"] == pytest.approx(1.5, abs=0.01)
    assert rows["hvp"]["flops"] == pytest.approx(2, abs=0.01)
    assert rows["kfac-mc, first factor kept"]["flops"] < 4 < rows["kfac-mc"]["flops"]
    assert rows["curvlinops kfac-mc"]["flops"] > rows["kfac-mc"]["flops"]
    assert all(row["rounds"] == 1 for row in rows.values())
    assert set(bench.MEMORY) < set(rows) and rows["kfac-mc"]["bytes"] is not None
    text = bench.table(linear)
    assert "linear: 7,850 parameters" in text and "aid step, curvlinops kfac-mc" in text


@pytest.mark.parametrize("name", ["linear", "mlp", "lenet"])
def test_package_and_composition_compute_the_same(name):
    case = bench.Case(name, CPU)
    assert set(case.agreement()) == {"hvp", "ggn", "cg-3", "kfac-empirical"}
    assert max(case.agreement().values()) < 1e-5  # float32


def test_outer_iterations_leave_the_point_alone():
    case = bench.Case("linear", CPU)
    before = bl.flatten(case.model).clone()
    rows = case.rows()
    for _ in range(2):
        rows["aid step, curvlinops kfac-mc"]()
        assert torch.equal(bl.flatten(case.model), before)
    assert not torch.equal(case.outer_lam, case.lam)


def test_a_row_of_the_reference_may_fail_and_ours_may_not():
    def fails():
        raise torch.linalg.LinAlgError("no convergence")

    times = bench.measure({"curvlinops x": fails, "y": lambda: None}, CPU, bench.Budget(2, 1.0))
    assert times["curvlinops x"] == [] and len(times["y"]) == 2
    with pytest.raises(torch.linalg.LinAlgError):
        bench.measure({"x": fails}, CPU, bench.Budget(1, 1.0))


def test_on_a_gpu_memory_is_read_in_the_same_process(monkeypatch):
    """From torch's allocator, whose counters a pretend GPU has here."""
    held, peak, calls = [1000], [5000], []

    def call():
        calls.append("call")
        peak[0] = max(peak[0], held[0] + 700)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, held[0])
    )
    assert bench._peak_on_gpu(call, torch.device("cuda")) == 700
    assert calls == ["wait", "call", "wait"]


def test_a_fresh_process_measures_memory_on_a_cpu_only(monkeypatch):
    class Same(bench.Case):  # the pretend GPU is the CPU
        def __init__(self, name, device):
            super().__init__(name, CPU)

    rows = []
    monkeypatch.setattr(bench, "Case", Same)
    monkeypatch.setattr(bench, "clock", lambda device: iter(range(10_000)).__next__)
    monkeypatch.setattr(bench, "_peak_in_fresh_process", None)
    monkeypatch.setattr(bench, "_peak_on_gpu", lambda call, device: rows.append(call) or 7)
    case = bench.measure_case("linear", torch.device("cuda"), bench.Budget(1, 1e6))
    assert {row for row, cell in case["rows"].items() if "bytes" in cell} == set(bench.MEMORY)
    assert len(rows) == len(bench.MEMORY) and case["rows"]["hvp"]["bytes"] == 7


def test_stops_and_goes_on(tmp_path, monkeypatch, linear, capsys):
    asked = []

    def measure_case(name, device, budget):
        asked.append(name)
        if asked == ["linear", "mlp"]:
            raise KeyboardInterrupt
        return {**linear, "model": name}

    monkeypatch.setattr(bench, "measure_case", measure_case)
    monkeypatch.setattr(experiment.folder, "_REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["bench", "--models", "linear", "mlp", "--out", "run", "--device", "cpu"]
    assert main(words) == 130
    assert main(words) == 0
    assert asked == ["linear", "mlp", "mlp"]  # linear was not measured again
    # the book's record is another folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "runs"]
    stored = json.loads((tmp_path / "runs" / "figures" / "data" / "bench_cpu.json").read_text())
    said = capsys.readouterr().out
    assert str(tmp_path / "runs" / "figures" / "bench_cpu.svg") in said
    assert "The book's record stays as it was" in said
    assert [case["model"] for case in stored["runs"][0]["cases"]] == ["linear", "mlp"]
    case = stored["runs"][0]["cases"][1]
    case["rows"]["curvlinops ekfac-mc"] = {"failed": "a factorisation did not converge"}
    assert "did not converge" in bench.table(case)
    plotting.plt.close(bench.draw_bench(stored))
    assert main([*words, "--rounds", "3"]) == 1
    assert "made with other settings" in capsys.readouterr().err


def test_the_record_is_replaced_only_when_asked_and_only_by_all_of_its_models(
    tmp_path, monkeypatch, linear, capsys
):
    monkeypatch.setattr(
        bench, "measure_case", lambda name, device, budget: {**linear, "model": name}
    )
    monkeypatch.setattr(experiment.folder, "_REPOSITORY", tmp_path / "book")
    monkeypatch.chdir(tmp_path)
    record = tmp_path / "book" / "figures"
    words = ["bench", "--device", "cpu"]
    assert main([*words, "--models", "linear", "--publish"]) == 1
    message = "--publish: the record holds linear mlp lenet resnet18; got ['linear']"
    assert message in capsys.readouterr().err and not record.exists()
    assert main([*words, "--to", "mine"]) == 0 and not record.exists()
    drawing = (tmp_path / "mine" / "bench_cpu.svg").read_bytes()
    assert main([*words, "--publish"]) == 0
    assert str(record / "data" / "bench_cpu.json") in capsys.readouterr().out
    assert (record / "bench_cpu.svg").read_bytes() == drawing
    with pytest.raises(SystemExit):
        main([*words, "--publish", "--to", "mine"])


def test_what_make_bench_does():
    makefile = (experiment.folder._REPOSITORY / "Makefile").read_text("utf-8")
    # with options of one's own nothing is published unless they say so
    assert "bilevel_lite bench $(if $(BENCH),$(BENCH),--publish)" in makefile


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"models: got \['vgg'\], expected some of \['lenet'"):
        bench.run(["vgg"], CPU, 1, 1.0, str(tmp_path))
    with pytest.raises(ValueError, match="rounds: got 0, expected a positive number"):
        bench.run(["linear"], CPU, 0, 1.0, str(tmp_path))
