"""Archives from strangers: nothing is written, nothing is run, nothing escapes, and no bomb goes off."""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import fresh_packages as made
import pytest

from search_r3.data.fresh import archives
from search_r3.data.fresh.archives import read_archive, read_folder, safe_name
from search_r3.errors import InputError


def test_a_wheel_and_a_source_archive_give_their_texts_hash_and_newest_date(tmp_path):
    path = made.wheel(tmp_path, files={**made.FILES, "tidewater/table.csv": "1,2"})
    contents = read_archive(path)
    assert list(contents.files) == [
        "tidewater-2.0.dist-info/METADATA",
        "tidewater/__init__.py",
        "tidewater/harmonics.py",
    ]
    assert contents.files["tidewater/harmonics.py"].decode() == made.CODE
    assert contents.sha256 == made.sha256(path)
    assert contents.newest.date().isoformat() == "2026-05-04"
    assert contents.passed_over == {"not a text that is read": 1}
    unpacked = read_archive(made.sdist(tmp_path))
    assert unpacked.files["tidewater-2.0/src/tidewater/harmonics.py"].decode() == made.CODE
    assert unpacked.newest.year == 2026
    assert sorted(os.listdir(tmp_path)) == ["tidewater-2.0-py3-none-any.whl", "tidewater-2.0.tar.gz"]


@pytest.mark.parametrize(
    "name", ["../evil.py", "/etc/evil.py", "a/../../evil.py", "..\\evil.py", "C:\\evil.py", "C:/e.py"]
)
def test_a_member_outside_the_archives_folder_is_refused(tmp_path, name):
    assert safe_name(name) is None
    packed, zipped = tmp_path / "evil-1.0.tar.gz", tmp_path / "evil-1.0.whl"
    with tarfile.open(packed, "w:gz") as archive:
        made.add(archive, "fine.py", b"x = 1")
        made.add(archive, name, b"x = 1")
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("fine.py", "x = 1")
        archive.writestr(name, "x = 1")
    for path in (packed, zipped):
        with pytest.raises(InputError, match="outside its own folder") as caught:
            read_archive(path)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)


def test_links_and_devices_are_never_followed(tmp_path):
    secret = tmp_path / "secret.py"
    secret.write_text("password = 1")
    packed, zipped = tmp_path / "links-1.0.tar.gz", tmp_path / "links-1.0.whl"
    with tarfile.open(packed, "w:gz") as archive:
        made.add(archive, "a.py", type=tarfile.SYMTYPE, linkname=str(secret))
        made.add(archive, "b.py", type=tarfile.LNKTYPE, linkname="../../secret.py")
        made.add(archive, "c.py", type=tarfile.FIFOTYPE)
        made.add(archive, "d.py", type=tarfile.CHRTYPE)
    with zipfile.ZipFile(zipped, "w") as archive:
        link = zipfile.ZipInfo("a.py")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(secret))
    assert read_archive(packed).files == {}
    assert read_archive(packed).passed_over == {"link, not followed": 2, "other, not followed": 2}
    assert read_archive(zipped).files == {}
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    (folder / "inside" / "ok.py").write_text("x = 1")
    (folder / "link.py").symlink_to(secret)
    (folder / "linked").symlink_to(folder / "inside")
    assert list(read_folder(folder, ["inside/ok.py", "link.py", "linked/ok.py"]).files) == ["inside/ok.py"]
    assert list(read_folder(folder).files) == ["inside/ok.py"]


def test_bombs_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_UNPACKED", 3_000_000)
    zipped, packed = tmp_path / "bomb-1.0.whl", tmp_path / "bomb-1.0.tar.gz"
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.writestr(f"{number}.bin", b"\0" * 1_000_000)
    with tarfile.open(packed, "w:gz") as archive:
        made.add(archive, "one.bin", b"\0" * 4_000_000)
    endless = tmp_path / "endless-1.0.tar.gz"  # a header that claims little, and no end of padding behind it
    with gzip.open(endless, "wb") as handle:
        info = tarfile.TarInfo("x" * 90)
        info.type, info.size = tarfile.XHDTYPE, 2_000_000_000
        handle.write(info.tobuf())
        for _ in range(9):
            handle.write(b"\0" * 1_000_000)
    for path in (zipped, packed, endless):
        with pytest.raises(InputError, match="unpacks to more than 3,000,000 bytes"):
            read_archive(path)


def test_a_file_is_not_longer_than_it_says_and_not_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILE", 1000)
    path = made.wheel(tmp_path, files={"big.py": "#" * 2000, "small.py": "x = 1"})
    contents = read_archive(path)
    assert "small.py" in contents.files
    assert "big.py" not in contents.files
    assert contents.passed_over["file over 2 MB"] >= 1
    monkeypatch.setattr(archives, "MAX_FILES", 1)
    with pytest.raises(InputError, match="more than 1 files"):
        read_archive(path)


@pytest.mark.parametrize("name", ["broken-1.0.whl", "broken-1.0.tar.gz", "broken-1.0.tar.xz", "broken-1.0.zip"])
def test_a_broken_archive_is_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(InputError, match="cannot be read as an archive"):
        read_archive(path)
    whole = made.sdist(tmp_path) if ".tar." in name else made.wheel(tmp_path)
    cut = tmp_path / f"cut{''.join(Path(whole).suffixes[-2:]) if '.tar.' in name else '.whl'}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(InputError, match="download it again"):
        read_archive(cut)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_archive(tmp_path / "none-1.0.whl")
