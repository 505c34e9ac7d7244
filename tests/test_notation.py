"""chapters/NOTATION.md: the table is sound, the package has its names, converted chapters obey."""

import inspect

import form
import nbformat
import notation
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import bilevel_lite as bl

CHAPTERS = [path for path in form.chapters() if form.NAME.fullmatch(path.name)[1] in form.CONVERTED]
CHAPTERS += [form.solution_of(path) for path in CHAPTERS if form.solution_of(path).exists()]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_converted_chapter_obeys(path):
    assert notation.problems(nbformat.read(path, as_version=4)) == []


def test_the_list_names_chapters():
    assert set(form.CONVERTED) <= {form.NAME.fullmatch(path.name)[1] for path in form.chapters()}


def test_each_symbol_and_each_name_stands_once():
    table = notation.rows()
    assert len(table) > 45
    symbols = [symbol for given, _, _ in table for symbol in given]
    names = [name for _, given, _ in table for name in given]
    assert len(set(symbols)) == len(symbols) and len(set(names)) == len(names)
    chapters = {form.number(path) for path in form.chapters()}
    assert {chapter for _, _, chapter in table} <= chapters


def test_the_package_has_the_names():
    said = {name for _, given, _ in notation.rows() for name in given}
    for thing, names in {
        bl.BilevelProblem: ("inner_loss", "outer_loss"),
        bl.hypergradient: ("lam", "theta"),
        bl.WeightedRisk: ("l2",),
        bl.unrolled_hypergradient: ("steps", "lr"),
        bl.AID: ("inner_lr", "outer_lr", "inner_steps"),
        bl.CG: ("iters", "damping"),
        bl.Neumann: ("terms", "step"),
        bl.KFAC: ("damping", "samples", "ema"),
        bl.F2SA: ("penalty",),
    }.items():
        assert set(names) <= said
        assert set(names) <= set(inspect.signature(thing).parameters)


def test_docstrings_obey():
    texts = notation.docstrings(bl)
    assert len(texts) > 250
    found = {name: notation.docstring_problems(text) for name, text in texts.items()}
    assert {name: problems for name, problems in found.items() if problems} == {}


@pytest.mark.parametrize("text", [
    "h of g + alpha ||theta||^2", "(H + lambda I) v = b", "the largest lambda_max", "at theta^*",
    "p_t = b", "inner_steps: S, steps", "linear_steps: N, steps", "outputs of shape (n, T, C)",
])  # fmt: skip
def test_each_rule_of_docstrings_bites(text):
    assert notation.docstring_problems(text)
    assert not notation.docstring_problems(f">>> {text}") and not notation.docstring_problems("")


def notebook(*cells):
    made = [
        new_code_cell(text[1:]) if text.startswith("#") else new_markdown_cell(text)
        for text in cells
    ]
    return new_notebook(cells=made)


GOOD = notebook(
    r"With $g = \sum_i \sigma_i \ell_i + \rho \lVert\theta\rVert^2$ and $\theta^*(\lambda)$,",
    r"$$(H + \delta I) v = b, \quad \mu_{\max} \le 1, \quad q^T, \quad (1 - \eta\mu_j)^T$$",
    r"$\theta_{t+1} = \theta_t - \eta \nabla_\theta g$, $w_T = b$, $D_t$, $p_k$, $x_i$, $A^\top$",
    r"In the paper's own letters this is $\alpha\|\theta\|^2$." + "\n\n" + r"Here it is $\rho$.",
    r"A `$h_i$` in code, $\alpha_k \|\theta_k - \theta^*\|$, $2\rho I$, $\text{diag}(\hat y_i)$",
    "#lam, theta = torch.zeros(2), torch.zeros(3)\nl2 = 0.1\nH = A @ A.T\nn = 5",
    '#%pip install x\nax.set_title(r"$\\rho \\lVert\\theta\\rVert^2$")\nprint("eta is 3")',
    "#F = torch.eye(2)\nfor k in range(3):\n    mu = 1 / k",
)


def test_a_good_notebook_passes():
    assert notation.problems(GOOD) == []


BROKEN = {
    r"$\alpha \lVert\theta\rVert^2$": "rho",
    r"$\gamma\,\|\theta\|^2$": "rho",
    r"$$g + \gamma ||\theta||_2^2$$": "rho",
    '#ax.set_title(r"$\\alpha\\|\\theta\\|^2$")': "rho",
    '#ax.set_title(rf"{k}: $\\alpha\\|\\theta\\|^2$")': "rho",
    "\\begin{align*}\n\\alpha\\|\\theta\\|^2\n\\end{align*}": "rho",
    r"$H + \lambda I$": "delta",
    r"$H + \alpha\, I$": "delta",
    r"$\lambda_{\max}(H)$": "mu_j",
    r"$\lambda_\min$": "mu_j",
    r"$\varphi(\lambda)$": "plain form",
    r"$\theta^\star$": "minimiser",
    r"$\theta^{\ast}$": "minimiser",
    r"$\sum_i l_i$": "ell_i",
    r"$D_{i}^\top$": "Jacobian",
    r"$p_t = b$": "adjoint",
    r"$p_{ic}$": "probabilities",
    r"$\mathrm{diag}(p) - pp^\top$": "probabilities",
    r"$\alpha_k \beta_j$": "zeta",
    r"$\theta - \alpha \nabla g$": "step",
    r"$J^T v$": "transpose",
    r"$U^{T}$": "transpose",
    "#lmbda = 1": "lam",
    "#def f(hparams): pass": "lam",
    "#for damp in (1, 2): pass": "damping",
    "#logits = model(x)": "outputs",
    "#def step(learning_rate=1): pass": "lr or step",
    "#a, evals = 1, 2": "mu",
    "#H = 3": "matrix",
    "#import torch.nn.functional as F\nF = torch.eye(2)": "module",
}


@pytest.mark.parametrize("text", BROKEN)
def test_each_rule_bites(text):
    assert any(BROKEN[text] in problem for problem in notation.problems(notebook(text)))


def test_every_rule_is_seen_to_bite():
    found = "\n".join(p for text in BROKEN for p in notation.problems(notebook(text)))
    assert all(right in found for _, right in notation.FORMULAS)
