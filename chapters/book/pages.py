"""What the site adds to the notebooks: texts of figures, folds, links, and whether all links lead.

A notebook as it is stored is for Jupyter, GitHub and Colab; `described` gives the copy that Sphinx
renders. The pages that are no notebooks come from chapters/book/*.md and chapters/NOTATION.md.
"""

import copy
import json
import re
import unicodedata
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean
from urllib.parse import unquote, urlsplit

import form
from nbformat.v4 import new_markdown_cell

from bilevel_lite.experiment.comparing import fresh

ENDS = '<div class="deeper-ends"></div>'  # conf.py closes the fold here
BADGE = re.compile(r"\[!\[[^]]*\]\(https://colab\.[^)]*\)\]\((https://colab\.[^)]*)\)")
SIGNS = {
    "nabla": "∇", "partial": "∂", "ell": "ℓ", "top": "T", "infty": "∞", "sum": "sum", "pm": "±",
    "approx": "≈", "sim": "~", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠",
    "ll": "≪", "gg": "≫", "cdot": "·", "times": "×", "otimes": "⊗", "odot": "⊙", "in": "∈",
    "lambda": "λ", "Lambda": "Λ", "sqrt": "√",  # Unicode says lamda
    "Vert": "‖", "vert": "|", "mid": "|", "langle": "⟨", "rangle": "⟩", "ldots": "…", "dots": "…",
    "leftarrow": "←", "rightarrow": "→", "mapsto": "→", "Rightarrow": "⇒", "succeq": "⪰",
    "to": "→", "lVert": "‖", "rVert": "‖", "lvert": "|", "rvert": "|", "propto": "∝",
}  # fmt: skip
SILENT = r"math\w+|text\w*|left|right|[bB]ig\w*|operatorname|displaystyle|limits|phantom|underbrace"


def spoken(formula: str) -> str:
    """A formula in LaTeX as a line of plain characters, for who hears it read."""
    part = r"\s*(?:\{([^{}]*)\}|(\w))"
    text = re.sub(rf"\\[dt]?frac{part}{part}", r"\1\2/\3\4", formula.replace(r"\|", r"\lVert "))
    text = re.sub(r"\\(hat|bar|tilde)\s*\{?(\\?\w+)\}?", r"\2", text)
    text = re.sub(r"\\[,;:!]|\\q?quad\b|~", " ", text)

    def sign(match):
        name = match[1]
        if name in SIGNS:
            return SIGNS[name] + " " * (name == "sum")
        size = "SMALL" if name[0].islower() else "CAPITAL"
        try:
            return unicodedata.lookup(f"GREEK {size} LETTER {name.removeprefix('var').upper()}")
        except KeyError:
            return "" if re.fullmatch(SILENT, name) else name

    text = " ".join(re.sub(r"[{}\\]", "", re.sub(r"\\([A-Za-z]+)", sign, text)).split())
    return re.sub(r"‖ ?(.*?) ?‖", r"‖\1‖", text)


def plain(markdown: str) -> str:
    """Markdown as plain text: no marks, no addresses, formulas as characters."""
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", markdown)
    text = re.sub(r"<[^>]+>", "", text)
    kept = re.split(r"(\$+[^$]+\$+|`[^`]+`)", text)
    for position, part in enumerate(kept):
        if part.startswith("$"):
            kept[position] = spoken(part.strip("$"))
        elif part.startswith("`"):
            kept[position] = part.strip("`")
        else:
            kept[position] = re.sub(r"\*|^#+ ", "", part, flags=re.MULTILINE)
    return " ".join("".join(kept).split())


def first_sentences(markdown: str, least: int = 60) -> str:
    """The first sentence of the first paragraph as plain text; more if it is short or one half.

    What begins "Left" goes on until the right-hand side is named too.
    """
    text = plain(markdown.strip().split("\n\n")[0])
    found = ""
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z(])", text):
        found = f"{found} {sentence}".strip()
        if len(found) >= least and not (found.startswith("Left") and "right" not in found.lower()):
            break
    return found


