"""Whole folders are written like whole files: complete or absent."""

from __future__ import annotations

import os
import stat
import tempfile

import pytest

from qdiff.errors import UserError
from qdiff.io.files import check_new_folder, folder_written_whole


def test_a_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "made" / "here"
    with folder_written_whole(target) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("x")
        (folder / "part" / "file").chmod(0o600)
        (tmp_path / "ordinary").write_text("x")
        assert not target.exists()
    assert (target / "part" / "file").read_text() == "x" and os.listdir(target.parent) == ["here"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "ordinary", target / "part" / "file")}
    assert len(modes) == 1
    with pytest.raises(RuntimeError), folder_written_whole(tmp_path / "broken") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["made", "ordinary"]


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    check_new_folder(tmp_path / "empty")
    with folder_written_whole(tmp_path / "empty") as folder:
        (folder / "file").write_text("x")
    assert os.listdir(tmp_path / "empty") == ["file"]
    for taken in (tmp_path / "empty", tmp_path / "empty" / "file"):
        with pytest.raises(UserError, match="exists and is not an empty folder; choose another"):
            check_new_folder(taken)
    check_new_folder(tmp_path / "none" / "yet")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists and is not an empty folder; choose another"):
        check_new_folder(tmp_path / "broken")
    with pytest.raises(UserError, match="cannot be written"):
        check_new_folder("/proc/none/yet")


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    check_new_folder(tmp_path / "link")
    with folder_written_whole(tmp_path / "link") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "disk") == ["file"]


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("disk")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    for mounted in ("disk", "link"):
        with pytest.raises(UserError, match=r"is a mount point.*choose a new folder inside it"):
            check_new_folder(tmp_path / mounted)
    check_new_folder(tmp_path / "disk" / "inside")


def test_the_folder_around_it_has_to_be_writable(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    tried = []

    def refused(dir):
        tried.append(str(dir))
        raise PermissionError

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(UserError, match="empty cannot be written; choose a folder inside one with write permission"):
        check_new_folder(tmp_path / "empty")
    assert tried == [str(tmp_path)]
