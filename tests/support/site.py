"""Hooks of mkdocs, named in mkdocs.yml: the pages of the site that are not files in docs/, and the links to them.

Links in the repository's Markdown lead to files of the repository, so that they work on GitHub. On the site, the pages
beside docs/ have the paths in ROOT_PAGES, and every other file or folder that a page links is a page in source/.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tests.support import references

log = logging.getLogger("mkdocs.plugins.site")
"""A warning here fails `mkdocs build --strict`."""

ROOT = Path(__file__).parents[2]

ROOT_PAGES: Mapping[str, str] = {
    "README.md": "index.md",
    "BENCHMARKS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "threat-model.md",
    "examples/README.md": "examples.md",
}
"""Pages of the site by their path in the repository."""

DECISIONS = "decisions/index.md"
"""The page that links all decisions."""

SOURCE = "source/"
"""The folder of the site with the files of the repository that pages link."""

LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")

CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace each folder in the nav by its pages."""
    for section in config.nav or []:
        for title, entry in section.items():
            if isinstance(entry, list):
                section[title] = [each for item in entry for each in _pages_of(item)]
    return config


def _pages_of(entry: Any) -> list[Any]:
    if not isinstance(entry, str) or not entry.endswith("/"):
        return [entry]
    return sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / entry).glob("*.md"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are generated, and those of files outside docs/."""
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for name, page in ROOT_PAGES.items():
        texts[name] = (ROOT / name).read_text()
        files.append(File.generated(config, page, content=texts[name]))
    for page, generate in references.PAGES.items():
        files.append(File.generated(config, page, content=generate()))
    files.append(File.generated(config, DECISIONS, content=_list_of_decisions(files)))
    linked = {_target(name, link) for name, text in texts.items() for link in _links(text)}
    for target in linked - texts.keys():
        if not target.startswith("docs/") and (ROOT / target).exists():
            files.append(File.generated(config, f"{SOURCE}{target}.md", content=_source_page(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links to files of the repository links to pages of the site."""
    name = _repository_path(page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri)

    def of_the_site(link: re.Match[str]) -> str:
        return posixpath.relpath(_site_path(_target(name, link[1])), folder or ".")

    # Every second part is code.
    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(of_the_site, part) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Refuse what GitHub and the site render differently: a list that follows a paragraph without an empty line."""
    if found := re.search(r"<p>[^<]*\n(?:[-*]|\d+\.) .*", html):
        log.warning("%s: the list needs an empty line before it: %s", page.file.src_uri, found[0])
    return html


def _links(text: str) -> list[str]:
    return [link for part in CODE.split(text)[::2] for link in LINK.findall(part)]


def _target(name: str, link: str) -> str:
    """Return what the page `name` links, as a path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _repository_path(page: str) -> str:
    """Return the path in the repository of a page of the site."""
    return next((name for name, each in ROOT_PAGES.items() if each == page), f"docs/{page}")


def _site_path(target: str) -> str:
    """Return the path of the page of the site that shows a file or folder of the repository."""
    if target in ROOT_PAGES:
        return ROOT_PAGES[target]
    if target == "docs/decisions":
        return DECISIONS
    return target.removeprefix("docs/") if target.startswith("docs/") else f"{SOURCE}{target}.md"


def _list_of_decisions(files: Files) -> str:
    pages = sorted(each.src_uri for each in files.documentation_pages() if each.src_uri.startswith("decisions/"))
    titles = {page: (ROOT / "docs" / page).read_text().partition("\n")[0].lstrip("# ") for page in pages}
    return "# Decisions\n\n" + "".join(f"* [{title}]({posixpath.basename(page)})\n" for page, title in titles.items())


def _source_page(target: str) -> str:
    """Return a page with the code of a file, or of all files in a folder."""
    path = ROOT / target
    found = [path] if path.is_file() else path.rglob("*")
    paths = sorted(each for each in found if each.is_file() and each.suffix != ".pyc")
    parts = ["---\nsearch:\n  exclude: true\n---", f"# {target}"]
    for each in paths:
        text = each.read_text()
        if each != path:
            parts.append(f"## {each.relative_to(path)}")
        language = each.suffix[1:] or each.name.lower()
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
        parts.append(f"{fence}{language}\n{text.rstrip()}\n{fence}")
    return "\n\n".join(parts) + "\n"