def described(nb):
    """A copy of a notebook for the site.

    Each figure is said, to who cannot see it, to be what the cell below reads in it; blocks *Going
    deeper* are marked, to be folded; the badge, which says where the notebook is stored, becomes a
    link that needs no network; a chapter links its solutions.
    """
    nb, heading, cells = copy.deepcopy(nb), "", []
    badge = BADGE.search(nb.cells[0].source)
    path = form.ROOT / "chapters" / badge[1].partition("/chapters/")[2] if badge else None
    ends = {block[-1] for block in form.deeper_blocks(nb)}
    for position, cell in enumerate(nb.cells):
        heading = (form.headings(cell) or [(0, heading)])[-1][1]
        if form.figures(cell):
            below = nb.cells[position + 1] if position + 1 < len(nb.cells) else None
            reads = below is not None and below.cell_type == "markdown"
            text = first_sentences(below.source if reads else f"Figure: {heading}")
            cell.metadata["mystnb"] = {"image": {"alt": text}}
        if cell.cell_type == "markdown":
            cell.source = BADGE.sub(r'<a class="colab" href="\1">Open in Colab</a>', cell.source)
        cells.append(cell)
        if position in ends:
            cells.append(new_markdown_cell(ENDS))
    if path and not form.is_solution(path) and form.solution_of(path).exists():
        link = f"](solutions/{form.solution_of(path).name})"
        if link not in "".join(cell.source for cell in cells[:3]):
            cells[0].source += f"\n\n[Solutions of the exercises{link}"
    nb.cells = cells
    return nb


@cache
def stored(name: str) -> dict:
    """A stored result, ``figures/data/NAME.json``; or ``peers``, the measurements of others."""
    folder = form.ROOT / "figures" / "data" if name != "peers" else Path(__file__).parent
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


def bench(model: str, row: str, name: str = "bench_cpu") -> float:
    """What a row of the benchmark costs, in gradients."""
    (run,) = stored(name)["runs"]
    (case,) = (case for case in run["cases"] if case["model"] == model)
    return case["rows"][row]["ratio"]


def study(name: str, method: str) -> float:
    """Mean test loss of a method in a study, on the seeds that its search has not seen."""
    more = f"{name}_fresh", f"{name.removesuffix('_solvers')}_fresh"
    there = [one for one in more if (form.ROOT / "figures" / "data" / f"{one}.json").exists()]
    return mean(run["best"]["test_loss"] for run in fresh(name, *there[:1])[method]["runs"])


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table; None is a dash."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join("-" if cell is None else str(cell) for cell in line) + " |"
        for line in lines
    )


BENCH_ROWS = {
    "identity": "identity", "CG, 3 steps": "cg-3", "CG, 10 steps": "cg-10",
    "Neumann, 10 terms": "neumann-10", "KFAC, Monte Carlo": "kfac-mc",
    "the same, first factor kept": "kfac-mc, first factor kept", "EKFAC, Monte Carlo": "ekfac-mc",
}  # fmt: skip
MODELS = ["linear", "mlp", "lenet", "resnet18"]


def bench_table(name: str = "bench_cpu") -> str:
    """What each solver costs, by model."""
    rows = [
        [text, *(f"{bench(model, row, name):.1f}" for model in MODELS)]
        for text, row in BENCH_ROWS.items()
    ]
    return table(["hypergradient", "linear", "MLP", "LeNet", "ResNet-18"], rows)


def gpu_section() -> str:
    """The same on a GPU, where that has been stored."""
    if not (form.ROOT / "figures" / "data" / "bench_cuda.json").exists():
        return "Nothing here was measured on a GPU."
    (run,) = stored("bench_cuda")["runs"]
    gains = [bench(m, "cg-3", "bench_cuda") / bench(m, "kfac-mc", "bench_cuda") for m in MODELS]
    origin = run["provenance"]
    return (
        f"On a GPU ({origin['device']}, commit {origin['commit']}) problems of "
        "this size seem to wait for the launching of kernels more than for arithmetic (we have not "
        f"profiled it), and the rows come closer: CG-3 costs {min(gains):.1f} to "
        f"{max(gains):.1f} times what KFAC costs there.\n\n" + bench_table("bench_cuda")
    )


