"""One address everywhere: pyproject.toml holds it, `make repo ADDRESS=owner/name` sets it."""

import re

import form
import pytest

FILES = [
    form.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CITATION.cff", "pyproject.toml")
]
FILES = [path for path in FILES if path.exists()] + form.chapters() + form.solutions()
OURS = [  # wherever it says this, it means this repository
    r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)",
    r"git\+https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?(?=[@\s\"'])",
    r"git clone (?:--\S+ )*https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?(?=\s|$)",
    r"github\.com/(OWNER/[\w.-]+)",
    r"github\.com/([\w.-]+/bilevel-lite)\b",
    r"(?:Homepage|Issues) = \"https://github\.com/([\w.-]+/[\w.-]+)",
    r"repository-code: \"https://github\.com/([^\"]+)",
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_address(path):
    text = path.read_text(encoding="utf-8").replace('\\"', '"')
    found = {address for pattern in OURS for address in re.findall(pattern, text)}
    assert found <= {form.address()}
    if path.suffix in (".ipynb", ".cff", ".toml"):
        assert found


def test_the_command_changes_every_file(tmp_path, monkeypatch):
    import book

    for path in FILES:
        copy = tmp_path / path.relative_to(form.ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(book, "ROOT", tmp_path)
    copies = [
        [tmp_path / p.relative_to(form.ROOT) for p in f()] for f in (form.chapters, form.solutions)
    ]
    monkeypatch.setattr(form, "chapters", lambda: copies[0])
    monkeypatch.setattr(form, "solutions", lambda: copies[1])
    assert book.command_repo("ada/new-name") == 0
    for path in FILES:
        text = (
            (tmp_path / path.relative_to(form.ROOT)).read_text(encoding="utf-8").replace('\\"', '"')
        )
        assert {address for pattern in OURS for address in re.findall(pattern, text)} <= {
            "ada/new-name"
        }
