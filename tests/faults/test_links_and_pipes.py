"""What a stranger laid where we read or write: links are not followed out, pipes and devices are not opened."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moekit._files import open_own, open_regular, read_bytes, read_text, require_own_folder
from moekit.checkpoint.atomic import atomic_folder, atomic_write
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.header import read_header
from moekit.checkpoint.record import Record
from moekit.errors import BadCheckpoint, BadConfig, OutOfBudget, UnsafeInput
from moekit.jobs.undo import find_parent, undo
from tests.checkpoints import edit_json, plain, saved

SOURCE = Path(__file__).resolve().parents[2] / "src" / "moekit"


# --- writing


@pytest.mark.parametrize("how", ["symbolic", "hard", "pipe", "dangling"])
def test_a_lock_that_leads_elsewhere_is_refused_and_its_victim_whole(tmp_path: Path, how: str) -> None:
    victim, lock = tmp_path / "victim", tmp_path / ".out.moekit-lock"
    victim.write_text("precious")
    if how == "pipe":
        os.mkfifo(lock)
    elif how == "hard":
        os.link(victim, lock)
    else:
        lock.symlink_to(victim if how == "symbolic" else tmp_path / "new")
    with pytest.raises(UnsafeInput, match="link") as caught, atomic_folder(tmp_path / "out"):
        pass
    assert str(lock) in str(caught.value)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "out").exists()


def test_leftovers_that_are_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("precious")
    for kind in ("tmp-1-aa", "old-1"):
        (tmp_path / f".out.moekit-{kind}").symlink_to(kept)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("y")
    assert (kept / "file").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "out"]


def test_a_folder_for_half_done_work_may_hold_no_links(tmp_path: Path) -> None:
    victim, scratch = tmp_path / "victim", tmp_path / "scratch"
    victim.write_text("precious")
    require_own_folder(scratch)  # nothing there yet
    (scratch / "deep").mkdir(parents=True)
    (scratch / "deep" / "layer-0.safetensors").write_text("ours")
    require_own_folder(scratch)
    (scratch / "deep" / "layer-1.safetensors").symlink_to(victim)
    with pytest.raises(UnsafeInput, match="link"):
        require_own_folder(scratch)
    (scratch / "deep" / "layer-1.safetensors").unlink()
    os.link(victim, scratch / "deep" / "layer-1.safetensors")
    with pytest.raises(UnsafeInput, match="link"):
        require_own_folder(scratch)
    (tmp_path / "linked").symlink_to(scratch)
    with pytest.raises(UnsafeInput, match="link"):
        require_own_folder(tmp_path / "linked")


def test_a_file_of_our_own_is_made_by_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        os.close(open_own(tmp_path / "own"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o640


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_follows_the_umask(tmp_path: Path, umask: int) -> None:
    private = tmp_path / "private"
    private.write_text("a file with another name elsewhere keeps its mode")
    private.chmod(0o600)
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "sub").mkdir()
            # safetensors writes through a private temporary file.
            save_file({"a": torch.zeros(2)}, folder / "sub" / "a.safetensors")
            (folder / "b.json").write_text("{}")
            os.close(os.open(folder / "c", os.O_CREAT | os.O_WRONLY, 0o600))
            os.link(private, folder / "linked")
        atomic_write(tmp_path / "single", "x")
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != "linked"]
    assert len(files) == 3
    for path in (*files, tmp_path / "single"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    assert stat.S_IMODE(private.stat().st_mode) == 0o600


# --- reading


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device"])
def test_only_plain_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    for read in (open_regular, read_bytes, read_text, read_header):
        with pytest.raises(UnsafeInput, match="no regular file") as caught:
            read(path)
        assert caught.value.exit_code == 3
        assert caught.value.hint


def test_reading_is_limited(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1234")
    assert read_bytes(tmp_path / "x", limit=4) == b"1234"
    with pytest.raises(UnsafeInput, match="more than the 3 bytes"):
        read_bytes(tmp_path / "x", limit=3)
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "additional_chat_templates/a.jinja"])
def test_a_pipe_where_transformers_would_read_is_refused_as_the_folder_is_opened(tmp_path: Path, name: str) -> None:
    folder = plain(tmp_path / "model", "mixtral")
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UnsafeInput, match="regular file"):
        Checkpoint.open(folder)


# Where a path is opened without `_files`: what the system or this package itself wrote, never what a user names.
_ALLOWED = {
    "_device.py",  # /proc
    "_files.py",
    "_memory.py",  # /proc
    "bench/dispatch/crew.py",  # logs in a temporary folder of its own
    "bench/dispatch/harness.py",
    "bench/dispatch/network.py",  # /proc, /sys
    "bench/dispatch/workers.py",
    "cli/_errors.py",  # /dev/null
    "parallel/checkpoints/ranks.py",  # /proc
    "recipe/packaged.py",  # recipes of this package
    "report/page.py",  # templates of this package
    "report/run_info.py",  # /proc
}


def _opens(tree: ast.AST) -> list[str]:
    """Calls that open a path for reading."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        mode = next((a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)), "")
        opened = name == "open" and isinstance(node.func, ast.Attribute) and mode in ("r", "rb")
        builtin = name == "open" and isinstance(node.func, ast.Name)
        if (name in ("read_text", "read_bytes") and isinstance(node.func, ast.Attribute)) or opened or builtin:
            found.append(f"line {node.lineno}: {name}")
    return found


