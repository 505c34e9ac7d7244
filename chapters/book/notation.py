"""Hold a notebook to chapters/NOTATION.md, as far as patterns can.

`problems(nb)` returns a sentence for each formula or name that the table has otherwise. A paragraph
that quotes a paper's letters is passed over if it says so with the words "own letters".
`docstring_problems(text)` does so for a docstring, whose formulas are plain text.
"""

import ast
import inspect
import re

import form

TABLE = form.ROOT / "chapters" / "NOTATION.md"

BEFORE = r"(?<![A-Za-z\\])"  # of a single letter: no part of a word or a command
GAP = r"(?:\s|\\[,;:! ])*"
NORM = r"(?:\\[lr]Vert|\\\||\|+)"
NOT_RHO = r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|mu|nu|kappa|tau|xi)"

# (pattern in a formula, what the table has)
FORMULAS = [
    (rf"{NOT_RHO}{GAP}{NORM}{GAP}\\theta{GAP}{NORM}{GAP}(?:_2)?\^\{{?2", r"l2 is \rho"),
    (rf"\+{GAP}\\(?:alpha|beta|gamma|lambda|mu|epsilon|varepsilon){GAP}I\b", r"damping is \delta"),
    (r"\\lambda_\{?\\?(?:max|min)", r"eigenvalues of H are \mu_j"),
    (r"\\vartheta|\\varrho|\\varphi|\\vardelta", r"the plain form: \theta, \rho, \Phi, \delta"),
    (r"\\theta\^\{?(?:\\star|\\ast|\\dagger|o\b)", r"the minimiser is \theta^*"),
    (rf"{BEFORE}l_\{{?i", r"the loss of an example is \ell_i"),
    (rf"{BEFORE}D_\{{?i", r"the output Jacobian is Z_i; D is the sensitivity"),
    (rf"{BEFORE}p_\{{?[tT]\b", r"the adjoint is w_t; p_k is a direction of CG"),
    (rf"{BEFORE}p_\{{?i|diag\}}?\(p\)", r"probabilities are \hat y_i; p_k is a direction of CG"),
    (r"\\beta_", r"eigenvalues of B are \zeta_j; \beta is the memory of the average"),
    (rf"-{GAP}\\(?:alpha|beta|gamma|epsilon|varepsilon|mu|tau){GAP}\\nabla", r"a step is \eta"),
    (rf"{BEFORE}[A-Z]\^(?:T|\{{T\}})(?![A-Za-z])", r"a transpose is ^\top; T counts steps"),
]  # fmt: skip

# what a chapter must not call a thing -> the table's name
NAMES = {
    **dict.fromkeys(("lmbda", "lambd", "lamb", "lambda_", "lbd", "hparams"), "lam"),
    **dict.fromkeys(("theta_opt", "theta_hat", "thetastar", "theta_min"), "theta_star"),
    **dict.fromkeys(("weight_decay", "wd", "reg", "l2_reg", "rho"), "l2"),
    **dict.fromkeys(("eta", "learning_rate", "stepsize", "step_size"), "lr or step"),
    **dict.fromkeys(("eta_lambda", "lam_lr", "hyper_lr"), "outer_lr"),
    **dict.fromkeys(("num_steps", "n_steps", "nsteps"), "steps"),
    **dict.fromkeys(("num_iters", "n_iter", "n_iters", "niter", "num_terms", "n_terms"), "iters"),
    **dict.fromkeys(("hess", "hessian_matrix"), "H"),
    **dict.fromkeys(("cond", "condition_number", "cond_number"), "kappa"),
    **dict.fromkeys(("eigvals", "evals", "eigenvalues"), "mu"),
    **dict.fromkeys(("damp", "dampening"), "damping"),
    **dict.fromkeys(("logits", "preds"), "outputs"),
    **dict.fromkeys(("probs", "probabilities", "softmaxed", "y_hat"), "prob"),
    **dict.fromkeys(("n_classes", "nclasses"), "C"),
    **dict.fromkeys(("num_samples", "n_samples"), "samples"),
    **dict.fromkeys(("penalty_weight",), "penalty"),
}
MATRICES = "HJDGFRAB"  # one of these is never a bare number or text

