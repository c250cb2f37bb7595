"""Images in archives, .zip and .tar, which are read without unpacking them to disk."""

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from score_sde import files
from score_sde.errors import UserError, one_line
from score_sde.sources.pictures import DamagedImage
from score_sde.sources.raw import MAX_ENCODED, Parts, Source, Tree, is_hidden
from score_sde.sources.trees import of_tree

T = TypeVar("T")

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MAX_UNPACKED = 2**31  # bytes of a packed tar, which is held in memory
_PACKED = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by their first two bytes


def from_zip(path: Path) -> Source:
    """The images of a zip archive; a folder that holds all of them is the data set's own."""
    try:
        archive, size = zipfile.ZipFile(path), path.stat().st_size
        infos = [info for info in archive.infolist() if not info.is_dir()]
    except Exception as error:  # zipfile raises several types on a damaged file
        raise UserError(f"{path} is not a readable zip archive: {one_line(error)}") from error
    members, passed = {}, Counter()
    for info in infos:
        _add(members, passed, info.filename, info, stat.S_ISLNK(info.external_attr >> 16))
    members = _without_cover(members)

    def read(parts: Parts) -> bytes:
        info, where = members[parts], f"{path}/{'/'.join(parts)}"
        if info.flag_bits & 1:
            raise UserError(f"{where} is encrypted: make an archive without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{where} is compressed by another method than deflate: unpack it and zip it again")
        inside = 0 <= info.header_offset < size and info.compress_size <= size
        if not inside or info.file_size > files.MOST_DEFLATED * info.compress_size:
            raise DamagedImage(f"{where} is damaged: it promises more than the archive holds")
        if info.file_size > MAX_ENCODED:
            raise UserError(f"{where} promises {info.file_size} bytes: more than {MAX_ENCODED} are not read")
        try:
            return archive.read(info)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
            raise DamagedImage(f"{where} is damaged: {one_line(error)}") from error

    return _of_members(path, members, passed, read, lambda parts: members[parts].file_size)


def is_tar(path: Path) -> bool:
    """Whether a file is called as tar archives are, packed ones too."""
    return path.is_file() and path.name.lower().endswith(TARS)


def from_tar(path: Path) -> Source:
    """The images of a tar archive, as of a zip; a packed one is held in memory."""
    members, passed, damage = {}, Counter(), "download or make it again"
    try:
        with path.open("rb") as file:
            packed = _PACKED.get(file.read(2))
        content = None if packed is None else _unpacked(path, packed)
        opened = lambda: path.open("rb") if content is None else io.BytesIO(content)
        with opened() as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isdir():
                    link = not member.isreg() or member.issparse()
                    _add(members, passed, member.name, (member.offset_data, member.size), link)
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile ends at a damaged header as if it were the last
                raise UserError(f"{path} is damaged in the middle, at byte {archive.offset}: {damage}")
    except (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, ValueError) as error:
        raise UserError(f"{path} is not a readable tar archive: {one_line(error)}: {damage}") from error
    members = _without_cover(members)

    def read(parts: Parts) -> bytes:
        (offset, size), where = members[parts], f"{path}/{'/'.join(parts)}"
        if size > MAX_ENCODED:
            raise UserError(f"{where} has {size} bytes: more than {MAX_ENCODED} are not read")
        with opened() as file:
            file.seek(offset)
            return file.read(size)

    return _of_members(path, members, passed, read, lambda parts: members[parts][1])


def _unpacked(path: Path, packed: Callable) -> bytes:
    content = io.BytesIO()
    with packed(path) as file:
        while chunk := file.read(2**20):
            content.write(chunk)
            if content.tell() > MAX_UNPACKED:
                raise UserError(f"{path} unpacks to more than {MAX_UNPACKED} bytes: unpack it to a .tar or to a folder")
    return content.getvalue()


def _add(members: dict[Parts, T], passed: Counter, name: str, member: T, link: bool):
    """Add a member under its path, or count why it is passed over."""
    parts = tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
    if ".." in parts:
        passed["path upward"] += 1
    elif any(map(is_hidden, parts)):
        passed["hidden"] += 1
    elif link or not parts:
        passed["link"] += 1
    else:
        members[parts] = member


def _without_cover(members: dict[Parts, T]) -> dict[Parts, T]:
    """The members without the one folder that holds them all, if there is one."""
    covered = len({parts[0] for parts in members}) == 1 and all(len(parts) > 1 for parts in members)
    return {parts[1:]: member for parts, member in members.items()} if covered else members


def _of_members(path: Path, members: dict, passed: Counter, read: Callable, length: Callable) -> Source:
    folders = {parts[:depth] for parts in members for depth in range(1, len(parts))}
    return of_tree(Tree(str(path), sorted(members), folders, read, length, passed))
