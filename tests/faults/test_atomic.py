"""Whatever kills a writer, its target is the old folder or the new one, and the next run cleans up."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moekit.checkpoint import atomic
from moekit.checkpoint.atomic import atomic_folder, atomic_write, is_disk_full
from moekit.checkpoint.expected import verify
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.model import save
from moekit.checkpoint.record import Record
from moekit.errors import BadConfig, OutOfBudget
from tests.checkpoints import saved
from tests.families import build

ROOT = Path(__file__).resolve().parents[2]

# Writes folders whose files all hold the same number, again and again; prints a dot when it starts.
WRITER = """
import sys
from pathlib import Path
from moekit.checkpoint.atomic import atomic_folder
target, generation = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    generation += 1
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "sub").mkdir()
        for number in range(6):
            (folder / ("sub" if number % 2 else ".") / f"{number}.txt").write_text(str(generation) * 2000)
"""


def start(code, *arguments):
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )


def content(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_text() for p in files}


def leftovers(parent, name="model"):
    return [p.name for p in parent.iterdir() if p.name != name]


def generation_of(folder):
    """The number that all six files agree on; fails if the folder is mixed or incomplete."""
    texts = content(folder)
    assert len(texts) == 6, sorted(texts)
    assert len(set(texts.values())) == 1
    text = next(iter(texts.values()))
    size = len(text) // 2000
    assert text == text[:size] * 2000
    return int(text[:size])


def write_old(target):
    (target / "sub").mkdir(parents=True)
    for number in range(6):
        (target / ("sub" if number % 2 else ".") / f"{number}.txt").write_text("1" * 2000)


@pytest.mark.parametrize("two_steps", [False, True], ids=["exchange", "two-renames"])
def test_kill_at_random_moments_leaves_old_or_new(tmp_path, two_steps):
    code = "import moekit.checkpoint.atomic as a; a._exchange = lambda *_: False\n" + WRITER if two_steps else WRITER
    target = tmp_path / "model"
    write_old(target)
    moments = random.Random(0)
    generation = 1
    for _ in range(8):
        process = start(code, target, generation)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0.0, 0.12))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if two_steps and not target.exists():  # killed between the two renames: the next writer gives it back
            with pytest.raises(BadConfig, match="exists"), atomic_folder(target):
                pass
        found = generation_of(target)
        assert found >= generation
        generation = found
    assert generation > 1  # some write had completed: the test did test something
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "x").write_text("x")
    assert leftovers(tmp_path) == []
    assert content(target) == {"x": "x"}


def fork(work):
    """Run `work` in a forked child, which shares the imported libraries and so starts at once."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return pid


def save_forever(target, begun):
    model = build("olmoe", seed=2)
    os.write(begun, b".")
    while True:
        save(model, target, record=Record(command="again"), overwrite=True)


def test_kill_in_the_middle_of_saving_a_model(tmp_path):
    target = saved(tmp_path / "model", "olmoe")
    old = Checkpoint.open(target).fingerprint
    seen, moments = set(), random.Random(1)
    began = time.monotonic()
    save(build("olmoe"), tmp_path / "timed", record=Record(command="timed"))
    lasts = time.monotonic() - began
    shutil.rmtree(tmp_path / "timed")
    for _ in range(12):
        read, write = os.pipe()
        pid = fork(lambda begun=write: save_forever(target, begun))
        os.read(read, 1)
        time.sleep(moments.uniform(0, 3) * lasts)  # however busy the machine is, some kills hit the first save
        os.kill(pid, signal.SIGKILL)
        os.close(read)
        os.close(write)
        os.waitpid(pid, 0)
        checkpoint = Checkpoint.open(target)
        verify(checkpoint)
        assert checkpoint.record.fingerprint == checkpoint.fingerprint
        seen.add(checkpoint.fingerprint)
    assert len(seen | {old}) == 2  # the old model and the new one, nothing else
    save(build("olmoe"), target, record=Record(command="last"), overwrite=True)
    assert leftovers(tmp_path) == []


def test_a_kill_between_the_two_renames_is_mended(tmp_path):
    target = tmp_path / "model"
    write_old(target)
    before = content(target)
    os.rename(target, tmp_path / ".model.moekit-old-4711")
    (tmp_path / ".model.moekit-tmp-4711-00").mkdir()
    with pytest.raises(BadConfig, match="exists"), atomic_folder(target):
        pass
    assert content(target) == before
    assert leftovers(tmp_path) == []