def peers_table() -> str:
    """What each library needs for the same hypergradient, by model."""
    rows = []
    for what, by in stored("peers")["costs"].items():
        for library, costs in by.items() if what != "unit" else ():
            rows.append([what, library, *(c if c is None else f"{c:.1f}" for c in costs)])
    return table(["hypergradient", "library", *stored("peers")["models"]], rows)


def gain() -> list[float]:
    """How many times cheaper KFAC is than each CG-3 but torchopt's, on the convolutional models."""
    costs = stored("peers")["costs"]
    kfac = costs["KFAC, Monte Carlo"]["bilevel_lite"]
    cg = [by for library, by in costs["CG, 3 steps"].items() if library != "torchopt"]
    return [by[k] / kfac[k] for by in cg for k in (2, 3) if by[k]]


def slower(what: str, models: tuple[int, ...]) -> float:
    """By how many percent ours is slower than the quickest other library, at worst."""
    costs = dict(stored("peers")["costs"][what])
    ours = costs.pop("bilevel_lite")
    return max(100 * (ours[k] / min(by[k] for by in costs.values() if by[k]) - 1) for k in models)


def number(asked: str) -> str:
    """What stands for ``<<asked>>`` on a page, from the stored measurements."""
    kind, _, rest = asked.partition(" ")
    peers = stored("peers")
    if asked == "github":
        return f"https://github.com/{form.address()}"
    if asked == "versions":
        return "\n".join(f"- {name}: {version}" for name, version in peers["versions"].items())
    if kind == "table":
        return {"bench": bench_table, "peers": peers_table, "gpu": gpu_section}[rest]()
    if kind == "bench":
        model, _, row = rest.partition(" ")
        return f"{bench(model, row):.1f}"
    if kind == "study":
        return f"{study(*rest.split()):.3f}"
    if kind == "gain":
        return f"{ {'low': min, 'high': max}[rest](gain()):.1f}"
    if kind == "slower":
        where, _, what = rest.partition(" ")
        return f"{slower(what, (0,) if where == 'linear' else (1, 2, 3)):.0f}"
    if kind == "memory":
        given = peers["memory"]
        what, _, library = rest.rpartition(" ")
        return str(given[what][library] if what else given[rest])
    if kind == "peer":
        what, library, model = re.fullmatch(r"(.+) (\S+) (\d)", rest).groups()
        return f"{peers['costs'][what][library][int(model)]:.1f}"
    if kind == "error":
        return str(peers["errors"][rest][0])
    if kind == "gradients":
        given = peers["gradients"][rest]
        return f"{given[0]} to {given[1]}" if isinstance(given, list) else str(given)
    return f"{peers['job'][rest]:.4f}"


def filled(name: str) -> str:
    """A page of this folder with its numbers."""
    text = (Path(__file__).parent / name).read_text("utf-8")
    return re.sub(r"<<([^>]+)>>", lambda match: number(" ".join(match[1].split())), text)


class Page(HTMLParser):
    """What a page of the site links to, which places it has, and what its pictures say."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.places, self.silent = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):  # noqa: D102
        given = dict(attributes)
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag in ("a", "link", "img", "script"):
            self.links += [given[name] for name in ("href", "src") if given.get(name)]
        if tag == "img" and (not given.get("alt") or re.search(r"\w{20,}\.png", given["alt"])):
            self.silent.append(given.get("src"))


def broken(folder: Path) -> list[str]:
    """Sentences on what is broken in a rendered site: links that lead nowhere, silent pictures."""
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        found += [f"{name}: the picture {picture} has no text" for picture in page.silent]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name in ("search.html", "genindex.html"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{name}: the link {link} leads nowhere")
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].places:
                    found.append(f"{name}: {link}: that page has no such place")
    return found
