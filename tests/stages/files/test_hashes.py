"""SHA-256 of files and folders."""

import hashlib

import pytest

from stages.files.hashes import sha256_of_file, sha256_of_files, sha256_of_folder


def lines_hash(**contents):
    lines = (f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_folder_has_the_hash_of_its_sha256sum_lines(tmp_path):
    (tmp_path / "b").write_bytes(b"2")
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "hidden").write_bytes(b"3")
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(b"1").hexdigest()
    assert sha256_of_folder(tmp_path) == lines_hash(a=b"1", b=b"2")
    assert sha256_of_files(tmp_path, ["b", "a"]) == lines_hash(a=b"1", b=b"2")
    assert sha256_of_files(tmp_path, ["b"]) == lines_hash(b=b"2")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no files"):
        sha256_of_folder(tmp_path)
