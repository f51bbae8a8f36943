"""What nobody foresaw is one sentence, with the traceback in a file that it names, whoever met it and however."""

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distca.errors import EXIT_OTHER, EXIT_TRY_AGAIN, DataError, UserError
from distca.launch import cli
from distca.launch.process.unforeseen import full_disk, in_words, room


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except type(error) as found:
        return found


WORDS = {
    "fault": (KeyError("loss"), EXIT_OTHER, "unexpected KeyError: 'loss'. This is likely a fault of DistCA"),
    "several lines": (RuntimeError("first\n\nsecond"), EXIT_OTHER, "unexpected RuntimeError: first."),
    "no text": (RuntimeError(), EXIT_OTHER, "unexpected RuntimeError."),
    "memory": (MemoryError(), EXIT_OTHER, "could not get the memory it asked for"),
    "nesting": (RecursionError("maximum depth"), EXIT_OTHER, "nested too deeply"),
    "files": (OSError(errno.EMFILE, "Too many open files"), EXIT_OTHER, "ulimit -n"),
    "access": (PermissionError(errno.EACCES, "no", "/there/x"), EXIT_OTHER, "write /there/x: permission denied"),
    "read-only": (OSError(errno.EROFS, "no", "/there/x"), EXIT_OTHER, "/there/x: its file system is read-only"),
    "no such file": (FileNotFoundError(errno.ENOENT, "No such file", "/there/x"), EXIT_OTHER, "/there/x: No such file"),
    "disk": (OSError(errno.ENOSPC, "No space left on device"), EXIT_TRY_AGAIN, "the disk is full. Make room there"),
    "quota": (OSError(errno.EDQUOT, "quota"), EXIT_TRY_AGAIN, "your disk quota is used up"),
    "size": (OSError(errno.EFBIG, "large"), EXIT_TRY_AGAIN, "ulimit -f"),
    "rust": (RuntimeError("Error: I/O error: No space left (os error 28)"), EXIT_TRY_AGAIN, "the disk is full"),
    "a worker's": (RuntimeError("failed: OSError: [Errno 28] No space left"), EXIT_TRY_AGAIN, "the disk is full"),
}


PLAIN = [name for name, (_, _, words) in WORDS.items() if not words.startswith("unexpected")]


@pytest.mark.parametrize(("name", "wrapped"), [(n, False) for n in WORDS] + [(n, True) for n in PLAIN])
def test_each_has_its_sentence_and_code(tmp_path, name, wrapped):
    """Also where a library raises an error of its own because of a plain one."""
    error, code, words = WORDS[name]
    told = in_words(raised(RuntimeError("saving failed"), error) if wrapped else raised(error), tmp_path)
    assert words in str(told) and told.exit_code == code and len(str(told).splitlines()) == 1
    if code == EXIT_OTHER:
        log = tmp_path / "logs" / "driver.txt"
        assert f"(traceback: {log})" in str(told) and "Traceback (most recent call last)" in log.read_text()
    assert bool(full_disk(error)) == (code == EXIT_TRY_AGAIN)


@given(text=st.text())
def test_whatever_an_error_says_it_is_one_sentence(tmp_path_factory, text):
    told = in_words(raised(ValueError(text)), tmp_path_factory.getbasetemp())
    assert len(str(told).splitlines()) == 1


def test_what_was_said_for_people_stays_as_it_is():
    assert in_words(error := DataError("row 7 is empty")) is error


def test_without_a_place_for_the_traceback_the_sentence_says_where_it_ends(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/dev/null")
    assert "could be written nowhere; it ends in test_unforeseen.py, line" in str(in_words(raised(KeyError("x"))))


def test_a_command_that_fails_as_nobody_foresaw_names_a_file_with_the_traceback(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise LookupError("one\ntwo")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "load_settings", fail)
    assert cli.run(["train", "run.yaml"]) == EXIT_OTHER
    said, (file,) = capsys.readouterr().err, tmp_path.glob("distca-*.txt")
    assert said.startswith("distca: unexpected LookupError: one.") and f"(traceback: {file})" in said
    assert 'raise LookupError("one' in file.read_text()


def test_no_files_left_is_not_said_as_bytes_that_are_free(tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)

    class Found:
        f_bavail, f_frsize, f_files, f_favail = real.f_bavail, real.f_frsize, 1000, 0

    assert room(tmp_path).files
    monkeypatch.setattr(os, "statvfs", lambda _: Found)
    assert not room(tmp_path).files and "no inodes" in str(room(tmp_path))


def test_every_error_of_the_machine_is_a_sentence(tmp_path):
    for number in sorted(errno.errorcode):
        told = in_words(raised(OSError(number, os.strerror(number), "/there")), tmp_path)
        assert isinstance(told, UserError) and "/there" in str(told) or number in (errno.EMFILE, errno.ENFILE)
