"""Read a rendered report with the standard library's parser alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input", "hr"}
LOADS = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}


@dataclass
class Page:
    """What stands in a page.

    Attributes:
        problems: tags that are not balanced.
        tags: every tag that opens.
        ids: every id, with repetitions.
        loads: (tag, attribute, value) of every attribute that could load something.
        tables: every table as rows of cell texts.
        text: all text outside of style elements.
    """

    problems: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    attributes: set[str] = field(default_factory=set)
    loads: list[tuple[str, str, str]] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    text: str = ""


def read_page(html: str) -> Page:
    """Parse a page."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    reader.page.problems += [f"<{tag}> is never closed" for tag in reader.stack]
    return reader.page


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "table":
            self.page.tables.append([])
        elif tag == "tr":
            self.page.tables[-1].append([])
        elif tag in ("td", "th"):
            self.page.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack[-1] != tag:
            self.page.problems.append(f"</{tag}> at {self.getpos()}, open are {self.stack[-4:]}")
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" in self.stack:
            return
        self.page.text += data
        if self.stack and {"td", "th"} & set(self.stack):
            self.page.tables[-1][-1][-1] += data

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.page.tags.append(tag)
        for name, value in attrs:
            self.page.attributes.add(name)
            if name == "id":
                self.page.ids.append(value or "")
            if name in LOADS:
                self.page.loads.append((tag, name, value or ""))
