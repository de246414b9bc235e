"""The documentation is whole: its links resolve, its tables are complete, and its names exist in the code."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from infra.cli import command_names
from streams.config.settings import keys
from streams.core.features.definitions import Kind
from streams.core.policy import Reason
from streams.telemetry.metrics import Metrics
from streams.wire.actions import RejectReason
from streams.wire.embeddings import EmbeddingBatch, EmbeddingCodec, encode_embeddings
from streams.wire.features import encode_features
from tests.unit.wire.test_embeddings import ONE
from tests.unit.wire.test_features import VALUE, batch_of

ROOT = Path(__file__).parents[2]
FEATURES = batch_of(VALUE, completeness=[{"n": 0.5}], estimated=[("n",)], source_id="topic")
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
"""A Markdown link, not a picture; the group is its target."""
CODE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@cache
def text(page: Path) -> str:
    """Return a page without its code blocks, in which brackets are not links and # is not a heading."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Yield the file and the anchor of each relative link of a page; a link to a folder means its README."""
    for target in LINK.findall(text(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        yield (file / "README.md" if file.is_dir() else file), anchor


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in HEADING.findall(text(page)))
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def name_of(page: Path) -> str:
    """Return a page's path from the root, for the names of tests."""
    return str(page.relative_to(ROOT))


def test_every_page_is_reachable_from_the_readme() -> None:
    """A reader who follows links from README.md can reach each page under docs/."""
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md" and page.exists():
            reached.add(page)
            waiting += [file for file, _ in links(page)]
    assert [name_of(page) for page in PAGES if page not in reached] == []


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=name_of)
def test_links_resolve(page: Path) -> None:
    """Each relative link of the page leads to a file, and each anchor to a heading in it."""
    missing = [str(file) for file, _ in links(page) if not file.exists()]
    lost = [f"{file.name}#{anchor}" for file, anchor in links(page) if anchor and anchor not in anchors(file)]
    assert (missing, lost) == ([], [])


def test_generated_pages_are_up_to_date() -> None:
    """The generated pages of docs/reference are what `python docs/generate.py` writes."""
    for name, content in runpy.run_path(str(DOCS / "generate.py"))["pages"]().items():
        assert (DOCS / name).read_text(encoding="utf-8") == content, f"run python docs/generate.py: {name} is old"


def test_every_command_is_documented() -> None:
    """Each command has a section in the command line page."""
    sections = HEADING.findall(text(DOCS / "reference/cli.md"))
    documented = {heading.split()[1] for heading in sections if heading.startswith("streamformer ")}
    assert documented == set(command_names())


def test_every_make_target_is_documented() -> None:
    """Each target that the Makefile declares has a row in CONTRIBUTING.md."""
    declared = re.findall(r"^\.PHONY:((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = {target for line in declared for target in line.replace("\\", " ").split()}
    rows = set(re.findall(r"^\| `make ([\w-]+)` \|", text(ROOT / "CONTRIBUTING.md"), re.MULTILINE))
    assert "test" in targets
    assert targets - rows == set()


def test_every_alert_has_a_runbook() -> None:
    """Each alert has a section in the page about operation, and each section belongs to an alert."""
    rules = yaml.safe_load((ROOT / "infra/deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"][0][
        "rules"
    ]
    sections = re.findall(r"^### (\w+)$", text(DOCS / "guides/operate.md"), re.MULTILINE)
    assert sections == [rule["alert"] for rule in rules]


def test_every_decision_is_in_the_table() -> None:
    """The index of decisions has one row per record, with the title of the record."""
    rows = dict(re.findall(r"^\| \[\d+\]\(([\w.-]+)\) \| ([^|]+) \|", text(DOCS / "adr/README.md"), re.MULTILINE))
    records = [page for page in PAGES if page.parent.name == "adr" and page.name != "README.md"]
    titles = {page.name: HEADING.findall(text(page))[0].partition(". ")[2] for page in records}
    assert rows == titles


def test_the_counted_numbers_are_those_of_the_code() -> None:
    """The page about tests opens with the numbers that docs/count.py counts."""
    page = text(DOCS / "explanation/testing.md")
    for name, number in runpy.run_path(str(DOCS / "count.py"))["counts"]().items():
        assert f"| {name} | {number:,} |" in page


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=name_of)
def test_settings_and_metrics_that_a_page_names_exist(page: Path) -> None:
    """A setting or metric in a page is one of the code's."""
    groups = {key.partition(".")[0] for key in keys() if "." in key}
    named = set(re.findall(rf"`((?:{'|'.join(groups)})\.[a-z_]+)`", text(page)))
    code = {name for name in named if name.endswith(".py") or (ROOT / name.replace(".", "/")).is_dir()}
    assert named - code - set(keys()) == set()
    series = {metric.name for metric in Metrics()}
    assert set(re.findall(r"`(streamformer_\w+)", text(page))) - series == set()


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=name_of)
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    """A path of the repository in a page leads to something, and a module that it says to run can be found."""
    whole = page.read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:streams|encoder|infra|tests|docs)/[\w./-]*)`", whole))
    modules = set(re.findall(r"python -m ((?:streams|encoder|infra)[\w.]*)", whole))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [module for module in modules if find_spec(module) is None] == []


def test_the_contracts_name_every_reason_and_header() -> None:
    """Each reason for a rejection, each trigger's reason, each codec, kind and header has its place in the page."""
    assert isinstance(ONE, EmbeddingBatch)
    contracts = text(DOCS / "reference/contracts.md")
    [(_, _, headers)] = encode_embeddings(ONE, EmbeddingCodec.FLOAT32)
    [(_, _, of_features)] = encode_features(FEATURES)
    names = [name for name, _ in (*headers, *of_features)]
    named = [*RejectReason, *EmbeddingCodec, *(reason.label for reason in Reason), *names, *Kind]
    assert [name for name in named if f"`{name}`" not in contracts] == []
