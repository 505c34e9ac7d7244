"""The API reference of the site: which names it lists, and how a docstring becomes a page.

The docstrings are written to be read in a terminal, with formulas as indented lines. `prepared`
turns them into what Sphinx reads, before its extension napoleon sees Args, Returns and Raises.
"""

import re

# title -> names in bilevel_lite, those of its modules with the module
GROUPS = {
    "A bilevel problem": [
        "BilevelProblem", "WeightedRisk", "SumOfRisks", "flatten", "unflatten", "params.predict",
    ],
    "Hypergradients": [
        "hypergradient", "unrolled_hypergradient", "finite_difference_hypergradient", "check",
        "audit",
    ],
    "Solvers": [
        "CG", "CGNormal", "Neumann", "Identity", "Direct", "KFAC", "EKFAC", "KFACRichardson",
        "NegativeCurvatureWarning", "DivergenceWarning",
    ],
    "Methods": [
        "AID", "ITD", "AmIGO", "StocBiO", "MRBO", "SOBA", "SABA", "NBO", "NHGD", "SAMA", "BSG1",
        "BOME", "BVFSM", "F2SA", "algorithms.method.Method",
    ],
    "Linear systems and derivatives": [
        "linsolve.cg", "linsolve.cg_normal", "linsolve.neumann", "linsolve.richardson",
        "linsolve.direct", "products.gradient", "products.hvp", "products.hvp_operator",
        "products.hessian", "products.cross_vp",
    ],
    "Curvature": [
        "curvature.Hessian", "curvature.GGN", "curvature.Fisher", "curvature.EmpiricalFisher",
        "curvature.ggn_vp", "factors.kfac_factors", "blocks.kfac_operator",
        "ekfac.ekfac_operator", "kronecker.heuristic_damping", "kronecker.kronecker_inverse",
    ],
    "Data and models": [
        "data.load", "data.available", "data.split", "data.corrupt_labels", "data.pair_flips",
        "data.crop_and_flip", "data.jpeg", "data.majority", "data.standardise", "data.Batches",
        "models.build", "models.linear", "models.mlp", "models.lenet", "models.resnet18",
        "models.resnet32",
    ],
    "Text": [
        "text.encoder", "text.tiny", "text.TextClassifier", "text.Logits", "text.hide",
        "text.MaskedWords",
    ],
    "Long horizons": [
        "updates.Update", "updates.SGD", "updates.Adam", "updates.AdamW",
        "schedules.forward_schedule", "schedules.SignSteps", "population.evolve",
        "functional.functional_hypergradient",
    ],
    "Several processes": [
        "parallel.Group", "parallel.Sharded", "parallel.sharded", "parallel.shard",
        "parallel.Shards", "workers.Workers",
    ],
    "Meta-learning": [
        "meta.adapt", "meta.maml", "meta.imaml", "meta.sinusoids", "meta.few_shot",
    ],
    "Notebooks": [
        "setup", "progress", "exercises.check", "experiment.stored", "plotting.figure",
        "drawings.canvas",
    ],
}  # fmt: skip
INTRODUCTION = """\
Each entry gives the formula, the shapes, what is raised, what it costs, and an example that a test
runs. The examples begin with

.. code-block:: python

    import torch

    import bilevel_lite as bl
"""
MODULES = [
    "data", "drawings", "exercises", "experiment", "functional", "meta", "models", "plotting",
    "parallel", "population", "schedules", "tasks", "text", "updates", "workers",
]  # fmt: skip


def prepared(lines: list[str]) -> None:
    """Rewrite a docstring's lines in place: formulas become literal blocks, bars are kept.

    A block below a blank line is a formula if it is indented more than what stands above it. The
    example that ends a docstring stays as it is.
    """
    found, above, block, blank = [], 0, None, False
    for position, line in enumerate(lines):
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text == "Example:":
            found += lines[position:]
            break
        if text and block is not None and indent < block:
            block = None
        if text and block is None:
            if blank and indent > above and found:
                block = indent
                found += [" " * above + ".. code-block:: text", ""]
            else:
                above = indent
                line = escaped(line)
        found.append(line)
        blank = not text
    lines[:] = found


def escaped(line: str) -> str:
    """A line whose ``|`` and ``*``, outside of what is quoted as code, are no marks."""
    parts = re.split(r"(``[^`]*``|`[^`]*`|\*\*\w+:|\*\*[^*]+\*\*)", line)
    for k in range(0, len(parts), 2):
        parts[k] = re.sub(r"([|*])", r"\\\1", parts[k])
    return "".join(parts)


def shortened(signature: str, name: str) -> str:
    """A method's signature with what all methods share as ``**common``, as its docstring has it."""
    head, _, shared = (signature or "").partition(", *, inner_lr=")
    return f"{head}, **common)" if shared and not name.endswith(".Method") else signature


def pages() -> dict[str, str]:
    """File name -> text of the pages of the reference, in reStructuredText."""
    found, contents, files = {}, [], []
    for title, names in GROUPS.items():
        text = [title, "=" * len(title), "", ".. currentmodule:: bilevel_lite", ""]
        for name in names:
            last = name.rpartition(".")[2]
            kind = "class" if last[0].isupper() else "function"
            text += [f".. auto{kind}:: bilevel_lite.{name}"]
            if last == "Method":
                text += ["   :members: step, state_dict, load_state_dict, options"]
            text += [""]
        file = "api_" + re.sub(r"\W+", "_", title.lower())
        found[f"{file}.rst"] = "\n".join(text)
        listed = ", ".join(f":py:obj:`~bilevel_lite.{name}`" for name in names)
        contents.append(f":doc:`{file}`\n    {listed}\n")
        files.append(f"   {file}")
    text = ["Modules", "=======", ""]
    for name in MODULES:
        text += [
            f"bilevel_lite.{name}",
            "-" * (13 + len(name)),
            "",
            f".. automodule:: bilevel_lite.{name}",
            "",
        ]
    found["api_modules.rst"] = "\n".join(text)
    listed = ", ".join(f":py:mod:`~bilevel_lite.{name}`" for name in MODULES)
    contents.append(f":doc:`api_modules`\n    {listed}\n")
    files.append("   api_modules")
    tree = ["", ".. toctree::", "   :hidden:", "", *files, ""]
    head = "The package, name by name"
    found["api.rst"] = "\n".join([head, "=" * len(head), "", INTRODUCTION, *contents, *tree])
    return found
