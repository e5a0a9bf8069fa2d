"""Every store keeps the same promises: the commit protocol relies on each of them."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep_api.v1alpha1 import TokenizerTraining
from lockstep_trainer.checkpoint.catalogue import jobs, nothing
from lockstep_trainer.data.tokenizer import train_tokenizer
from lockstep_trainer.data.writing import write_shards
from lockstep_trainer.errors import NotFound, PreconditionFailed, StoreError, UserError
from lockstep_trainer.storage import ObjectStore, open_store, put_once
from lockstep_trainer.storage.probe import probe


def test_bytes_come_back_as_they_were_put(store: ObjectStore) -> None:
    data = bytes(range(256)) * 100
    etag = store.put("a/b c/ü.bin", data)
    assert store.get("a/b c/ü.bin") == (data, etag)
    assert store.get_range("a/b c/ü.bin", 250, 10) == data[250:260]
    assert store.get_range("a/b c/ü.bin", len(data) - 3, 10) == data[-3:]
    assert store.get_range("a/b c/ü.bin", len(data) + 5, 10) == b""
    assert store.get_range("a/b c/ü.bin", 0, 0) == b""


def test_a_missing_key_is_not_found(store: ObjectStore) -> None:
    for read in (lambda: store.get("none"), lambda: store.get_range("none", 0, 1), lambda: store.get("latest")):
        with pytest.raises(NotFound):
            read()
    store.delete("none")


def test_only_the_first_conditional_put_of_a_key_succeeds(store: ObjectStore) -> None:
    store.put("step/manifest.json", b"first", only_if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put("step/manifest.json", b"second", only_if_absent=True)
    assert store.get("step/manifest.json")[0] == b"first"


def test_a_put_under_an_old_etag_is_refused_and_changes_nothing(store: ObjectStore) -> None:
    with pytest.raises(PreconditionFailed):
        store.put("latest", b"0", if_match="1")
    first = store.put("latest", b"1", only_if_absent=True)
    second = store.put("latest", b"2", if_match=first)
    assert second != first
    with pytest.raises(PreconditionFailed):
        store.put("latest", b"3", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.put("latest", b"3", only_if_absent=True)
    assert store.get("latest") == (b"2", second)


def test_of_many_writers_that_saw_the_same_version_one_wins(store: ObjectStore) -> None:
    etag = store.put("latest", b"0", only_if_absent=True)
    won: list[int] = []
    gate = threading.Barrier(8)

    def write(number: int) -> None:
        gate.wait()
        try:
            store.put("latest", str(number).encode(), if_match=etag)
        except StoreError:  # refused, or a conflict that the server could not decide
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("latest")[0] == str(won[0]).encode()


def test_listing_is_sorted_by_key_and_starts_with_the_prefix(store: ObjectStore) -> None:
    for key in ("step-2/x", "step-10/y", "step-2/manifest.json", "journal/1", "latest"):
        store.put(key, b"12", only_if_absent=True)
    assert [entry.key for entry in store.list("step-2")] == ["step-2/manifest.json", "step-2/x"]
    assert [entry.key for entry in store.list()] == sorted(
        ("step-2/x", "step-10/y", "step-2/manifest.json", "journal/1", "latest")
    )
    assert {entry.size for entry in store.list()} == {2}
    assert store.list("none/") == ()


def test_deleted_objects_are_gone_and_their_keys_free(store: ObjectStore) -> None:
    for key in ("folder/latest", "folder/file"):
        store.put(key, b"1", only_if_absent=True)
        store.delete(key)
    assert store.list("folder") == ()
    store.put("folder/latest", b"2", only_if_absent=True)
    assert store.get("folder/latest")[0] == b"2"


def test_below_is_the_same_store_further_down(store: ObjectStore) -> None:
    store.put("ns/job/uid/latest", b"1", only_if_absent=True)
    below = store.below("ns/job/uid")
    assert below.get("latest")[0] == b"1"
    assert [entry.key for entry in below.list()] == ["latest"]
    assert below.uri == f"{store.uri}/ns/job/uid"
    assert open_store(below.uri, getattr(store, "_s3", None)).get("latest")[0] == b"1"


def test_a_repeated_put_of_the_same_bytes_is_success_of_others_an_error(store: ObjectStore) -> None:
    put_once(store, "x", b"1")
    put_once(store, "x", b"1")
    with pytest.raises(StoreError, match="other content"):
        put_once(store, "x", b"2")


def test_the_probe_passes_and_leaves_nothing(store: ObjectStore) -> None:
    probe(store)
    assert store.list() == ()


class _Careless:
    """A store that takes conditional puts and ignores their conditions, as some S3 servers do."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.uri = store.uri

    def put(self, key: str, data: bytes, *, only_if_absent: bool = False, if_match: str | None = None) -> str:
        self._store.delete(key)
        return self._store.put(key, data, only_if_absent=True)

    def below(self, prefix: str) -> _Careless:
        return _Careless(self._store.below(prefix))

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


def test_the_probe_refuses_a_store_that_accepts_a_false_condition(store: ObjectStore) -> None:
    with pytest.raises(StoreError, match=r"condition .* was false"):
        probe(_Careless(store))  # type: ignore[arg-type]