# (pattern in the plain text of a docstring, what the table has)
PLAIN = [
    (r"\b(?:alpha|beta|gamma|delta|eps|epsilon|mu|nu|tau|xi) \|\|theta\|\|\^2", "l2 is rho or l2"),
    (r"\+ (?:alpha|beta|gamma|lambda|mu|eps|epsilon) I\b", "damping is delta or damping"),
    (r"\blambda\b|\blambda_", "the outer variable is lam; eigenvalues of H are mu_j"),
    (r"theta\^\*|\btheta_(?:star|opt|hat)\b", "the minimiser is theta*"),
    (r"\bp_t\b", "the adjoint is w_t; p_k is a direction of CG"),
    (r"\b(?:inner|copy)_steps: (?!T\b)[A-Z],", "T counts the steps of the inner problem"),
    (r"\b(?:terms|iters|linear_steps): (?!K\b)[A-Z],", "K counts the steps of a solver"),
    (r"\((?:n|N), T\b", "positions are P; T counts steps"),
]


def docstrings(thing, name: str = "bilevel_lite") -> dict[str, str]:
    """The docstrings of all that a module's ``__all__`` names, and of their public methods."""
    found = {name: inspect.getdoc(thing) or ""}
    own = getattr(thing, "__all__", ())
    if inspect.isclass(thing):
        own = [one for one, it in vars(thing).items() if one[0] != "_" and inspect.isroutine(it)]
    for one in own:
        part = getattr(thing, one)
        if inspect.ismodule(part) or inspect.isclass(part) or inspect.isroutine(part):
            found |= docstrings(part, f"{name}.{one}")
    return found


def docstring_problems(text: str) -> list[str]:
    """What the table of notation has otherwise than a docstring; its example is passed over."""
    prose = "\n".join(x for x in text.splitlines() if not re.match(r"\s*(>>>|\.\.\. )", x))
    prose = re.sub(r"``.*?``", " ", prose, flags=re.DOTALL)
    return [
        f"`{match[0]}`: {right}" for pattern, right in PLAIN if (match := re.search(pattern, prose))
    ]


def rows() -> list[tuple[list[str], list[str], str]]:
    """The table: symbols, code names, chapter."""
    found = []
    for line in TABLE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 5 and cells[0].startswith("$"):
            code = re.findall(r"`([^`]+)`", cells[1])
            found.append((re.findall(r"\$([^$]+)\$", cells[0]), code, cells[4]))
    return found


def formulas(nb) -> list[tuple[str, str]]:
    """(cell id, formula) for all formulas in prose and in the text of figures."""
    found = []
    for cell in nb["cells"]:
        source = cell["source"]
        if cell["cell_type"] == "markdown":
            source = re.sub(r"```.*?```|`[^`]*`", " ", source, flags=re.DOTALL)
            parts = [part for part in re.split(r"\n\s*\n", source) if "own letters" not in part]
            source = "\n\n".join(parts)
        else:
            source = "\n".join(strings(source))
        for match in re.finditer(r"\$\$(.+?)\$\$|\$([^$]+)\$", source, re.DOTALL):
            found.append((cell.get("id"), match[1] or match[2]))
        for match in re.finditer(r"\\begin\{(align|equation)\*?\}.+?\\end", source, re.DOTALL):
            found.append((cell.get("id"), match[0]))
    return found


def parsed(source: str) -> ast.Module:
    """A code cell without its magics, as Python."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith("%")]
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError:
        return ast.Module([], [])


def strings(source: str) -> list[str]:
    """The texts in a code cell, f-strings' included; raw, as LaTeX sees them."""
    return [
        node.value
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def bound(tree: ast.Module) -> list[tuple[str, ast.AST | None]]:
    """(name, what it gets, if that is plain) for each name that a cell binds."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found.append((target.id, node.value))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append((node.id, None))
        elif isinstance(node, ast.arg):
            found.append((node.arg, None))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append((node.name, None))
    return found


def problems(nb) -> list[str]:
    """What the table of notation has otherwise, a sentence each."""
    found = []
    for name, formula in formulas(nb):
        for pattern, right in FORMULAS:
            if match := re.search(pattern, formula):
                found.append(f"cell {name}: `{match[0]}` in a formula: {right}")
    modules, values = set(), set()
    for cell in nb["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree, complaints = parsed(cell["source"]), {}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules |= {alias.asname or alias.name for alias in node.names}
        for name, value in bound(tree):
            values.add(name)
            if name in NAMES:
                complaints[name] = f"the name `{name}`: the table has {NAMES[name]}"
            if name in MATRICES and isinstance(value, ast.Constant):
                complaints[name] = f"`{name}` is a matrix in the table, not {value.value!r}"
        found += [f"cell {cell.get('id')}: {complaint}" for complaint in complaints.values()]
    twice = modules & values & {name for _, names, _ in rows() for name in names}
    return found + [f"`{name}` is a module here, and a value" for name in sorted(twice)]
