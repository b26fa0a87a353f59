"""What the sources make of their packages' formats, by hand-worked samples."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib
from pathlib import Path

from moekit_demo.sources.brown import untag
from moekit_demo.sources.debian import _austen, r_strings
from moekit_demo.sources.gensim import _section_questions, plain_wikitext
from moekit_demo.sources.manpages import _extract, plain_roff
from moekit_demo.sources.quiz import _ask, first_reading


def test_brown_loses_its_tags() -> None:
    line = "``/`` It/pps is/bez n't/* 1/2/cd over/rp ''/'' ,/, he/pps said/vbd (/( twice/rb )/) ./."
    assert untag(line) == '" It isn\'t 1/2 over", he said (twice).'.replace('" It', '"It')


def test_wikitext_becomes_prose() -> None:
    markup = (
        "{{Infobox|a={{nested|x}}|b=y}}\n'''Anarchism''' is a [[political philosophy|philosophy]]&lt;ref name=a&gt;"
        "{{cite}}&lt;/ref&gt; of [[state]]s.&lt;!-- no --&gt;\n\n{| class=table\n| cell\n|}\n== History ==\n"
        "* see [http://x.org the site]\n[[File:a.png|thumb|A [[picture]]]]\n[[Category:Ideas]]\n&lt;br/&gt;End."
    )
    assert plain_wikitext(markup) == "Anarchism is a philosophy of states.\n\nHistory\nsee the site\n\nEnd."


def test_roff_becomes_prose() -> None:
    page = (
        '.\\" comment\n.TH LS 1\n.SH BEZEICHNUNG\nls \\- \\fBauf\\fPlisten\n.PP\n.BI "\\-a " DATEI\n\\fI\\,x\\/\\fP\\&.'
    )
    assert plain_roff(page) == "\nBEZEICHNUNG\nls - auflisten\n-a  DATEI\nx."


def test_manual_pages_of_one_language_are_taken(tmp_path: Path) -> None:
    body = gzip.compress(b".SH NAME\n" + b"Wort " * 60)
    short = gzip.compress(b".so man1/other.1")
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in {"de/man1/ls.1.gz": body, "de/man1/l.1.gz": short, "fr/man1/ls.1.gz": body}.items():
            member = tarfile.TarInfo(f"./usr/share/man/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    content = data.getvalue()
    header = f"{'data.tar.xz':<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}".encode() + b"`\n"
    (tmp_path / "m.deb").write_bytes(b"!<arch>\n" + header + content)
    assert [(p.name, p.text.count("Wort")) for p in _extract("de")(tmp_path / "m.deb")] == [("ls.1", 60)]


def _r_string(text: str) -> bytes:
    return b"\x00\x04\x00\x09" + struct.pack(">i", len(text.encode())) + text.encode()


def test_strings_of_r_are_found() -> None:
    serialized = b"X\n\x00\x00\x00\x03" + _r_string("It is a truth") + _r_string("") + _r_string("universally — so")
    assert list(r_strings(serialized)) == ["It is a truth", "", "universally — so"]


def test_novels_are_cut_into_chapters(tmp_path: Path) -> None:
    lines = ["EMMA", "CHAPTER I", *["word " * 20] * 80, "CHAPTER II", *["other " * 20] * 80]
    records = b""
    for strings in (lines, ["too short"]):
        stream = zlib.compress(b"".join(map(_r_string, strings)))
        records += struct.pack(">I", len(stream)) + stream
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("janeaustenr/data/Rdata.rdb")
        member.size = len(records)
        archive.addfile(member, io.BytesIO(records))
    pieces = list(_austen(tmp_path / "a.tgz"))
    assert [p.text.split("\n")[0] for p in pieces] == ["EMMA", "CHAPTER I", "CHAPTER II"]
    assert "other" not in pieces[1].text


def test_the_plainest_reading_of_an_answer() -> None:
    assert first_reading("lion|tiger|bear") == "lion"
    assert first_reading("Andorra la V[ell|iej]a") == "Andorra la Vella"
    assert first_reading("{saguaro }cactus") == "saguaro cactus"
    assert first_reading("{J{ohn} }Adams") == "John Adams"


def test_quiz_choices_hold_one_right_answer() -> None:
    rows = [("cub", "lion|tiger"), ("kitten", "cat"), ("cub", "fox"), ("calf", "cow"), ("foal", "horse|tiger")]
    questions = {p.name: p.text for p in _ask("babies", "young", rows, "A {} is the young of a")}
    assert len(questions) == 5
    for name in ("babies-0", "babies-2"):  # both animals of "cub" are right, so neither may be a wrong choice
        assert ('" lion"' in questions[name]) != ('" fox"' in questions[name])


def test_analogies_never_offer_the_words_of_the_question() -> None:
    import json

    rows = [["Athens", "Greece", "Oslo", "Norway"], ["Oslo", "Norway", "Athens", "Greece"], ["a", "b", "c", "d"]]
    rows += [["e", "f", "g", "h"], ["i", "j", "k", "l"]]
    for piece in _section_questions("capitals", rows):
        fields = json.loads(piece.text)
        words = fields["context"].replace(" is to", "").replace(" as", "").split()
        row = next(r for r in rows if r[:3] == words)
        assert fields["choices"][fields["answer"]] == f" {row[3]}"
        assert f" {row[1]}" not in fields["choices"]
        assert len(set(fields["choices"])) == 4