@pytest.mark.parametrize("uri", ["http://x/y", "file://relative/path", "s3:///prefix", "/folder"])
def test_a_uri_that_names_no_store_is_refused_with_the_remedy(uri: str) -> None:
    with pytest.raises(UserError, match="write s3://"):
        open_store(uri)


@pytest.mark.parametrize("uri", ["s3://bucket/run#2", "file:///data/what?", "s3://bucket/a?b=c/d"])
def test_a_uri_whose_path_would_be_cut_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=re.escape(uri)):
        open_store(uri)
    assert open_store("file:///run%232").uri == "file:///run%232"


@pytest.mark.parametrize("root", ["s3://bucket", "file://"])
@pytest.mark.parametrize(
    "name",
    ["my runs", "50%25 off", "50%2520", "köln", "k%C3%B6ln", "run%232", "a%3Fb", "plain-1_2.3~", "a=b:1+2@c,!$&'()*;"],
)
def test_the_uri_of_a_store_leads_to_it(root: str, name: str) -> None:
    opened = open_store(f"{root}/a/{name}")
    again = open_store(opened.uri)
    assert again.uri == opened.uri
    assert vars(again) == vars(opened)
    assert vars(open_store(opened.below("ns/job").uri)) == vars(opened.below("ns/job"))


@pytest.mark.parametrize("uri", ["s3://bucket/team=ml/run:1", "s3://bucket/a+b@c,d/(e)!$&'*;~", "s3://bucket"])
def test_the_uri_of_a_bucket_is_one_that_other_tools_find(uri: str) -> None:
    """`aws s3` takes it as it is written."""
    assert open_store(uri).uri == uri


@pytest.mark.parametrize(("error", "temporary"), [(errno.ESTALE, True), (errno.EIO, True), (errno.EACCES, False)])
def test_a_folder_that_can_not_be_read_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, temporary: bool
) -> None:
    store = open_store(f"file://{tmp_path}")
    for key in ("step-1/a", "step-2/a"):
        store.put(key, b"1")
    real = os.scandir

    def scandir(path: str | Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "step-1":
            raise OSError(error, os.strerror(error))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for ask in (lambda: store.list("step-1/"), lambda: store.list("step-"), store.unfinished):
        with pytest.raises(StoreError, match=os.strerror(error)) as caught:
            ask()
        assert caught.value.temporary is temporary
    monkeypatch.undo()
    assert len(store.list()) == 2


def refused_reading(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Folders of these names may not be read; root, as whom tests may run, could."""
    real = os.scandir

    def scandir(path: str | Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name in names:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_whoever_looks_around_passes_over_folders_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a volume's root lies lost+found, which only root may read."""
    refused_reading(monkeypatch, "other-team", "lost+found")
    store = open_store(f"file://{tmp_path}")
    for key in ("ns/job/uid/latest", "ns/other-team/x", "lost+found/x", "made/0.tokens"):
        store.put(key, b"1")
    assert jobs(store) == ("ns/job/uid",)
    assert [entry.key for entry in store.list("ns/", readable=True)] == ["ns/job/uid/latest"]
    store.delete("ns/job/uid/latest")
    assert nothing(store, "nothing is here").endswith(": nothing is here")
    with pytest.raises(UserError, match="has token shards already"):
        write_shards([], train_tokenizer([], TokenizerTraining(kind="bytes")), 256, store, shard_tokens=1)
    store.delete("made/0.tokens")
    write_shards([], train_tokenizer([], TokenizerTraining(kind="bytes")), 256, store, shard_tokens=1)
    for ask in (store.list, lambda: store.list("ns/"), store.unfinished, lambda: jobs(store.below("lost+found"))):
        with pytest.raises(StoreError, match="Permission denied"):
            ask()


def test_a_listing_reads_only_folders_whose_files_can_begin_with_the_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may be many, and somebody else's: lost+found, say, which only root may read."""
    store = open_store(f"file://{tmp_path}")
    for key in ("step-1/a/x", "step-2/a", "lost+found/x", "step", "run/step-1/a", "run/step-12/b", "run/other/a"):
        store.put(key, b"1")
    real, read = os.scandir, set[str]()

    def scandir(path: str | Path) -> Iterator[os.DirEntry[str]]:
        read.add(Path(path).relative_to(tmp_path).as_posix())
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [entry.key for entry in store.list("step-")] == ["step-1/a/x", "step-2/a"]
    assert read == {".", "step-1", "step-1/a", "step-2"}
    read.clear()
    assert [entry.key for entry in store.list("run/step-1")] == ["run/step-1/a", "run/step-12/b"]
    assert read == {"run", "run/step-1", "run/step-12"}


def test_a_listing_does_not_follow_links_to_folders(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    store.put("a/x", b"1")
    (tmp_path / "store" / "b").symlink_to(tmp_path / "store" / "a")
    assert [entry.key for entry in store.list()] == ["a/x"]


def test_keys_cannot_leave_a_folder(tmp_path: object) -> None:
    store = open_store(f"file://{tmp_path}")
    for key in ("../x", "/x", "a/../../x"):
        with pytest.raises(StoreError, match="leaves the folder"):
            store.put(key, b"")
