"""One address everywhere: pyproject.toml holds it, `make repo ADDRESS=owner/name` sets it."""

import re
import subprocess

import book
import form
import pytest

FILES = [
    form.ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "CITATION.cff", "CHANGELOG.md", "pyproject.toml")
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
    assert book.command_repo("git@github.com:ada/new-name.git") == 0
    for path in FILES:
        text = (
            (tmp_path / path.relative_to(form.ROOT)).read_text(encoding="utf-8").replace('\\"', '"')
        )
        assert {address for pattern in OURS for address in re.findall(pattern, text)} <= {
            "ada/new-name"
        }


@pytest.mark.parametrize(
    "text",
    [
        "ada/new.name",
        "https://github.com/ada/new.name",
        "https://github.com/ada/new.name.git",
        "https://github.com/ada/new.name/",
        "https://token:secret@github.com/ada/new.name.git",
        "git@github.com:ada/new.name.git",
        "ssh://git@github.com/ada/new.name.git",
        "github.com/ada/new.name",
    ],
)
def test_an_address_as_git_takes_it(text):
    assert re.fullmatch(book.ADDRESS, text)[1] == "ada/new.name"


def test_without_an_address_it_is_that_of_origin(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setattr(form, "address", lambda: "old/name")
    monkeypatch.setattr(form, "chapters", lambda: [])
    monkeypatch.setattr(form, "solutions", lambda: [])
    (tmp_path / "README.md").write_text("see https://github.com/old/name")
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    with pytest.raises(SystemExit, match="There is no remote called origin"):
        book.command_repo(None)
    subprocess.run([*git, "remote", "add", "origin", "https://example.org/a/b"], check=True)
    with pytest.raises(SystemExit, match="is not owner/name"):
        book.command_repo(None)
    address = "git@github.com:ada/lovelace.git"
    subprocess.run([*git, "remote", "set-url", "origin", address], check=True)
    assert book.command_repo(None) == 0
    assert (tmp_path / "README.md").read_text() == "see https://github.com/ada/lovelace"