def half_write(target, error):
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "half").write_text("x")
        raise error


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_errors_leave_the_old_folder(tmp_path, kind):
    target = tmp_path / "model"
    write_old(target)
    before = content(target)
    with pytest.raises(kind):
        half_write(target, kind)
    assert content(target) == before
    assert leftovers(tmp_path) == []


def test_nothing_shows_before_the_end(tmp_path):
    target = tmp_path / "deep" / "er" / "model"
    with atomic_folder(target) as folder:
        (folder / "x").write_text("x")
        assert not target.exists()
        assert folder.parent == target.parent  # the same file system: the final rename cannot fail for that
    assert content(target) == {"x": "x"}


def test_an_empty_folder_may_be_filled(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    with atomic_folder(target) as folder:
        (folder / "x").write_text("x")
    assert content(target) == {"x": "x"}


def test_a_linked_target_is_followed(tmp_path):
    real = tmp_path / "disk" / "model"
    write_old(real)
    (tmp_path / "model").symlink_to(real)
    with atomic_folder(tmp_path / "model", overwrite=True) as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "model").is_symlink()
    assert content(real) == {"x": "x"}


def test_files_and_precious_folders_are_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadConfig, match="in the way"), atomic_folder(tmp_path / "file", overwrite=True):
        pass
    work = tmp_path / "work" / "here"
    work.mkdir(parents=True)
    (work / "thesis.txt").write_text("x")
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    monkeypatch.chdir(work)
    for precious in (work, work.parent, tmp_path / "repo"):
        with pytest.raises(BadConfig, match="more than a model"), atomic_folder(precious, overwrite=True):
            pass
    assert (work / "thesis.txt").exists()


def test_where_nobody_may_write(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadConfig, match="cannot be made"), atomic_folder(tmp_path / "file" / "model"):
        pass


HOLDER = """
import sys, time
from moekit.checkpoint.atomic import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "by").write_text("holder")
"""


def test_the_second_process_fails_and_names_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "LOCK_WAIT_SECONDS", 0.2)
    target = tmp_path / "model"
    process = start(HOLDER, target, 30)
    try:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(BadConfig, match=f"process {process.pid} is writing"), atomic_folder(target):
            pass
        with atomic_folder(tmp_path / "other") as folder:  # another folder is no concern of that lock
            (folder / "x").write_text("x")
    finally:
        process.kill()
        process.wait()
    with atomic_folder(target) as folder:  # the lock died with its holder
        (folder / "by").write_text("us")
    assert content(target) == {"by": "us"}
    assert leftovers(tmp_path) == ["other"]


def test_the_second_process_waits_for_a_short_while(tmp_path):
    target = tmp_path / "model"
    process = start(HOLDER, target, 0.3)
    assert process.stdout.readline() == b"ready\n"
    with atomic_folder(target, overwrite=True) as folder:
        assert content(target) == {"by": "holder"}
        (folder / "by").write_text("us")
    assert process.wait() == 0
    assert content(target) == {"by": "us"}


RACER = """
import sys
from moekit.checkpoint.atomic import atomic_folder
from moekit.errors import BadConfig
who, written = sys.argv[2], 0
for _ in range(40):
    try:
        with atomic_folder(sys.argv[1], overwrite=True) as folder:
            for number in range(4):
                (folder / str(number)).write_text(who)
        written += 1
    except BadConfig:
        pass
print(written)
"""


