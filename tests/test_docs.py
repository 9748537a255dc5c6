"""The documentation: its generated pages are those of the source, and its links lead somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from espalier import registry
from espalier.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md") if page.exists()]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_of_methods_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "build.py"), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def rules(results: Path) -> str:
    """The page of which one to use, from a folder of results."""
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.RESULTS = results
    page: str = build.choosing(False)
    return page


def test_which_one_to_use_says_what_was_not_measured(tmp_path: Path) -> None:
    page = rules(tmp_path)
    assert page.count("ot measured yet") == 4
    assert "Optimizers without a loss: adabelief, adafactor, adamw" in page


def test_which_one_to_use_follows_from_the_tables(tmp_path: Path) -> None:
    common = {"deviation": 0.01, "forgetting": 0.0, "edge": False, "system": "ours", "base loss": 3.0, "trained": 1, "rate": 2e-3}
    rows = [
        {**common, "method": "full", "loss": 2.0, "bytes": 1000 << 20},
        {**common, "method": "lisa", "loss": 2.005, "bytes": 900 << 20},
        {**common, "method": "lora", "loss": 2.05, "bytes": 1 << 20, "edge": True},
        {**common, "method": "ia3", "loss": 2.5, "bytes": 1 << 10},
        {**common, "method": "vera", "loss": 2.6, "bytes": 2 << 10},
    ]
    states = [{"setting": "adamw", "loss": 1.5, "deviation": 0.01, "state bytes": 800 << 20}]
    states += [{"setting": "fira", "loss": 1.52, "deviation": 0.01, "state bytes": 300 << 20}, {"setting": "galore", "loss": 1.6, "deviation": 0.01, "state bytes": 299 << 20}]
    (tmp_path / "compare.json").write_text(json.dumps({"package": {"rows": rows}}))
    (tmp_path / "optim.json").write_text(json.dumps({"3m": {"rows": states}}))
    page = rules(tmp_path)
    assert "whatever it costs: **full** (loss 2.0000 ± 0.0100, from 3.0000). No worse beyond the deviation over seeds: lisa." in page
    assert "A small delta: **lora** (loss 2.0500 ± 0.0100) has 95% of the best one's gain in 1.0 MiB" in page
    assert "The smallest delta on the front: **ia3**" in page and "| vera |" not in page
    assert "perhaps better than shown: lora." in page
    assert "the best here is 10 times the default in the median (0.5 to 100 times)" in page  # of vera 4e-3, ia3 3e-3, lora 2e-4, full and lisa 2e-5
    assert "within 2 % of the lowest loss: **fira**" in page and "Least state of all: **galore**" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file_and_every_anchor_to_a_heading(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {link}; {target.name} has no such heading"


def options(verb: str) -> dict[str, set[str]]:
    """Parameter name -> its spellings on the command line, of a verb's command; arguments left out."""
    command = importlib.import_module(f"espalier.cli.{verb.replace(' ', '_')}").command
    return {p.name: {*p.opts, *p.secondary_opts} for p in command.params if p.param_type_name == "option"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_with_all_its_options_and_none_that_does_not_exist(verb: str) -> None:
    page = f"docs/{verb.replace(' ', '-')}.md"
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    of_methods = {h.name for info in registry.methods() for h in info.hyperparameters}
    of_methods |= {f"{part}_{name}" for part in registry.PARTS for name in of_methods}
    own = {name: spelt for name, spelt in options(verb).items() if name not in of_methods}
    missing = [name for name, spelt in own.items() if not spelt <= named]
    assert not missing, f"{page} does not name the options {', '.join(missing)}"
    known = {spelt for other in VERBS for spellings in options(other).values() for spelt in spellings}
    assert named <= known, f"{page} names {', '.join(sorted(named - known))}, which no verb has"


def test_the_method_of_the_contributing_page_trains_as_a_plugin(tmp_path: Path) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    plugin = tmp_path / "lora_fa.py"
    plugin.write_text(source)
    (tmp_path / "text.txt").write_text("def double(x):\n    return 2 * x\n" * 20)
    command = [sys.executable, "-m", "espalier", "tune", "--plugin", str(plugin), "--method", "lora-fa", "--rank", "4", "--json"]
    command += ["--model", "seedling", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), "--steps", "2"]
    command += ["--batch-size", "1", "--sequence-length", "32", "--threads", "1", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["method"] == "lora-fa" and result["steps"] == 2
    manifest = json.loads((tmp_path / "out" / "delta.json").read_text())
    assert manifest["hyperparameters"] == {"rank": 4, "alpha": 32.0}
