"""``lockstep checkpoint`` on a folder with real checkpoints: what it lists, finds wrong, exports and removes."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from lockstep_api.messages import StateId, Term
from lockstep_api.v1alpha1 import S3Spec, TokenizerTraining
from lockstep_cli.__main__ import main
from lockstep_cli.checkpoints import sentences
from lockstep_cli.errors import CliError
from lockstep_trainer.checkpoint import tool
from lockstep_trainer.checkpoint.chain import Chain
from lockstep_trainer.checkpoint.manifest import FileEntry, Layout, Listing, Ranges, step_folder
from lockstep_trainer.data.tokenizer import train_tokenizer
from lockstep_trainer.errors import StoreError
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.export import export_model
from lockstep_trainer.model.presets import described
from lockstep_trainer.model.pretrained import load_weights
from lockstep_trainer.parallel.layout import Layout as Degrees
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts
from lockstep_trainer.parallel.pipeline import parts_of
from lockstep_trainer.parallel.stages import costs_by_count
from lockstep_trainer.storage import open_store
from lockstep_trainer.storage.checksum import crc64nvme
from samplerstates import sampler_state
from stored import store_from_ranks
from unit.cli.test_manifest import GOOD

CONFIG = described("llama-debug", {})
ONE = Term(1, 1)
RUN = "default/small/uid-1"
RANKS = 2


def _commit(chain: Chain, step: int, save: Callable[[StateId], Any], layout: Layout, **more: Any) -> None:
    state = StateId(step, ONE.epoch, ONE.generation)
    listing = Listing(
        state=state,
        parent=chain.newest(),
        files=(),
        layout=layout,
        sampler=sampler_state(step),
        versions={},
        verified=("loss and gradient norm are finite",),
        written_at=1000.0 + step,
        seconds=0.0,
        **more,
    )
    chain.commit(listing.model_copy(update={"files": save(state)}), ONE, "leader")


def _sharded(original: str) -> dict[str, Any]:
    """The part of the original that a rank has of two that share the model."""
    meshes = Meshes.build(Degrees(shard=RANKS), torch.device("cpu"))
    stages = parts_of(Degrees(shard=RANKS), 0, costs_by_count(CONFIG))
    (part,) = build_parts(CONFIG, Degrees(shard=RANKS), meshes, device=torch.device("cpu"), stages=stages)
    state = dict(part.named_parameters())
    load_weights(state, CONFIG, open_store(original))
    return {"model": state}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a job of three checkpoints, the newest by two ranks, and a torn one of an earlier term."""
    root = tmp_path_factory.mktemp("store")
    torch.manual_seed(0)
    original = f"file://{root}/original"
    export_model(Decoder(CONFIG).state_dict(), CONFIG, open_store(original), tokenizer=None, dtype=torch.float32)
    chain = Chain(open_store(f"file://{root}/checkpoints"), RUN)
    chain.store.put("step-7-e0-g1/__0_0.distcp", b"torn")
    os.utime(root / "checkpoints" / RUN / "step-7-e0-g1/__0_0.distcp", (0, 0))
    chain.fence(ONE, "leader")

    def small(at: StateId) -> Any:
        return store_from_ranks(1, lambda _: {"model": {"weight": torch.arange(6.0)}}, chain.store, at=at)

    def shared(at: StateId) -> Any:
        return store_from_ranks(RANKS, lambda _: _sharded(original), chain.store, at=at, samples='{"step": 30}\n')

    for step in (10, 20):
        _commit(chain, step, small, Layout(world_size=1))
    _commit(chain, 30, shared, Layout(world_size=RANKS, shard=RANKS))
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's part in this process: another takes seconds to import torch."""

    def ask(request: dict[str, Any], *_: object) -> dict[str, Any]:
        with sentences(request["uri"]):
            return tool.answer(tool.Request.model_validate(request), lambda **_: None)

    monkeypatch.setattr("lockstep_cli.checkpoints.ask", ask)


def run(*arguments: str | Path) -> int:
    return main(["checkpoint", *map(str, arguments), "--output", "json"])


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(capsys.readouterr().out)
    return read


