"""Texts among the test data of the PyPI wheel `gensim`: news, Wikipedia in English and Bulgarian, word analogies."""

from __future__ import annotations

import bz2
import html
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from moekit.data.sources import Piece, as_json
from moekit_demo.base import PackagedText
from moekit_demo.packages import read_members

FOLDER = "gensim/test/test_data/"
NEWS_PER_DOCUMENT = 5
QUESTIONS_PER_SECTION = 60
MIN_ARTICLE_CHARACTERS = 500

_PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_REFERENCE = re.compile(r"<(ref|math|gallery|timeline|code|source)\b[^>]*?(?:/>|>.*?</\1>)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", re.DOTALL)
# [[File:..]], [[Category:..]], [[fr:..]]: links with a prefix are no text (unless they start with a colon).
_PREFIXED = re.compile(r"\[\[[^\[\]:|]+:(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]")
_LINK = re.compile(r"\[\[:?(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?:|//)\S*\s?([^\]]*)\]")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.MULTILINE)
_QUOTES = re.compile(r"'{2,}")
_BLANKS = re.compile(r"\n{3,}")


def plain_wikitext(markup: str) -> str:
    """Plain text of MediaWiki markup; templates, tables, references and files are left out."""
    text = _COMMENT.sub("", html.unescape(markup))
    text = _REFERENCE.sub("", text)
    previous = None
    while text != previous:  # innermost first
        previous, text = text, _TEMPLATE.sub("", text)
    text = _PREFIXED.sub("", text)
    text = _LINK.sub(r"\1", text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _QUOTES.sub("", _HEADING.sub(r"\1", _TAG.sub("", text)))
    lines = (line.lstrip("*#:; ").rstrip() for line in html.unescape(text).splitlines())
    kept = (line for line in lines if not line.startswith(("|", "{|", "!", "__")))
    return _BLANKS.sub("\n\n", "\n".join(kept)).strip()


def _wikipedia(member: str, encoding: str) -> Callable[[Path], Iterator[Piece]]:
    def extract(archive: Path) -> Iterator[Piece]:
        for _, content in read_members(archive, lambda name: name == FOLDER + member):
            for title, markup in _PAGE.findall(bz2.decompress(content).decode(encoding)):
                text = plain_wikitext(markup)
                if len(text) >= MIN_ARTICLE_CHARACTERS and not markup.lstrip().startswith("#"):
                    yield Piece(title, f"{title}\n\n{text}")

    return extract


def _news(archive: Path) -> Iterator[Piece]:
    for _, content in read_members(archive, lambda name: name == FOLDER + "lee_background.cor"):
        items = content.decode("utf-8", "replace").splitlines()
        for start in range(0, len(items), NEWS_PER_DOCUMENT):
            yield Piece(f"news-{start}", "\n\n".join(line.strip() for line in items[start : start + NEWS_PER_DOCUMENT]))


def _analogies(archive: Path) -> Iterator[Piece]:
    """Each quadruple "a b c d" asks for d among four words that stand in the same place of the section."""
    for _, content in read_members(archive, lambda name: name == FOLDER + "questions-words.txt"):
        sections: dict[str, list[list[str]]] = {}
        for line in content.decode().splitlines():
            if line.startswith(":"):
                rows = sections.setdefault(line[1:].strip(), [])
            elif len(words := line.split()) == 4:
                rows.append(words)
        for section, rows in sections.items():
            yield from _section_questions(section, rows)


def _section_questions(section: str, rows: list[list[str]]) -> Iterator[Piece]:
    chance = random.Random(section)
    answers = sorted({row[3] for row in rows})
    for number, (a, b, c, d) in enumerate(chance.sample(rows, min(QUESTIONS_PER_SECTION, len(rows)))):
        wrong = chance.sample([word for word in answers if word not in (b, d)], 3)
        choices = [d, *wrong]
        chance.shuffle(choices)
        context = f"{a} is to {b} as {c} is to"
        task = "analogies-grammar" if section.startswith("gram") else "analogies-meaning"
        yield Piece(f"{section}-{number}", as_json(context, [f" {w}" for w in choices], choices.index(d), task))


_VERSION = "4.4.0"
_BYTES = 27_809_988

SOURCES = (
    PackagedText(
        name="news",
        domain="english-news",
        licence="test data of gensim (LGPL-2.1); news of the Australian Broadcasting Corporation",
        extract=_news,
        client="pip",
        packages=("gensim",),
        version=_VERSION,
        sha256="d70312a5b9d088178232fd4d295246dba676c200df91cc313f85a4774e32c4d0",
        download_bytes=_BYTES,
    ),
    PackagedText(
        name="wikipedia",
        domain="english-encyclopedia",
        licence="CC-BY-SA-3.0",
        extract=_wikipedia("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2", "utf-8"),
        client="pip",
        packages=("gensim",),
        version=_VERSION,
        sha256="fa3252c482789b54aab8b9b262978bb7bf67faa571d5b51d94540bdc4f96e2af",
        download_bytes=_BYTES,
    ),
    PackagedText(
        name="wikipedia-bg",
        domain="bulgarian-encyclopedia",
        licence="CC-BY-SA-3.0",
        extract=_wikipedia("bgwiki-latest-pages-articles-shortened.xml.bz2", "utf-16"),
        client="pip",
        packages=("gensim",),
        version=_VERSION,
        sha256="93f41d4841c8ba6039853db85544611f85cb8ec6c088f1a4ad63572f26ce1d54",
        download_bytes=_BYTES,
    ),
    PackagedText(
        name="analogies",
        domain="analogies",
        licence="Apache-2.0 (word2vec's question set)",
        extract=_analogies,
        client="pip",
        packages=("gensim",),
        version=_VERSION,
        download_bytes=_BYTES,
        kind="questions",
    ),
)
