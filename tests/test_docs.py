"""The pages are correct: links resolve, commands parse, the names in the map exist."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from ndm.cli import compare, compress, evaluate, quality, reproduce, sample, train
from ndm.cli.main import main
from ndm.train.config import parse

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "src" / "ndm" / "autodiff" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
)
TESTED_ELSEWHERE = ("ring.yaml", "runs/ring")  # tests/test_extending.py


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """The text of a page without code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve_to_files_and_headings(page: Path) -> None:
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def commands() -> Iterator[tuple[str, str]]:
    """Every command ``ndm ...`` on the pages, with its page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.removeprefix("$ ").split("   #")[0].strip()
                command = re.sub(r"^PYTHONPATH=\S+ ", "", command)
                elsewhere = any(part in command for part in TESTED_ELSEWHERE)
                if command.startswith("ndm ") and not elsewhere:
                    yield name(page), command


class Parsed(Exception):
    """Raised after a command is parsed, in place of running it."""


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_commands_parse(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        parse(*arguments)  # type: ignore[arg-type]
        raise Parsed

    for module in (compare, compress, evaluate, quality, reproduce, sample, train):
        monkeypatch.setattr(module, "parse", stop)
    with pytest.raises((Parsed, SystemExit)) as ended:
        assert main(shlex.split(command)[1:]) == 0
    if isinstance(ended.value, SystemExit):  # after a help text
        assert ended.value.code == 0


@pytest.mark.parametrize("page", ["docs/map.md"])
def test_every_name_in_the_map_exists(page: str) -> None:
    rows = re.findall(r"^\|.*\|.*\|(.*)\|$", prose(ROOT / page), flags=re.MULTILINE)
    names = [one for row in rows for one in re.findall(r"`([a-z_.]+(?:\.\w+)+)`", row)]
    assert len(names) > 40
    for dotted in names:
        parts = dotted.split(".")
        found: object = importlib.import_module("ndm")
        for index, part in enumerate(parts):
            if not hasattr(found, part):
                found = importlib.import_module(f"ndm.{'.'.join(parts[: index + 1])}")
            else:
                found = getattr(found, part)