def job_file(tmp_path: Path, **model: Any) -> Path:
    document = {**GOOD, "spec": {**GOOD["spec"]}}
    document["spec"]["trainer"] = {**GOOD["spec"]["trainer"], "model": {"preset": "llama-debug", **model}}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


# --- ls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["checkpoints", "checkpoints/default", f"checkpoints/{RUN}"])
def test_ls_shows_a_job_from_wherever_it_is_below(root: Path, below: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls", root / below) == 0
    (job,) = answer(capsys)["jobs"]
    assert job["uri"] == f"file://{root}/checkpoints/{RUN}"
    shown = [(each["step"], each["place"], each["newest"], each["whole"]) for each in job["checkpoints"]]
    assert shown == [
        (30, "chain", True, True),
        (20, "chain", False, True),
        (10, "chain", False, True),
        (7, "garbage", False, False),
    ]
    newest, parent = job["checkpoints"][:2]
    assert newest["layout"]["shard"] == RANKS
    assert newest["verified"] == ["loss and gradient norm are finite"]
    assert newest["parent"] == f"{parent['folder']}/manifest.json"
    assert newest["bytes"] > 4 * CONFIG.vocab_size * CONFIG.dim


def test_ls_as_text_and_of_several_jobs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["STEP", "FOLDER", "AGE"]
    assert "newest" in lines[2]
    assert "shard 2" in lines[2]
    assert "garbage" in lines[5]
    shutil.copytree(root / "checkpoints" / RUN, root / "checkpoints/default/other/uid-2")
    assert main(["checkpoint", "ls", str(root / "checkpoints")]) == 0
    heading, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert heading[0] == "JOB"
    assert [(row[0], row[1]) for row in rows] == [("default/other/uid-2", "3"), (RUN, "3")]
    assert run("verify", root / "checkpoints") == 1
    assert "holds 2 jobs; name one of them: default/other/uid-2, " in capsys.readouterr().err


def test_what_is_not_there_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (["ls", root / "nowhere"], "no such folder"),
        (["ls", root / "original"], "no job with checkpoints is in it"),
        (["verify", root / "checkpoints", "--step", "40"], "no checkpoint 40; it has 30, 20, 10"),
        (["verify", "ftp://x"], "names no store"),
    ):
        assert run(*arguments) == 1
        assert sentence in capsys.readouterr().err


def test_what_helps_with_s3_is_said_of_s3_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run("ls", tmp_path / "file") == 1
    assert capsys.readouterr().err.endswith(": Not a directory\n")
    with pytest.raises(CliError, match="denied; from here credentials come from the environment"), sentences("s3://b"):
        raise StoreError("list s3://b/: denied")


def test_step_folders_without_latest_are_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (root / "checkpoints" / RUN).glob("latest.*"):
        path.unlink()
    newest = f"{root}/checkpoints/{RUN}/step-30-e1-g1/manifest.json"
    for command in ("ls", "verify"):
        assert run(command, root / "checkpoints") == 1
        said = capsys.readouterr().err
        assert "step folders with a manifest are there (3), but no `latest` that leads to one; bring it back" in said
        assert f"checkpoint.resumeFrom file://{newest}" in said


# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify_reads_all_of_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, as users have it."""
    assert run("verify", root / "checkpoints", "--all") == 0
    found = answer(capsys)["checkpoints"]
    assert [each["folder"] for each in found] == ["step-30-e1-g1", "step-20-e1-g1", "step-10-e1-g1"]
    assert all(each["problems"] == [] for each in found)


