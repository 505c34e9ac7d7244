"""The damped inverse of one Kronecker product against dense algebra, in every form and rule."""

import copy
import pickle

import pytest
import torch

from bilevel_lite import kronecker
from bilevel_lite.experiment import bench
from bilevel_lite.kronecker import Columns, EigenbasisInverse, Matrix, Spectrum, kronecker_inverse

D1, D2, R = 5, 9, 4  # fewer columns than rows: thin bases


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(got, truth):
    return float((got - truth).norm() / truth.norm())


def forms(x, scale):
    """F = scale x x^T in every form; a spectrum from columns knows them, one from a matrix not."""
    columns = Columns(x, scale)
    matrix = Matrix(columns.dense())
    return {
        "matrix": matrix,
        "columns": columns,
        "spectrum": matrix.spectrum(),
        "spectrum kept": matrix.spectrum().keep(x),
        "thin spectrum": columns.spectrum(),
    }


FORMS = list(forms(draw(3, 2), 1.0))


@pytest.mark.parametrize("on", [0.0, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_damped_factor_from_both_sides_and_through_its_columns(form, on):
    x, delta = draw(D2, R), torch.tensor(0.3)
    solve = forms(x, 0.7)[form].damped(delta, torch.tensor(on))
    inverse = torch.linalg.inv(on * 0.7 * x @ x.T + 0.3 * torch.eye(D2))
    for rows in (2, 30):  # fewer, and more, than there are columns
        v = draw(rows, D2, seed=1)
        assert error(solve(v, right=True), v @ inverse) < 1e-12
        assert error(solve(v.T), inverse @ v.T) < 1e-12
        for other in (x, x.clone(), draw(D2, 6, seed=2)):
            assert error(solve.through(v, other), v @ inverse @ other) < 1e-12


def dense_block(a, b, tau, rule, scale_a=0.7, scale_b=0.2):
    """The damped block as a matrix over vec V (rows stacked), from the formulas of the module."""
    big_a, big_b = scale_a * a @ a.T, scale_b * b @ b.T
    if rule == "exact" or not (big_a.any() and big_b.any()):
        return torch.kron(big_b, big_a) + tau * torch.eye(D1 * D2)
    pi = 1.0
    if rule == "heuristic":
        pi = float((big_a.trace() / D2).sqrt() / (big_b.trace() / D1).sqrt())
    root = tau**0.5
    return torch.kron(big_b + root / pi * torch.eye(D1), big_a + pi * root * torch.eye(D2))


@pytest.mark.parametrize("zero", ["", "a", "b"])
@pytest.mark.parametrize("rule", kronecker.RULES)
def test_block_times_inputs_equals_dense_algebra(rule, zero):
    x, g, v, tau = draw(D2, R), draw(D1, 3, seed=1), draw(D1, D2, seed=2), 0.05
    x, g = x * (zero != "a"), g * (zero != "b")
    truth = torch.linalg.solve(dense_block(x, g, tau, rule), v.flatten()).view(D1, D2)
    for a in forms(x, 0.7).values():
        for b in forms(g, 0.2).values():
            weight, _ = kronecker_inverse(a, b, tau, rule)
            assert error(weight(v), truth) < 1e-12
            for other in (x, x.clone(), draw(D2, 2, seed=3), draw(D2, 20, seed=4)):
                if other.any():
                    assert error(weight.along(v, other), truth @ other) < 1e-12


@pytest.mark.parametrize("full", [True, False])
def test_corrected_block_times_inputs_equals_dense_algebra(full):
    x, g, v = draw(D2, R), draw(D1, 3, seed=1), draw(D1, D2, seed=2)
    a, b = Columns(x, 1.0).spectrum(), Columns(g, 1.0).spectrum()
    if full:
        b = Matrix(b.dense()).spectrum()
    e = draw(len(b.values), R, seed=3).square()
    basis = torch.kron(b.vectors.contiguous(), a.vectors.contiguous())
    dense = basis * e.flatten() @ basis.T + 0.01 * torch.eye(D1 * D2)
    truth = torch.linalg.solve(dense, v.flatten()).view(D1, D2)
    inverse = EigenbasisInverse(a, b, e, 0.01)
    assert error(inverse(v), truth) < 1e-12
    assert error(inverse.along(v, x), truth @ x) < 1e-12
    other = draw(D2, 6, seed=4)  # has a part outside of the span
    assert error(inverse.along(v, other), truth @ other) < 1e-12


def test_kept_coordinates_are_those_of_the_very_columns():
    x = draw(D2, R)
    for spectrum in (Columns(x, 0.7).spectrum(), Matrix(x @ x.T).spectrum().keep(x)):
        assert error(spectrum.vectors.T @ x, spectrum.coordinates(x)) < 1e-13
        assert spectrum.coordinates(x[:]) is spectrum.coordinates(x)
        assert spectrum.coordinates(x.clone()) is None and spectrum.coordinates(x[:, :2]) is None
    x[0, 0] += 1
    assert spectrum.coordinates(x) is None
    assert Spectrum(spectrum.values, spectrum.vectors).coordinates(x) is None


@pytest.mark.parametrize("rule", ["heuristic", "exact"])
def test_inputs_of_a_large_scale_keep_their_digits_in_float32(rule):
    # V (A + delta I)^-1 is large where A is zero, by 1 / delta; times X that part must cancel
    x, g, v = 255 * draw(785, 40).abs(), draw(20, 40, seed=1) / 100, draw(20, 785, seed=2)
    truth = kronecker_inverse(Columns(x, 1 / 40), Columns(g, 1 / 40), 1e-4, rule)[0](v) @ x
    x, g, v = (t.float() for t in (x, g, v))
    weight, _ = kronecker_inverse(Columns(x, 1 / 40), Columns(g, 1 / 40), 1e-4, rule)
    assert error(weight.along(v, x).double(), truth) < 1e-4
    if rule == "heuristic":
        assert error((weight(v) @ x).double(), truth) > 1e-3  # the other order loses them


@pytest.mark.parametrize("rule", kronecker.RULES)
@pytest.mark.parametrize("form", FORMS)
def test_inverses_can_be_pickled_and_copies_do_not_share(form, rule):
    a, b, v = forms(draw(D2, R), 0.7)[form], forms(draw(D1, 3), 0.2)[form], draw(D1, D2, seed=2)
    weight, bias = kronecker_inverse(a, b, 0.05, rule)
    truths = weight(v).clone(), bias(v[:, :1]).clone()
    copies = [pickle.loads(pickle.dumps((weight, bias))), copy.deepcopy((weight, bias))]
    for solve in (weight.a, weight.b):  # spoil the original
        for tensor in vars(getattr(solve, "basis", solve)).values():
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()
    for w, c in copies:
        assert torch.equal(w(v), truths[0])  # the same operations on the same numbers
        assert torch.equal(c(v[:, :1]), truths[1])


# ---------------------------------------------------------------- symmetric algebra


@pytest.fixture(params=["torch", "numpy"])
def backend(request, monkeypatch):
    """NumPy serves one thread only: ask for it, whatever this process has."""
    serves = request.param == "numpy"
    monkeypatch.setattr(kronecker, "_numpy_pays", lambda x: serves)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [3, 90, 1100])  # the last is cut into blocks
def test_gram_equals_the_product_in_both_halves(rows, dtype, backend):
    x = draw(rows, 30).to(dtype)
    truth = x.double() @ x.double().T
    for arg in (x, x.T.contiguous().T, torch.cat([x, x], 1)[:, :30], torch.cat([x, x])[::2]):
        want = truth if len(arg) == rows and torch.equal(arg, x) else arg.double() @ arg.double().T
        gram = kronecker._gram(arg)
        limit = 100 * torch.finfo(dtype).eps
        assert gram.dtype == dtype and gram.shape == want.shape
        assert error(gram.double().tril(), want.tril()) < limit
        assert error(gram.double().triu(), want.triu()) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_factor_and_its_refusals(dtype, backend):
    root = draw(80, 100).to(dtype)
    matrix = root @ root.T / 100
    chol = kronecker._cholesky(matrix.clone(), torch.tensor(0.5, dtype=dtype))
    lower = chol.tril()  # all that a solve reads
    want = matrix.double() + 0.5 * torch.eye(80)
    assert chol.dtype == dtype
    assert error((lower @ lower.T).double(), want) < 100 * torch.finfo(dtype).eps
    with pytest.raises(ValueError, match=r"damping: -2 on a Kronecker factor of size 80 leaves"):
        kronecker._cholesky(matrix.clone(), torch.tensor(-2.0, dtype=dtype))
    for bad in (float("nan"), float("inf")):
        spoilt = matrix.clone()
        spoilt[3, 5] = spoilt[5, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            kronecker._cholesky(spoilt, torch.tensor(0.5, dtype=dtype))


def test_a_failed_factorisation_leaves_the_matrix():
    """LAPACK writes over one triangle; the float64 try after it needs the matrix as it was."""
    threads = torch.get_num_threads()
    try:
        kronecker.set_threads(1)
        root = draw(80, 100).float()
        matrix = root @ root.T / 100 - 2 * torch.eye(80, dtype=torch.float32)
        matrix = (matrix + matrix.T) / 2
        left, failed = kronecker._potrf(matrix.clone())
        assert failed and error(left, matrix) == 0  # copies only: no rounding
    finally:
        kronecker.set_threads(threads)


def test_cholesky_falls_back_on_float64(monkeypatch):
    real = kronecker._potrf
    monkeypatch.setattr(  # as on a matrix that is definite only to more than seven digits
        kronecker, "_potrf", lambda m: (real(m)[0], m.dtype == torch.float32 or real(m)[1])
    )
    matrix = torch.tensor([[4.0, 2.0], [2.0, 5.0]], dtype=torch.float32)
    chol = kronecker._cholesky(matrix, torch.tensor(0.0, dtype=torch.float32))
    assert chol.dtype == torch.float32
    assert error(chol.double(), torch.tensor([[2.0, 0.0], [1.0, 2.0]])) < 1e-7


@pytest.mark.parametrize("many", [1024, 6])  # from there on one after the other
def test_factorisations_together_equal_those_one_by_one(many, monkeypatch):
    monkeypatch.setattr(kronecker, "MANY", many)
    group, truths = kronecker.Factorisations(), []
    for k, (size, dtype) in enumerate(
        [(5, torch.float64), (7, torch.float64), (5, torch.float32), (5, torch.float64)] * 2
    ):
        root, delta = draw(size, 9, seed=k).to(dtype), torch.tensor(0.1 + k, dtype=dtype)
        for f in (Matrix(root @ root.T), Columns(root.T, 0.5)):
            on = torch.tensor(float(k != 3), dtype=dtype)
            group.name = f"layer {k}"
            truths.append((f.damped(delta, on), f.damped(delta, on, group)))
    group.run()
    assert not group.faulty() and not group.require_sound()
    for one, together in truths:
        assert together.chol.dtype == one.chol.dtype
        assert error(together.chol.tril(), one.chol.tril()) < 1e-6
        v = draw(len(getattr(one, "columns", one.chol)), 3).to(one.chol.dtype)
        limit = 1e-12 if v.dtype == torch.float64 else 1e-4
        assert error(together(v), one(v)) < limit


def test_failed_factorisations_are_nan_until_they_are_looked_at():
    group = kronecker.Factorisations()
    fine, bad = torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    solves = []
    for name, matrix in (("fine", fine), ("bad", bad), ("fine", 4 * fine), ("nan", fine / 0)):
        group.name = name
        solves.append(Matrix(matrix).damped(torch.tensor(0.0), group=group))
    group.run()
    assert group.failed.tolist() == [False, True, False, True] and group.faulty()
    assert [bool(solve.chol.isnan().all()) for solve in solves] == [False, True, False, True]
    with pytest.raises(ValueError, match=r"damping: 0 on .* size 3 leaves it .*\(layer 'bad'\)"):
        group.require_sound()
    bad[1, 1] = 9.0
    with pytest.raises(ValueError, match=r"NaN or infinity.*\(layer 'nan'\)"):
        group.require_sound()
    assert torch.equal(solves[1].chol, torch.diag(torch.tensor([1.0, 3.0, 1.0])))
    assert torch.equal(solves[2].chol, 2 * fine)


def test_spectra_together_equal_those_one_by_one(monkeypatch):
    factors = [None]
    for k, size in enumerate([4, 6, 4, 6, 6]):
        root = draw(size, 9, seed=k)
        factors += [Matrix(root @ root.T), Columns(root.T, 0.5), Matrix(root @ root.T).spectrum()]
    truths = kronecker.spectra(factors)
    calls, real = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(m.shape) or real(m))
    monkeypatch.setattr(kronecker, "in_batches", True)
    together = kronecker.spectra(factors)
    assert calls == [(4, 4, 4), (6, 6, 6)]
    for f, one, truth in zip(factors, together, truths, strict=True):
        if f is None or isinstance(f, Spectrum):
            assert one is f and truth is f
            continue
        assert error(one.values, truth.values) < 1e-13 and error(one.dense(), f.dense()) < 1e-13
        if isinstance(f, Columns):
            assert error(one.coordinates(f.columns), one.vectors.T @ f.columns) < 1e-13

    def stops(m):
        if m.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return real(m)

    monkeypatch.setattr(torch.linalg, "eigh", stops)
    low = [Matrix(f.dense().float()) for f in factors[1:3]]
    for one, f in zip(kronecker.spectra(low), factors[1:3], strict=True):
        assert one.values.dtype == torch.float32
        assert error(one.dense().double(), f.dense()) < 1e-6


def test_numpy_serves_large_matrices_on_one_thread_only():
    threads = torch.get_num_threads()
    before = [library.num_threads for library in kronecker._blas()]
    try:
        kronecker.set_threads(1)
        serves = bool(kronecker._blas())  # none where threadpoolctl knows no BLAS
        assert kronecker._numpy_pays(torch.ones(100, 3)) == serves
        for refused in (
            torch.ones(10, 3),
            torch.ones(100, 3, dtype=torch.float16),
            torch.ones(100, 3, requires_grad=True),
            torch.ones(100, 3, device="meta"),
        ):
            assert not kronecker._numpy_pays(refused)
        kronecker.set_threads(2)
        assert torch.get_num_threads() == 2 and not kronecker._numpy_pays(torch.ones(100, 3))
        torch.set_num_threads(1)  # the libraries of NumPy and SciPy still have two
        assert {library.num_threads for library in kronecker._blas()} <= {2}
        assert not kronecker._numpy_pays(torch.ones(100, 3))
    finally:
        torch.set_num_threads(threads)
        for library, number in zip(kronecker._blas(), before, strict=True):
            library.set_num_threads(number)


def test_operations_are_counted_in_torch_where_numpy_would_serve(monkeypatch):
    monkeypatch.setattr(kronecker, "_numpy_pays", lambda x: kronecker.in_numpy)
    x = torch.ones(100, 7)
    assert bench.flops(lambda: kronecker._gram(x)) == 2 * 100 * 100 * 7
    with pytest.raises(ZeroDivisionError):
        bench.flops(lambda: 1 / 0)
    assert kronecker.in_numpy
