"""Packages are read without being unpacked or run; every trouble with a client names the way out."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moekit.data import available, fetch
from moekit.data.sources import Piece, all_sources, get_source
from moekit.errors import BadData, OutOfBudget
from moekit_demo import base
from moekit_demo.base import PackagedText
from moekit_demo.cache import new_folder
from moekit_demo.packages import cached_package, download, read_members


def tar_bytes(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def deb_bytes(files: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    parts = {"debian-binary": b"2.0\n", "control.tar.gz": b"odd", "data.tar.xz": tar_bytes(files, "w:xz")}
    for name, content in parts.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}".encode() + b"`\n"
        out += header + content + b"\n" * (len(content) % 2)
    return out


FILES = {"./a/one.txt": b"one", "./a/two.bin": b"2", "../escape.txt": b"never written"}


@pytest.mark.parametrize("suffix", [".whl", ".tgz", ".deb"])
def test_members_are_read_in_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"package{suffix}"
    if suffix == ".whl":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in FILES.items():
                archive.writestr(name.removeprefix("./"), content)
    else:
        path.write_bytes(deb_bytes(FILES) if suffix == ".deb" else tar_bytes(FILES))
    found = dict(read_members(path, lambda name: name.endswith(".txt")))
    assert found == {"a/one.txt": b"one", "../escape.txt": b"never written"}
    assert [p.name for p in tmp_path.rglob("*.txt")] == []


@pytest.mark.parametrize("suffix", [".whl", ".tgz", ".deb"])
@pytest.mark.parametrize("content", [b"", b"!<arch>\n", b"nonsense that is no archive at all"])
def test_damaged_packages_are_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"package{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadData) as caught:
        list(read_members(path, lambda name: True))
    assert caught.value.file == str(path)


def test_a_client_delivers(tmp_path: Path, client: Callable[[str, str], None], cache: Path) -> None:
    payload = tmp_path / "payload.tgz"
    payload.write_bytes(tar_bytes({"package/x": b"text"}))
    client(
        "npm",
        f'test "$1 $2 $4" = "pack --ignore-scripts thing@1.2" '
        f" && cp {payload} thing-1.2.tgz && echo >> {tmp_path}/calls",
    )
    path = cached_package("npm", "thing", version="1.2")
    assert path.is_relative_to(cache)
    assert dict(read_members(path, lambda name: True)) == {"package/x": b"text"}
    assert cached_package("npm", "thing", version="1.2") == path
    assert (tmp_path / "calls").read_text() == "\n", "the second time nothing is downloaded"


def test_apt_uses_lists_of_its_own_where_the_machine_has_none(
    tmp_path: Path, client: Callable[[str, str], None], cache: Path
) -> None:
    payload = tmp_path / "payload.deb"
    payload.write_bytes(deb_bytes({"./usr/x": b"text"}))
    client(
        "apt-get",
        f"""case "$*" in
          *State::Lists*update) touch {tmp_path}/updated ;;
          *State::Lists*download*) cp {payload} thing_1_all.deb ;;
          *) echo "E: Unable to locate package thing" >&2; exit 100 ;;
        esac""",
    )
    assert dict(read_members(cached_package("apt", "thing"), lambda name: True)) == {"usr/x": b"text"}
    assert (tmp_path / "updated").exists()


def test_a_failing_client_is_quoted(tmp_path: Path, client: Callable[[str, str], None], cache: Path) -> None:
    client("npm", "echo 'npm error network unreachable' >&2; exit 1")
    with pytest.raises(BadData, match="npm could not download 'thing': npm error network unreachable") as caught:
        cached_package("npm", "thing")
    assert "cache" in str(caught.value.hint)
    assert list(cache.rglob("*thing*")) == []


def test_a_slow_client_is_stopped(tmp_path: Path, client: Callable[[str, str], None]) -> None:
    client("npm", "exec sleep 30")
    with pytest.raises(BadData, match="did not deliver 'thing' within 0 s"):
        download("npm", "thing", tmp_path, timeout=0.3)


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadData, match="comes through apt, which is not on this machine") as caught:
        download("apt", "manpages-de", tmp_path)
    assert "install apt" in str(caught.value.hint)
    infos = {info.name: info for info in available()}
    assert not infos["manpages-de"].obtainable
    assert infos["stdlib"].obtainable


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "thing"

    def fail() -> None:
        with new_folder(target) as part:
            (part / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as part, new_folder(target) as rival:
        (part / "a").write_text("first")
        (rival / "a").write_text("second")
    assert [p.name for p in target.parent.iterdir()] == ["thing"]
    assert (target / "a").read_text() == "second", "the rival ended first and won"


def test_leftovers_of_killed_fetches_are_swept(tmp_path: Path) -> None:
    dead = tmp_path / "cache" / ".part-999999999-x"
    (dead / "deep").mkdir(parents=True)
    with new_folder(tmp_path / "cache" / "thing"):
        pass
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["thing"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutOfBudget, match="the disk is full") as caught, new_folder(tmp_path / "cache" / "thing"):
        raise OSError(28, "No space left on device")
    assert caught.value.exit_code == 4
    assert list((tmp_path / "cache").iterdir()) == []


def _source(pieces: list[Piece], **fields: object) -> PackagedText:
    def extract(_: Path) -> Iterator[Piece]:
        yield from pieces

    return PackagedText(name="made", domain="made", licence="none", extract=extract, **fields)  # type: ignore[arg-type]


def test_a_source_is_recorded_with_its_digest(cache: Path) -> None:
    source = _source([Piece("a", " text\0 "), Piece("blank", " "), Piece("b", "lone \ud800 surrogate")])
    folder = source.fetch()
    record = json.loads((folder / base.RECORD_FILE).read_text())
    assert [*source.pieces()] == [Piece("a", "text"), Piece("b", "lone  surrogate")]
    assert (record["documents"], record["bytes"]) == (2, 4 + 15)
    assert record["text_sha256"] == hashlib.sha256(b"text\0lone  surrogate\0").hexdigest()


def test_another_version_extracts_again(cache: Path) -> None:
    _source([Piece("a", "old")]).fetch()
    newer = _source([Piece("a", "new")])
    assert [p.text for p in newer.pieces()] == ["old"]
    record = cache / "sources" / "made" / base.RECORD_FILE
    record.write_text(record.read_text().replace('"moekit": "', '"moekit": "0.0.'))
    assert not newer.info().cached
    assert [p.text for p in newer.pieces()] == ["new"]
    record.write_text("damaged")
    assert [p.text for p in newer.pieces()] == ["new"]


def test_text_that_is_not_the_known_one_is_refused(cache: Path) -> None:
    with pytest.raises(BadData, match="has the digest"):
        _source([Piece("a", "text")], sha256="0" * 64).fetch()
    with pytest.raises(BadData, match="no text was found"):
        _source([]).fetch()
    with pytest.raises(BadData, match="is not on this machine"):
        _source([Piece("a", "text")], present=lambda: False).fetch()
    assert not (cache / "sources" / "made").exists()


def test_a_damaged_package_is_downloaded_again(tmp_path: Path, client: Callable[[str, str], None], cache: Path) -> None:
    (tmp_path / "bad.tgz").write_bytes(b"damaged")
    (tmp_path / "good.tgz").write_bytes(tar_bytes({"package/x": b"text"}))
    client("npm", f"cp {tmp_path}/$(cat {tmp_path}/which).tgz thing-1.tgz")

    def extract(path: Path) -> Iterator[Piece]:
        for name, content in read_members(path, lambda name: True):
            yield Piece(name, content.decode())

    source = PackagedText("made", "made", "none", extract, client="npm", packages=("thing",))
    (tmp_path / "which").write_text("bad")
    with pytest.raises(BadData, match="damaged"):
        source.fetch()
    (tmp_path / "which").write_text("good")
    assert [*source.pieces()] == [Piece("package/x", "text")]


def test_unknown_sources_name_near_ones() -> None:
    with pytest.raises(BadData, match="no source is called 'smolm2'") as caught:
        fetch("smolm2")
    assert "'smollm2'" in str(caught.value.hint)


def test_every_source_says_what_it_is() -> None:
    infos = {info.name: info for info in available()}
    assert {"smollm2", "news", "wikipedia", "german", "brown", "austen", "kernel-docs", "gcide", "stdlib"} <= set(infos)
    for name, source in all_sources().items():
        info = infos[name]
        assert info.licence
        assert not info.cached
        assert (info.download_bytes > 0) == (info.origin != "this machine")
        assert get_source(name) is source
