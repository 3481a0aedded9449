"""What is kept of a package can be put back, wherever the disk stands."""

import os
import sys

import pytest

from heedful.doctor import site as sites
from heedful.doctor.site import FOLDER, Kept, Site


@pytest.fixture
def place(tmp_path):
    (tmp_path / "pack-1.0.dist-info").mkdir()
    (tmp_path / "pack-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pack\nVersion: 1.0\n")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("one = 1\n")
    record = "pack/__init__.py,,\npack/gone.py,,\npack-1.0.dist-info/METADATA,,\npack-1.0.dist-info/RECORD,,\n"
    (tmp_path / "pack-1.0.dist-info" / "RECORD").write_text(record)
    return Site(sys.executable, tmp_path, (str(tmp_path),))


def test_versions_are_those_of_its_folders(place, tmp_path):
    assert place.versions() == {"pack": "1.0"}
    (tmp_path / "broken-2.dist-info").mkdir()  # no metadata
    assert place.versions()["pack"] == "1.0"


@pytest.mark.parametrize(
    ("folder", "name", "found"),
    [
        ("~ack-0.9.dist-info", "pack", {"pack": "1.0"}),  # left by pip, which ignores it
        ("mine-2.0.dist-info", "my local project", {"pack": "1.0", "mine": "2.0"}),
        ("-odd-2.0.dist-info", "odd name", {"pack": "1.0"}),
    ],
)
def test_names_are_those_that_pip_takes_them_for(place, tmp_path, folder, name, found):
    (tmp_path / folder).mkdir()
    version = folder.removesuffix(".dist-info").rpartition("-")[2]
    (tmp_path / folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert place.versions() == found


@pytest.mark.parametrize("links", [True, False])
def test_kept_files_come_back(place, tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    place.keep("Pack")
    (tmp_path / "pack" / "__init__.py").unlink()
    (tmp_path / "pack").rmdir()
    assert place.unfinished() == Kept("Pack", {"pack": "1.0"}, {})
    place.put_back(("pack",))
    assert (tmp_path / "pack" / "__init__.py").read_text() == "one = 1\n"
    place.drop()
    assert not (tmp_path / FOLDER).exists()
    assert not place.is_unfinished()


def test_a_replaced_file_is_replaced_back_and_an_untouched_one_is_left(place, tmp_path):
    place.keep("pack")
    path, other = tmp_path / "pack" / "__init__.py", tmp_path / "pack-1.0.dist-info" / "METADATA"
    number = other.stat().st_ino
    path.unlink()
    path.write_text("two = 2\n")
    place.put_back(("pack",))
    assert path.read_text() == "one = 1\n"
    assert other.stat().st_ino == number
    assert sorted(one.name for one in path.parent.iterdir()) == ["__init__.py"]


def test_links_take_no_room(place, tmp_path):
    place.keep("pack")
    path = tmp_path / "pack" / "__init__.py"
    assert any(path.samefile(one) for one in (tmp_path / FOLDER).iterdir())


def test_a_package_that_is_not_there_leaves_a_list_of_versions(place):
    place.keep("absent")
    assert place.unfinished() == Kept("absent", {"pack": "1.0"}, {})


def test_this_python_and_another(site):
    here = Site.of()
    assert here.executable == sys.executable
    assert "heedful" in here.versions()
    assert site.folder != here.folder
    assert sites.Site.of(site.executable) == site
