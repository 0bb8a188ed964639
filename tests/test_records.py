"""Files of records: nobody else's text is touched, and no line is lost to a file that is replaced."""

import fcntl
from operator import itemgetter

import pytest

from flowverify.errors import DataError, InvalidInputError
from flowverify.records import RecordFile, json_line, read_records

INDEX = itemgetter("index")


@pytest.mark.parametrize("text", ["my notes", "my notes\n", '{"index": 0}\nmy notes', '{"index": 0}\n{}\n', "[1]\n"])
def test_what_is_no_record_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=r"notes\.txt: line [12] is no record, expected an object of JSON with index"):
        RecordFile(path, INDEX, ("index",))
    assert path.read_text() == text
    path.write_text("")
    RecordFile(path, INDEX).close()  # the lock has gone


TORN = ("brace", "unended", "zeros", "line of zeros", "zeros in a line")


@pytest.mark.parametrize("torn", ["{", '{"index": 1}', "\0\0", "\0\0\n", '{"index"\0\0\n'], ids=TORN)
def test_what_a_kill_leaves_is_cut_off(tmp_path, torn):
    path = tmp_path / "records"
    path.write_text('{"index": 0}\n' + torn)
    assert read_records(path) == [{"index": 0}]
    with RecordFile(path, INDEX) as file:
        file.append([{"index": 1}])
    assert path.read_text() == '{"index": 0}\n{"index": 1}\n'


def test_a_file_that_is_replaced_before_it_is_locked(tmp_path, monkeypatch):
    """What superseded records are removed from takes the place of the old file, under the lock of the old one."""
    path, lock = tmp_path / "records", fcntl.flock
    path.write_text('{"index": 0}\n')

    def replaced(file, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        (tmp_path / "new").write_text('{"index": 1}\n')
        (tmp_path / "new").rename(path)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", replaced)
    with RecordFile(path, INDEX) as file:
        file.append([{"index": 2}])
        with pytest.raises(InvalidInputError, match="another run is writing to it"):
            RecordFile(path, INDEX)
    assert path.read_text() == '{"index": 1}\n{"index": 2}\n'


def test_superseded_records_go_by_a_file_that_is_locked_too(tmp_path):
    path = tmp_path / "records"
    path.write_text('{"index": 0}\n{"index": 1}\n{"index": 0, "again": true}\n')
    link = tmp_path / "link"
    link.symlink_to(path)
    with RecordFile(link, INDEX) as file:
        assert list(file.records) == [1, 0]
        with pytest.raises(InvalidInputError, match="another run is writing to it"):
            RecordFile(path, INDEX)
    assert link.is_symlink() and path.read_text() == '{"index": 1}\n{"index": 0, "again": true}\n'


def test_numbers_that_json_does_not_have_are_null():
    assert json_line({"a": [float("inf")], "b": {"c": float("nan")}}) == '{"a": [null], "b": {"c": null}}'