def test_every_reader_opens_through_one_function() -> None:
    found = {
        str(path.relative_to(SOURCE)): calls
        for path in sorted(SOURCE.rglob("*.py"))
        if str(path.relative_to(SOURCE)) not in _ALLOWED and (calls := _opens(ast.parse(path.read_text())))
    }
    assert not found


# --- undo


@pytest.fixture
def child(tmp_path: Path) -> Path:
    """A checkpoint whose record names a parent."""
    parent = plain(tmp_path / "parent", "mixtral")
    folder = saved(tmp_path / "child", "mixtral", seed=1)
    told = {"parent": str(parent), "parent_fingerprint": Checkpoint.open(parent).fingerprint}
    edit_json(folder / "moekit.json", lambda record: record.update(told))
    return folder


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_undo_follows_no_link_out_of_a_folder(tmp_path: Path, child: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("precious")
    for folder in (child, tmp_path / "parent"):
        (folder / "notes").symlink_to(secret)
        with pytest.raises(UnsafeInput, match="leads out of the folder"):
            undo(child, keep=tmp_path / "kept")
        (folder / "notes").unlink()
        (folder / "sub").symlink_to(tmp_path)
        with pytest.raises(UnsafeInput, match="link"):
            undo(child, keep=tmp_path / "kept")
        (folder / "sub").unlink()
    assert secret.stat().st_nlink == 1
    assert listing(tmp_path) == ["child", "parent", "secret"]


def test_undo_copies_links_that_stay_inside(tmp_path: Path, child: Path) -> None:
    (tmp_path / "parent" / "LICENSE").symlink_to("config.json")
    undo(child, keep=tmp_path / "kept")
    assert json.loads((child / "LICENSE").read_text())["model_type"] == "mixtral"
    assert Record.read(tmp_path / "kept") is not None
    assert Record.read(child) is None


def test_undo_without_proof_is_refused(tmp_path: Path, child: Path) -> None:
    edit_json(child / "moekit.json", lambda record: record.update(parent_fingerprint=None))
    with pytest.raises(BadConfig, match="nothing proves") as caught:
        find_parent(child)
    assert str(tmp_path / "parent") in str(caught.value)


def test_undo_fetches_nothing(child: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(*args: object, local_files_only: bool = False, **rest: object) -> str:
        asked.append(local_files_only)
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    edit_json(child / "moekit.json", lambda record: record.update(parent="org/name"))
    with pytest.raises(BadCheckpoint, match="cannot be opened"):
        find_parent(child)
    assert asked == [True]


def test_undo_on_a_full_disk_changes_nothing_and_can_be_tried_again(
    tmp_path: Path, child: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f.name: f.read_bytes() for f in child.iterdir()}
    link = os.link
    left = [len(before) + 1]  # room for what is kept, and one file more

    def full(*args: object, **more: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        link(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OutOfBudget, match="disk is full") as caught:
        undo(child, keep=tmp_path / "kept")
    assert "nothing was changed" in str(caught.value)
    monkeypatch.undo()
    assert {f.name: f.read_bytes() for f in child.iterdir()} == before
    assert listing(tmp_path) == ["child", "parent"]
    undo(child, keep=tmp_path / "kept")
    with pytest.raises(BadConfig, match="already") as caught:
        undo(tmp_path / "kept", keep=child)
    assert "--overwrite" not in str(caught.value)


def test_errors_name_the_folder_that_was_to_be_written(tmp_path: Path) -> None:
    def damaged(folder: Path) -> None:
        raise BadCheckpoint(f"{folder / 'x'} is damaged", file=folder / "x", hint=f"look at {folder}")

    def ended(work: Callable[[Path], object]) -> Exception:
        with pytest.raises((BadCheckpoint, OSError)) as caught, atomic_folder(tmp_path / "out") as folder:
            work(folder)
        return caught.value

    told = ended(damaged)
    assert (
        str(told) == f"{tmp_path / 'out' / 'x'}: {tmp_path / 'out' / 'x'} is damaged\n  -> look at {tmp_path / 'out'}"
    )
    assert told.args == (f"{tmp_path / 'out' / 'x'} is damaged",)
    missing = ended(lambda folder: os.stat(folder / "nothing"))
    assert missing.filename == str(tmp_path / "out" / "nothing")  # type: ignore[attr-defined]


# --- code on the hub


@pytest.mark.parametrize(
    "change",
    [
        {"_attn_implementation": "evil/attention"},
        {"attn_implementation": "evil/attention@main:flash"},
        {"_experts_implementation": "evil/experts"},
        {"experts_implementation": {"": "eager", "text_config": "evil/experts"}},
        {"text_config": {"_attn_implementation": "paged|evil/attention"}},
    ],
)
def test_a_config_that_names_code_on_the_hub_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    folder = plain(tmp_path / "model", "mixtral")
    edit_json(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(UnsafeInput, match="evil/") as caught:
        Checkpoint.open(folder)
    assert "remove the key" in str(caught.value)
    with pytest.raises(UnsafeInput, match="evil/"):  # the flag alone pins nothing
        Checkpoint.open(folder, allow_remote_code=True)


def test_kernels_are_allowed_where_they_are_pinned_and_wanted(tmp_path: Path) -> None:
    folder = plain(tmp_path / "model", "mixtral")
    pinned = f"good/attention@{'0' * 40}"
    edit_json(folder / "config.json", lambda config: config.update(_attn_implementation=pinned))
    with pytest.raises(UnsafeInput):
        Checkpoint.open(folder)
    Checkpoint.open(folder, allow_remote_code=True)
    edit_json(folder / "config.json", lambda config: config.update(_attn_implementation="sdpa"))
    Checkpoint.open(folder)