def read_at_one_moment(target):
    """The four files of whatever folder the name means right now; None if it was swapped away meanwhile."""
    try:
        descriptor = os.open(target, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        texts = set()
        for number in range(4):
            file = os.open(str(number), os.O_RDONLY, dir_fd=descriptor)
            texts.add(os.read(file, 10))
            os.close(file)
        return texts
    except FileNotFoundError:
        return None
    finally:
        os.close(descriptor)


def test_two_writers_never_interleave(tmp_path):
    target = tmp_path / "model"
    processes = [start(RACER, target, who) for who in "ab"]
    seen = 0
    while any(process.poll() is None for process in processes):
        texts = read_at_one_moment(target)
        assert texts is None or len(texts) == 1
        seen += texts is not None
    written = [int(process.communicate()[0]) for process in processes]
    assert min(written) > 0
    assert seen > 0
    assert len(set(content(target).values())) == 1
    assert leftovers(tmp_path) == []


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_out_of_budget_and_leaves_the_old(tmp_path):
    target = tmp_path / "model"
    write_old(target)
    before = content(target)
    with pytest.raises(OutOfBudget, match="disk is full") as caught:
        half_write(target, OSError(errno.ENOSPC, "No space left on device"))
    assert caught.value.exit_code == 4
    assert "bytes are free" in str(caught.value)
    assert content(target) == before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("step", ["settle", "_swap_in"])
def test_a_disk_that_fills_up_at_the_very_end(tmp_path, monkeypatch, step):
    monkeypatch.setattr(atomic, step, full)
    with pytest.raises(OutOfBudget), atomic_folder(tmp_path / "model") as folder:
        (folder / "x").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_at_every_step_of_a_save_leaves_the_old_model(tmp_path, monkeypatch):
    """The 1st, 2nd, ... nth call that touches the disk fails; the last one, when nothing is left to fail, succeeds."""
    model, target = build("olmoe", seed=1), saved(tmp_path / "model", "olmoe")
    old = Checkpoint.open(target).fingerprint
    calls = {"left": 0}

    def counted(function):
        def call(*arguments, **keywords):
            calls["left"] -= 1
            if calls["left"] == 0:
                full()
            return function(*arguments, **keywords)

        return call

    for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (atomic, "_exchange")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    failed = 0
    for step in range(1, 200):
        calls["left"] = step
        try:
            save(model, target, record=Record(command="x"), overwrite=True)
        except OutOfBudget:
            failed += 1
            assert Checkpoint.open(target).fingerprint == old
        else:  # nothing failed, or only what need not succeed: the new model is there in full
            assert Checkpoint.open(target).fingerprint != old
            if calls["left"] > 0:
                break
            save(build("olmoe"), target, record=Record(command="x"), overwrite=True)
        assert leftovers(tmp_path) == []
    assert failed > 8
    verify(Checkpoint.open(target))


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    need = shutil.disk_usage(tmp_path).free * 2
    with pytest.raises(OutOfBudget, match=f"{need:,} bytes are needed"), atomic_folder(tmp_path / "m", need_bytes=need):
        pytest.fail("must not start")
    assert list(tmp_path.iterdir()) == []


def save_within_limit(target):
    model = build("olmoe", seed=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        save(model, target, record=Record(command="x"), overwrite=True)
    except OutOfBudget as error:
        return error.exit_code
    return 0


def test_a_real_save_against_a_real_limit(tmp_path):
    target = saved(tmp_path / "model", "olmoe")
    before = Checkpoint.open(target).fingerprint
    _, status = os.waitpid(fork(lambda: save_within_limit(target)), 0)
    assert os.waitstatus_to_exitcode(status) == 4
    assert Checkpoint.open(target).fingerprint == before
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small file system needs root")
def test_a_real_save_onto_a_real_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", disk], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        with pytest.raises(OutOfBudget, match="bytes are needed"):
            save(build("olmoe"), disk / "model", record=Record(command="x"))
        with pytest.raises(OutOfBudget, match="writing failed"), atomic_folder(disk / "model") as folder:
            (folder / "big").write_bytes(bytes(200_000))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_other_errors_are_not_taken_for_a_full_disk():
    assert is_disk_full(OSError(errno.ENOSPC, "full"))
    assert not is_disk_full(OSError(errno.EACCES, "no"))
    assert not is_disk_full(ValueError("os error 28)"))


def test_safetensors_own_word_for_a_full_disk():
    from safetensors import SafetensorError

    assert is_disk_full(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(SafetensorError("Error while deserializing header"))


def test_atomic_write_replaces_or_keeps(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_write(path, "one")
    atomic_write(path, b"two")
    assert path.read_text() == "two"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfBudget):
        atomic_write(path, "three")
    assert path.read_text() == "two"
    assert leftovers(tmp_path, "a.json") == []


def test_atomic_write_removes_what_a_killed_run_left(tmp_path):
    process = start("print()")
    process.wait()
    dead, alive = (tmp_path / f".a.json.moekit-tmp-{pid}-00" for pid in (process.pid, os.getpid()))
    dead.write_text("x")
    alive.write_text("x")
    atomic_write(tmp_path / "a.json", "one")
    assert not dead.exists()
    assert alive.exists()


def test_names_with_wildcards_clean_only_their_own(tmp_path):
    innocent = tmp_path / ".model1.moekit-tmp-1-00"
    innocent.mkdir()
    with atomic_folder(tmp_path / "model[1]") as folder:
        (folder / "x").write_text("x")
    assert innocent.exists()
    assert content(tmp_path / "model[1]") == {"x": "x"}
