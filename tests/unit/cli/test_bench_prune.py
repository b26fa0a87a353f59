"""`moekit bench prune` as a user calls it, and a method of another package that takes part by being installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moekit.bench.pruning import PruneBenchResult
from tests.commands import Moekit
from tests.contracts import FULL
from tests.processes import python
from tests.tiny import write_model, write_text

ROOT = Path(__file__).resolve().parents[3]
# The whole package: one file.
PLUGIN = '''
"""Keep the experts with the largest numbers."""
import torch
from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod
from pydantic import Field


@register(name="latest", kind="prune", needs=("load",), changes="weights", limits=("Nobody needs it.",))
class Latest(PruneMethod):
    """Keep the experts with the largest numbers, or with the smallest if it is told to. It shows how another package
    adds a method to moekit in one file; choose it for nothing."""

    reverse: bool = Field(default=False, description="keep the smallest numbers instead")

    def score(self, inputs):
        order = torch.arange(inputs.experts, dtype=torch.float64)
        return -order if self.reverse else order
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe")
    write_text(folder / "text")
    write_text(folder / "heldout", documents=3)
    return folder


def options(made: Path, out: Path, *more: Any) -> list[Any]:
    model = ["bench", "prune", made / "moe", "--data", made / "text", "--heldout", made / "heldout", "--out", out]
    small = ["--seq-len", 32, "--window", 32, "--max-tokens", 600, "--heldout-tokens", 400]
    return [*model, *small, *more]


def test_it_ranks_writes_a_page_and_goes_on_from_what_is_there(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(made, tmp_path / "b", "--methods", "reap,dern", "--domain", "sums", "--seeds", 2)
    done = moekit(*asked, "--set", "dern.alpha=0.1")
    assert done.code == 0, done.err
    assert "50 % of the experts; unchanged" in done.out.replace("\N{NO-BREAK SPACE}", " ")
    assert "decided from sums alone, on not sums" in done.out
    result = PruneBenchResult.load(tmp_path / "b" / "bench.json")
    assert {run.name for run in result.runs} == {"random", "frequency", "reap", "dern"}
    assert len(result.select("random", 0.5)) == 2
    assert result.select("dern", 0.5)[0].settings["alpha"] == 0.1
    assert sum(c.tokens for c in result.calibrations if c.name == "all") <= 600
    page = (tmp_path / "b" / "report.html").read_text()
    assert 'http-equiv="Content-Security-Policy"' in page
    assert json.loads((tmp_path / "b" / "report.json").read_text())["title"] == "Pruning methods, side by side"

    from moekit.bench.pruning import calibration, measuring

    together = []
    own = measuring.compare_variants

    def count(checkpoint: Any, heldout: Any, variants: Any, **more: Any) -> Any:
        together.append(len(variants))
        return own(checkpoint, heldout, variants, **more)

    monkeypatch.setattr(measuring, "compare_variants", count)
    monkeypatch.setattr(calibration, "record_streamed", lambda *_, **__: pytest.fail("the pass was made already"))
    again = moekit(*asked, "--set", "dern.alpha=0.1", "--json")
    assert again.code == 0, again.err
    assert together == []
    assert json.loads(again.out)["unchanged"] == result.unchanged.model_dump(mode="json")


def test_what_cannot_be_is_refused_before_the_work(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    for more, words in (
        (("--methods", "reab"), "'reab'"),
        (("--keep", "0.1"), "every token chooses 2"),
        (("--keep", "lots"), "no count, no fraction and no size"),
        (("--set", "alpha=1"), "METHOD.KNOB=VALUE"),
        (("--methods", "reap", "--set", "dern.alpha=1"), "takes no part"),
        (("--methods", "dern", "--set", "dern.beta=1"), "beta"),
        (("--methods", "reap", "--domain", "poems"), "no domain poems"),
    ):
        done = moekit(*options(made, tmp_path / "b", *more))
        assert done.code == 2, more
        assert words in done.err, (more, done.err)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all my work")
    done = moekit(*options(made, tmp_path / "mine", "--methods", "reap", "--overwrite"))
    assert done.code == 2
    assert "something else" in done.err
    assert (tmp_path / "mine" / "thesis.txt").exists()


def small(made: Path, out: Path, *more: Any) -> list[Any]:
    return options(made, out, "--keep", "0.5", "--seeds", 1, *more)


def listed(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.full
@pytest.mark.slow
def test_only_what_a_bench_wrote_is_forgotten(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    (out / "work" / "trace-of-thought").mkdir(parents=True)
    (out / "work" / "thesis.txt").write_text("all my work")
    (out / "bench.json").write_text('{"wood": "oak"}')
    for more in ((), ("--overwrite",)):
        done = moekit(*small(made, out, "--methods", "reap", *more))
        assert done.code == 2
        assert "something else" in done.err
    assert (out / "work" / "thesis.txt").read_text() == "all my work"
    (tmp_path / "file").write_text("x")
    assert moekit(*small(made, tmp_path / "file", "--methods", "reap")).code == 2

    bench = tmp_path / "bench"
    assert moekit(*small(made, bench, "--methods", "reap,naee")).code == 0
    first = listed(bench / "work")
    kinds = {name.split("-")[0] for name in first}
    assert kinds == {"trace", "measured", "search", ".moekit"}
    (bench / "work" / "notes.txt").write_text("mine, too")
    (bench / "work" / "trace-of-thought").mkdir()
    (bench / "thesis.txt").write_text("all my work")
    done = moekit(*small(made, bench, "--methods", "premoe", "--overwrite", "--seq-len", 16, "--window", 16))
    assert done.code == 0, done.err
    assert first & listed(bench / "work") == {".moekit-bench"}
    assert {"notes.txt", "trace-of-thought"} <= listed(bench / "work")
    assert (bench / "thesis.txt").exists()
    assert {run.name for run in PruneBenchResult.load(bench / "bench.json").runs} == {"random", "frequency", "premoe"}


def test_a_bench_that_was_ended_before_it_had_a_result_goes_on(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moekit.bench.pruning import measuring

    def dies(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    asked = small(made, tmp_path / "b", "--methods", "reap")
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "compare_variants", dies)
        assert moekit(*asked).code == 130
    assert not (tmp_path / "b" / "bench.json").exists()
    done = moekit(*asked)
    assert done.code == 0, done.err


def test_what_is_there_is_not_lost_when_the_next_call_cannot_start(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert moekit(*small(made, out, "--methods", "reap")).code == 0
    kept = (out / "bench.json").read_bytes()
    assert moekit(*small(made, out, "--methods", "reap", "--overwrite", "--domain", "poems")).code == 2
    assert (out / "bench.json").read_bytes() == kept


def test_two_benches_do_not_write_one_folder_at_once(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    from moekit.checkpoint.atomic import lock

    with lock(tmp_path / "b"):
        done = moekit(*small(made, tmp_path / "b", "--methods", "reap"))
    assert done.code == 2
    assert f"process {os.getpid()} is writing" in done.err
    assert not (tmp_path / "b").exists()


def test_another_method_or_size_joins_what_is_there(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert moekit(*small(made, out, "--methods", "reap,dern")).code == 0
    first = PruneBenchResult.load(out / "bench.json")
    done = moekit(*options(made, out, "--methods", "easy-ep,dern", "--keep", "0.75,0.5", "--set", "dern.alpha=0.1"))
    assert done.code == 0, done.err
    both = PruneBenchResult.load(out / "bench.json")
    assert both.select("reap", 0.5)[0].perplexity == first.select("reap", 0.5)[0].perplexity
    assert len(both.select("random", 0.5)) == len(both.select("random", 0.75)) == 5
    assert both.setting.keep == (0.5, 0.75)
    assert [entry.name for entry in both.setting.entries] == ["random", "frequency", "reap", "dern", "easy-ep"]
    assert {run.settings["alpha"] for run in both.runs if run.name == "dern"} == {0.1}, "the knobs asked for last"
    half, more = both.ranking(0.5), both.ranking(0.75)
    assert half is not None
    assert more is not None
    assert {row.name for row in half.rows} == {"random", "frequency", "reap", "dern", "easy-ep"}
    assert {row.name for row in more.rows} == {"random", "frequency", "dern", "easy-ep"}
    assert "reap" in (out / "report.html").read_text()


@pytest.mark.full
@pytest.mark.slow
def test_another_text_model_or_window_does_not_join(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert moekit(*small(made, out, "--methods", "reap")).code == 0
    kept = (out / "bench.json").read_bytes()
    write_model(tmp_path / "other", seed=7)
    for more, words in (
        (("--max-tokens", 300), "other text"),
        (("--heldout-tokens", 200), "other text"),
        (("--window", 16), "window 32 instead of 16"),
        (("--dtype", "bfloat16"), "bfloat16"),
    ):
        done = moekit(*small(made, out, "--methods", "premoe", *more))
        assert done.code == 2, more
        assert words in done.err, (more, done.err)
        assert "--overwrite" in done.err
    asked = small(made, out, "--methods", "premoe")
    asked[2] = tmp_path / "other"
    done = moekit(*asked)
    assert done.code == 2
    assert "another model" in done.err
    assert (out / "bench.json").read_bytes() == kept
    assert moekit(*asked, "--overwrite").code == 0
    assert "reap" not in {run.name for run in PruneBenchResult.load(out / "bench.json").runs}


def test_a_dry_run_says_how_much_it_is_and_writes_nothing(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*options(made, tmp_path / "b", "--methods", "reap", "--dry-run"))
    assert done.code == 0, done.err
    assert "3 methods, about 14 pruned models" in done.out
    assert not (tmp_path / "b").exists()


def test_a_dry_run_counts_the_states_that_lie_on_the_disk(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    def disk(tokens: int, dtype: str) -> int:
        how = ["--methods", "reap", "--max-tokens", tokens, "--dtype", dtype, "--dry-run", "--json"]
        done = moekit("bench", "prune", made / "moe", "--data", made / "text", "-o", tmp_path / "b", *how)
        assert done.code == 0, done.err
        return int(done.json["disk_bytes"])

    hidden = int(json.loads((made / "moe" / "config.json").read_text())["hidden_size"])
    # From one set of states to another.
    assert disk(2000, "float32") - disk(1000, "float32") == 2 * 1000 * hidden * 4
    assert disk(2000, "bfloat16") - disk(1000, "bfloat16") == 2 * 1000 * hidden * 2


@pytest.mark.full
@pytest.mark.slow
def test_one_text_is_parted_in_two(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "text", documents=20)
    data = ("--data", tmp_path / "text", "--out", tmp_path / "b")
    asked = ["bench", "prune", made / "moe", *data, "--methods", "reap", "--keep", "0.5"]
    done = moekit(*asked, "--seeds", 1, "--window", 64, "--seq-len", 64, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    [calibration] = told["calibrations"]
    assert calibration["documents"] + len(told["unchanged"]["nll"]) <= 40
    assert 0 < len(told["unchanged"]["nll"]) < calibration["documents"]


def test_one_long_text_is_told_on_the_terminal(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "text", documents=1, repeats=500)
    asked = small(made, tmp_path / "b", "--methods", "reap")
    asked[asked.index("--heldout") + 1] = tmp_path / "text"
    done = moekit(*asked, "--heldout-tokens", 2400)
    assert done.code == 0, done.err
    assert done.says(r"sums: \d+ passages of 1 document: intervals are too narrow")


@pytest.mark.parametrize("methods", [pytest.param("latest,reap", marks=FULL), pytest.param("all", marks=FULL)])
def test_a_method_of_another_package_in_one_file_takes_part(methods: str, made: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "latest_experts-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "latest_experts.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: latest-experts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moekit.methods]\nlatest = latest_experts\n")
    paths = [str(site), str(ROOT / "src"), str(ROOT)]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}

    def run(*command: object) -> str:
        done = python(["-c", "from moekit.cli.main import main; main()", *command], env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    records = {r["name"]: r for r in json.loads(run("methods", "prune", "--json"))["methods"]}
    assert records["latest"]["origin"] == "latest_experts"
    asked = options(made, tmp_path / "b", "--methods", methods, "--keep", "0.5", "--seeds", 1, "--json")
    told = json.loads(run(*asked))
    taking = {run["name"] for run in told["runs"]} | {s["name"] for s in told["skipped"]}
    assert taking == set(records) if methods == "all" else taking >= {"latest", "reap"}
    [latest] = [run for run in told["runs"] if run["name"] == "latest"]
    assert latest["settings"] == {"reverse": False}
    assert latest["experts"] == {"0": 4, "1": 4}
    other = options(made, tmp_path / "b", "--methods", "latest", "--keep", "0.5", "--seeds", 1, "--json")
    turned = json.loads(run(*other, "--set", "latest.reverse=true"))
    [reverse] = [run for run in turned["runs"] if run["name"] == "latest"]
    assert reverse["settings"] == {"reverse": True}
    assert reverse["perplexity"]["nll"] != latest["perplexity"]["nll"]