@pytest.mark.usefixtures("here")
def test_verify_takes_the_folder_or_its_manifest(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "checkpoints" / RUN / "step-30-e1-g1"
    for uri in (folder, f"file://{folder}/manifest.json"):
        assert run("verify", uri) == 0
        (found,) = answer(capsys)["checkpoints"]
        assert found["bytes"] == sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")


def _flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def _swap(folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder / "x")
    (folder / "__1_0.distcp").rename(folder / "__0_0.distcp")
    (folder / "x").rename(folder / "__1_0.distcp")


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a bit of a tensor": (lambda f: _flip(f / "__1_0.distcp"), "__1_0.distcp", "differ from their checksum"),
    "a file too short": (lambda f: os.truncate(f / "__0_0.distcp", 1000), "__0_0.distcp", "ends at byte 1000 of"),
    "a file too long": (lambda f: (f / "__0_0.distcp").open("ab").write(b"x"), "__0_0.distcp", "instead of"),
    "a missing file": (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp", "it is missing"),
    "swapped files": (_swap, "__0_0.distcp", ""),
    "the metadata": (lambda f: _flip(f / ".metadata"), ".metadata", "differs from its checksum"),
    "the ranges": (lambda f: _flip(f / "ranges-r1.json"), "ranges-r1.json", "differs from its checksum"),
    "the log of samples": (lambda f: _flip(f / "samples-r0.jsonl"), "samples-r0.jsonl", "differs from its checksum"),
    "the manifest": (lambda f: _flip(f / "manifest.json"), "manifest.json", "differs from its checksum"),
    "the parent's manifest": (
        lambda f: _flip(f.with_name("step-20-e1-g1") / "manifest.json"), "manifest.json", "its parent: "
    ),
}  # fmt: skip


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("what", DAMAGE)
def test_verify_names_the_file_that_is_wrong(root: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    harm, file, says = DAMAGE[what]
    harm(root / "checkpoints" / RUN / "step-30-e1-g1")
    assert run("verify", root / "checkpoints", "--step", "30") == 1
    (found,) = answer(capsys)["checkpoints"]
    assert file in [problem["file"] for problem in found["problems"]]
    assert says in next(problem["message"] for problem in found["problems"] if problem["file"] == file)
    if what != "swapped files":
        assert len(found["problems"]) == 1


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("file", ["manifest.json", "__0_0.distcp"])
def test_verify_names_what_is_damaged_before_the_newest_whole_one(
    root: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "checkpoints" / RUN / "step-30-e1-g1" / file).unlink()
    assert run("verify", root / "checkpoints") == 1
    damaged, newest = answer(capsys)["checkpoints"]
    assert (damaged["folder"], newest["folder"], newest["problems"]) == ("step-30-e1-g1", "step-20-e1-g1", [])
    assert damaged["problems"] == [{"file": file, "message": "it is missing"}]
    assert main(["checkpoint", "verify", str(root / "checkpoints")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"file://{root}/checkpoints/{RUN}"
    assert said[1] == f"step-30-e1-g1/{file}: it is missing"
    assert said[2].startswith("step-20-e1-g1: 3 files, ")
    assert main(["checkpoint", "ls", str(root / "checkpoints")]) == 0
    assert f"  {file} is missing  " in capsys.readouterr().out.splitlines()[2]


@pytest.mark.usefixtures("here")
def test_verify_needs_a_checkpoint(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Chain(open_store(f"file://{root}/new"), RUN).fence(ONE, "a")
    for more in ([], ["--all"]):
        assert run("verify", root / "new", *more) == 1
        assert capsys.readouterr().err.endswith(f"/{RUN}: no checkpoints\n")
    for step in (10, 20, 30):
        (root / "checkpoints" / RUN / f"step-{step}-e1-g1/manifest.json").unlink()
    assert run("verify", root / "checkpoints") == 1
    assert "none of its checkpoints is whole: step-30-e1-g1, step-20-e1-g1, step-10-e1-g1" in capsys.readouterr().err


def test_without_torch_verify_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request = tool.Request(do="verify", uri="file:///any", s3=S3Spec(), folders=("step-1-e1-g1",))
    monkeypatch.setattr(sys, "stdin", io.StringIO(request.model_dump_json()))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert tool.main() == 0
    said = json.loads(capsys.readouterr().out)
    assert said["error"].startswith("verify needs torch; install the trainer's packages: `make setup` in ")


@pytest.mark.usefixtures("here")
def test_verify_says_where_nothing_vouches_for_a_range(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file is as the manifest says; but the metadata names a range that has no checksum."""
    chain = Chain(open_store(f"file://{root}/forged"))
    chain.fence(ONE, "a")

    def forged(at: StateId) -> Any:
        folder = step_folder(at)
        files = store_from_ranks(1, lambda _: {"model": {"w": torch.ones(3)}}, chain.store, at=at)
        empty = Ranges(files={}).to_bytes()
        chain.store.put(f"{folder}/ranges-r0.json", empty)
        entry = FileEntry(name="ranges-r0.json", size=len(empty), crc64nvme=crc64nvme(empty))
        return tuple(entry if file.name == entry.name else file for file in files)

    _commit(chain, 10, forged, Layout(world_size=1))
    assert run("verify", root / "forged") == 1
    (found,) = answer(capsys)["checkpoints"]
    assert [problem["file"] for problem in found["problems"]] == [".metadata"]
    assert "where no range with a checksum is" in found["problems"][0]["message"]


# --- export ---------------------------------------------------------------------------------------------------------


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.usefixtures("here")
def test_export_writes_what_was_saved_by_two_ranks(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "model"
    job = job_file(tmp_path)
    assert run("export", root / "checkpoints", "--job", job, "--to", to, "--dtype", "float32") == 0
    assert answer(capsys)["layers"] == CONFIG.layers
    found, expected = _tensors(to), _tensors(root / "original")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((to / "config.json").read_text())["vocab_size"] == CONFIG.vocab_size


def _with_model(root: Path, model: dict[str, Any]) -> None:
    """Step 40, with the files of step 30 and a manifest that says what the model is."""
    chain = Chain(open_store(f"file://{root}/checkpoints"), RUN)
    (before, _) = next(iter(chain.lineage(chain.latest())))
    folder = root / "checkpoints" / RUN
    shutil.copytree(folder / "step-30-e1-g1", folder / "step-40-e1-g1")
    (folder / "step-40-e1-g1/manifest.json").unlink()
    files = chain.manifest(before).files
    _commit(chain, 40, lambda _: files, Layout(world_size=RANKS, shard=RANKS), model=model)


@pytest.mark.usefixtures("here")
def test_export_goes_by_the_manifest(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the job; and where another job is given, only its tokenizer counts."""
    _with_model(root, asdict(CONFIG))
    other = job_file(tmp_path, overrides={"layers": CONFIG.layers + 1})
    variants: tuple[tuple[str | Path, ...], ...] = ((), ("--job", other))
    for number, more in enumerate(variants):
        to = tmp_path / f"model-{number}"
        assert run("export", root / "checkpoints", "--to", to, "--dtype", "float32", *more) == 0
        assert answer(capsys)["layers"] == CONFIG.layers
        found, expected = _tensors(to), _tensors(root / "original")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        exported, original = (json.loads((each / "config.json").read_text()) for each in (to, root / "original"))
        assert {**exported, "torch_dtype": ""} == {**original, "torch_dtype": ""}


@pytest.mark.usefixtures("here")
def test_export_takes_a_tokenizer_from_a_path(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own one").mkdir()
    train_tokenizer(["a b"], TokenizerTraining(kind="bytes")).save(str(tmp_path / "own one" / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)
    rest = ("export", root / "checkpoints", "--job", job_file(tmp_path), "--to", "model")
    for place in ("nosuch", tmp_path / "nosuch.json"):
        assert run(*rest, "--tokenizer", place) == 1
        assert f"lockstep: --tokenizer: get {tmp_path}/nosuch" in capsys.readouterr().err
    for place in ("own one", "own one/tokenizer.json", tmp_path / "own one"):
        assert run(*rest, "--tokenizer", place, "--force") == 0
        assert (tmp_path / "model" / "tokenizer.json").is_file()
        (tmp_path / "model" / "tokenizer.json").unlink()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gates": 3}, "step-40-e1-g1: this release knows no gates of a model"),
        ({"layers": "many"}, "its manifest's model.layers: "),
        ({"dim": 64}, "in the checkpoint, and should have"),
    ],
)
def test_export_refuses_a_model_that_is_not_what_it_reads(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], sentence: str
) -> None:
    _with_model(root, {**asdict(CONFIG), **change})
    assert run("export", root / "checkpoints", "--to", tmp_path / "model") == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_export_replaces_a_model_only_where_it_is_told_to(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_model(root, asdict(CONFIG))
    to = tmp_path / "model"
    to.mkdir()
    (to / "model.safetensors.index.json").write_text("another model's")
    assert run("export", root / "checkpoints", "--to", to) == 1
    said = capsys.readouterr().err
    assert f"--to: file://{to} has model.safetensors.index.json already; name another folder, or add --force" in said
    assert [path.name for path in to.iterdir()] == ["model.safetensors.index.json"]
    assert run("export", root / "checkpoints", "--to", to, "--dtype", "float32", "--force") == 0
    assert not (to / "model.safetensors.index.json").exists()
    assert _tensors(to).keys() == _tensors(root / "original").keys()


@pytest.mark.usefixtures("here")
def test_export_refuses_what_it_can_not_know(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "model"
    assert run("export", root / "checkpoints", "--to", to) == 1
    assert "add --job with the job's manifest" in capsys.readouterr().err
    other = job_file(tmp_path, overrides={"layers": CONFIG.layers + 1})
    assert run("export", root / "checkpoints", "--job", other, "--to", to) == 1
    assert "is missing in the checkpoint" in capsys.readouterr().err
    assert run("export", root / "checkpoints", "--job", job_file(tmp_path), "--step", "20", "--to", to) == 1
    assert "has no model.embedding.weight" in capsys.readouterr().err
    _flip(root / "checkpoints" / RUN / "step-30-e1-g1/__1_0.distcp")
    assert run("export", root / "checkpoints", "--job", job_file(tmp_path), "--to", to) == 1
    assert "__1_0.distcp: bytes" in capsys.readouterr().err
    assert not to.exists()


# --- rm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("verify",), ("export", "--to", "out"), ("rm", "--yes", "--force")])
def test_a_folder_and_another_step_are_refused(
    root: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = root / "checkpoints" / RUN / "step-20-e1-g1"
    for step in ("10", "step-20-e2-g1"):
        assert run(command[0], folder, *command[1:], "--step", step) == 1
        told = capsys.readouterr().err
        assert f"lockstep: --step {step}: {folder} is another checkpoint: leave one of them out" in told
    assert len(folders(root)) == 4


@pytest.mark.usefixtures("here")
def test_a_folder_and_its_own_step_are_one_checkpoint(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in ("20", "step-20-e1-g1"):
        assert run("verify", root / "checkpoints" / RUN / "step-20-e1-g1", "--step", step) == 0
        assert [each["folder"] for each in answer(capsys)["checkpoints"]] == ["step-20-e1-g1"]


def folders(root: Path) -> set[str]:
    return {path.name for path in (root / "checkpoints" / RUN).glob("step-*")}


@pytest.mark.usefixtures("here")
def test_rm_of_one_in_the_middle_leaves_the_older_in_reach(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rm", root / "checkpoints", "--step", "20", "--yes") == 0
    assert answer(capsys)["removed"] == ["step-20-e1-g1"]
    assert folders(root) == {"step-30-e1-g1", "step-10-e1-g1", "step-7-e0-g1"}
    assert run("verify", root / "checkpoints", "--all") == 0
    assert [each["folder"] for each in answer(capsys)["checkpoints"]] == ["step-30-e1-g1", "step-10-e1-g1"]


def test_rm_of_the_newest_must_be_forced(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rm", root / "checkpoints", "--step", "30", "--yes") == 1
    assert "the job goes on from it; --force removes it" in capsys.readouterr().err
    assert "step-30-e1-g1" in folders(root)
    assert run("rm", root / "checkpoints", "--step", "30", "--yes", "--force") == 0
    chain = Chain(open_store(f"file://{root}/checkpoints"), RUN)
    point = chain.fence(Term(2, 1), "b")
    assert point
    assert point.state.step == 20


@pytest.mark.usefixtures("here")
def test_what_was_removed_is_not_damaged(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the newest, which `latest` names, nor what it names besides once all is gone."""
    assert run("rm", root / "checkpoints", "--step", "30", "--yes", "--force") == 0
    capsys.readouterr()
    for more in ([], ["--all"]):
        assert run("verify", root / "checkpoints", *more) == 0
        found = answer(capsys)
        assert found["checkpoints"][0]["folder"] == "step-20-e1-g1"
        assert found["removed"] == ["step-30-e1-g1"]
    assert run("verify", root / "checkpoints", "--step", "30") == 1
    assert "step-30-e1-g1 was removed: there is nothing to verify" in capsys.readouterr().err
    for step in ("10", "20"):
        assert run("rm", root / "checkpoints", "--step", step, "--yes", "--force") == 0
    capsys.readouterr()
    assert run("ls", root / "checkpoints") == 0
    (job,) = answer(capsys)["jobs"]
    shown = [(each["step"], each["removed"], each["problem"]) for each in job["checkpoints"]]
    assert shown == [(30, True, "removed"), (20, True, "removed"), (10, True, "removed"), (7, False, None)]
    assert run("verify", root / "checkpoints", "--all") == 1
    assert f"{RUN}: no checkpoints\n" in capsys.readouterr().err
    assert run("rm", root / "checkpoints", "--step", "40", "--yes") == 1
    assert "no checkpoint 40; it has none" in capsys.readouterr().err


def test_the_newest_whole_one_is_meant_where_a_newer_is_damaged(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "checkpoints" / RUN / "step-30-e1-g1/__0_0.distcp").unlink()
    assert run("rm", root / "checkpoints", "--step", "20", "--yes") == 1
    assert "step-20-e1-g1 is the newest whole checkpoint" in capsys.readouterr().err
    assert run("rm", root / "checkpoints", "--step", "30", "--yes") == 0
    assert folders(root) == {"step-20-e1-g1", "step-10-e1-g1", "step-7-e0-g1"}


def test_rm_of_garbage_spares_what_may_be_in_the_making(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    making = root / "checkpoints" / RUN / "step-40-e1-g1/__0_0.distcp"
    making.parent.mkdir()
    making.write_bytes(b"half of it")
    os.utime(making, (0, 0))
    assert run("rm", root / "checkpoints", "--garbage", "--yes") == 0
    assert answer(capsys)["removed"] == ["step-7-e0-g1"]
    assert run("rm", root / "checkpoints", "--step", "40", "--yes") == 1
    assert "may be being written" in capsys.readouterr().err
    assert run("rm", root / "checkpoints", "--step", "40", "--yes", "--force") == 0
    assert folders(root) == {"step-30-e1-g1", "step-20-e1-g1", "step-10-e1-g1"}


def test_rm_asks(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rm", root / "checkpoints", "--step", "10") == 1
    assert "there is nobody to ask; add --yes" in capsys.readouterr().err
    assert run("rm", root / "checkpoints") == 1
    assert "name a checkpoint with --step" in capsys.readouterr().err
    assert run("rm", root / "checkpoints" / RUN / "step-10-e1-g1", "--garbage", "--yes") == 1
    assert "step-10-e1-g1 is one checkpoint: leave one of them out" in capsys.readouterr().err
    for reply, status, left in ((b"n\n", 1, True), (b"\x04", 1, True), (b"y\n", 0, False)):
        own, there = pty.openpty()
        command = [sys.executable, "-m", "lockstep_cli", "checkpoint", "rm", str(root / "checkpoints"), "--step", "10"]
        with subprocess.Popen(command, stdin=there, stdout=there, stderr=there) as process:
            os.close(there)
            os.write(own, reply)
            said = b""
            while True:
                try:
                    piece = os.read(own, 4096)
                except OSError:  # the other end is closed
                    break
                said += piece
        os.close(own)
        assert process.returncode == status, said.decode()
        assert b"Remove step-10-e1-g1" in said
        assert b"? [y/N] " in said
        assert (b"lockstep: nothing was removed" in said) == left
        assert ("step-10-e1-g1" in folders(root)) == left
