from __future__ import annotations

import pytest

from services.operators.demo.folder import MARKER, take_folder
from shelora.errors import Conflict, InvalidConfiguration


def test_a_second_run_replaces_the_first_and_nothing_else(tmp_path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("keep")
    root = tmp_path / "build" / "demo"
    with take_folder(root) as folder:
        folder.report.write_text("old")
        (folder.logs / "link").symlink_to(outside, target_is_directory=True)
        (root / "link").symlink_to(outside, target_is_directory=True)
    with take_folder(root) as folder:
        assert not folder.report.exists()
        assert sorted(path.name for path in root.iterdir()) == [
            MARKER, "aggregator", "data", "keymanager", "logs", "operator",
        ]  # fmt: skip
    assert (outside / "precious").read_text() == "keep"


def test_a_folder_with_other_files_is_never_touched(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(InvalidConfiguration, match="other files"), take_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_link_to_a_folder_is_refused(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    with pytest.raises(InvalidConfiguration, match="something else"), take_folder(tmp_path / "link"):
        pass


def test_a_file_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfiguration, match="something else"), take_folder(tmp_path / "file"):
        pass


def test_two_demonstrations_do_not_share_a_folder(tmp_path) -> None:
    root = tmp_path / "demo"
    with take_folder(root) as folder:
        folder.report.write_text("mine")
        with pytest.raises(Conflict, match="another demonstration"), take_folder(root):
            pass
        assert folder.report.read_text() == "mine"
