"""What the site adds to the notebooks: texts of figures, folds, links, and whether all links lead.

A notebook as it is stored is for Jupyter, GitHub and Colab; `described` gives the copy that Sphinx
renders. The pages that are no notebooks come from chapters/book/*.md and chapters/NOTATION.md.
"""

import copy
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import form
from nbformat.v4 import new_markdown_cell

ENDS = '<div class="deeper-ends"></div>'  # conf.py closes the fold here
BADGE = re.compile(r"\[!\[[^]]*\]\(https://colab\.[^)]*\)\]\((https://colab\.[^)]*)\)")
SIGNS = {
    "nabla": "∇", "partial": "∂", "ell": "ℓ", "top": "T", "infty": "∞", "sum": "sum", "pm": "±",
    "approx": "≈", "sim": "~", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠",
    "ll": "≪", "gg": "≫", "cdot": "·", "times": "×", "otimes": "⊗", "odot": "⊙", "in": "∈",
    "to": "→", "lVert": "‖", "rVert": "‖", "lvert": "|", "rvert": "|", "propto": "∝",
}  # fmt: skip


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
            return name if name in ("min", "max", "log", "exp", "arg", "softmax") else ""

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


def described(nb, path: Path | None = None):
    """A copy for the site of the notebook stored at ``path``.

    Each figure is said, to who cannot see it, to be what the cell below reads in it; blocks *Going
    deeper* are marked, to be folded; the badge becomes a link that needs no network; a chapter
    links its solutions.
    """
    nb, heading, cells = copy.deepcopy(nb), "", []
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
