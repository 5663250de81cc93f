"""Files that are whole or not there, locks, and what is said where they cannot be written."""

import pytest

from recbole_mm.errors import EnvironmentFault, InputError
from recbole_mm.files import alone, replacing, write_text, writing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shared", [False, True])
def test_a_write_that_fails_leaves_the_earlier_file_and_no_remains(shared, tmp_path):
    path = tmp_path / "x"
    write_text(path, "earlier", shared=shared)
    with pytest.raises(UnicodeEncodeError), replacing(path, shared=shared) as temporary:
        temporary.write_text("half \udcff", encoding="utf-8")
    assert path.read_text() == "earlier"
    assert names(tmp_path) == ["x"]


def test_two_that_share_a_file_do_not_share_the_temporary_one(tmp_path):
    path = tmp_path / "x"
    with replacing(path, shared=True) as one, replacing(path, shared=True) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"  # the last to end
    assert names(tmp_path) == ["x"]


def test_a_killed_write_is_written_over_by_the_next(tmp_path):
    (tmp_path / "x.tmp").write_text("half of a killed process")
    write_text(tmp_path / "x", "whole")
    assert names(tmp_path) == ["x"]


def test_a_folder_that_cannot_be_written_is_told_with_the_mend(tmp_path):
    path = tmp_path / "none" / "x"
    with pytest.raises(EnvironmentFault) as caught, writing(path, "make it"):
        write_text(path, "")
    assert str(caught.value) == f"{path}: cannot be written (No such file or directory); make it"


def test_a_lock_that_is_taken_is_refused_with_the_error_given(tmp_path):
    lock = tmp_path / "new" / ".lock"
    refused = InputError("in use")
    with alone(lock, "", refused), pytest.raises(InputError) as caught, alone(lock, "", refused):
        pass
    assert caught.value is refused
    with alone(lock, "", refused):
        pass


def test_a_lock_that_cannot_be_made_is_told_with_the_mend(tmp_path):
    (tmp_path / "file").write_text("")
    lock = tmp_path / "file" / ".lock"
    expected = rf"{lock}: cannot be written \(.*\); move it"
    with pytest.raises(EnvironmentFault, match=expected), alone(lock, "move it", "waiting"):
        pass
