"""Code of the user's own is found where the documentation says, and where it is not, a sentence says what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep_trainer.errors import UserError
from lockstep_trainer.modules import PATH_VARIABLE, call, load, load_callable

FIELD = "trainer.recipe.loss"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that LOCKSTEP_MODULE_PATH names, with the modules of these tests; forgotten afterwards."""
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    path, before = list(sys.path), set(sys.modules)
    (tmp_path / "ownlosses.py").write_text("def huber(logits, targets):\n    return 1\n\nDELTA = 0.5\n")
    (tmp_path / "needy.py").write_text("import no_such_library\n")
    (tmp_path / "broken.py").write_text("x = 1\ny = x / 0\n")
    (tmp_path / "unfinished.py").write_text("def f(:\n")
    (tmp_path / "json.py").write_text("STOLEN = True\n")
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.usefixtures("folder")
def test_a_module_beside_the_manifest_is_found() -> None:
    assert load_callable("ownlosses:huber", FIELD)(None, None) == 1


@pytest.mark.usefixtures("folder")
def test_a_file_of_the_users_does_not_replace_the_standard_library() -> None:
    sys.modules.pop("json")
    try:
        assert not hasattr(load("json:dumps", FIELD), "STOLEN")
    finally:
        import json

        assert "STOLEN" not in vars(json)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("nowhere:f", ("no module 'nowhere'", "image", "PYTHONPATH", "beside the manifest")),
        ("ownlosses.deeper:f", ("no module",)),
        ("needy:f", ("needy can't be imported", "'no_such_library'", "install")),
        ("broken:f", ("broken.py, line 2", "ZeroDivisionError")),
        ("unfinished:f", ("SyntaxError", "unfinished.py, line 1")),
        ("ownlosses:hubr", ("has no 'hubr'", "did you mean huber?")),
        ("ownlosses:zzz", ("it has DELTA, huber",)),
        ("ownlosses:DELTA", ("is a float", "a function or a class")),
    ],
)
def test_what_can_not_be_loaded_names_field_and_reason(reference: str, says: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load_callable(reference, FIELD)
    assert str(caught.value).startswith(f"{FIELD}: ")
    for words in says:
        assert words in str(caught.value)


def test_wrong_arguments_are_told_from_errors_inside() -> None:
    def build(vocab_size: int, *, width: int = 8) -> int:
        return {"inside": vocab_size + width}["missing"]

    with pytest.raises(UserError, match=r"unexpected keyword argument 'widht'; it takes \(vocab_size: "):
        call(build, FIELD, 10, widht=4)
    with pytest.raises(KeyError, match="missing"):
        call(build, FIELD, 10, width=4)
