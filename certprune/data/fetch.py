"""Files of published data sets: found under the data folder, or downloaded and held against their checksum."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from certifiers.bridges import import_torchvision
from certifiers.errors import InputError


@dataclass(frozen=True)
class Archive:
    """A published file: where it can be had, and the MD5 that its publisher gives."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def check_download(download: object) -> None:
    if not isinstance(download, bool):
        raise InputError(f"download must be true or false, but {download!r} came.")


def folder_of(title: str, name: str, needed: str, archive: Archive, root: Path, download: bool) -> Path:
    """The folder `name` below `root`, or `root` itself, that has the file `needed`; else unpacked from `archive`.

    The archive is taken from `root` if it lies there, else downloaded into it (`download`); either way its checksum
    must be right before anything of it is unpacked. Raises InputError with what to put where.
    """
    found = find_folder(root, name, needed)
    if found is not None:
        return found
    put = f"put {archive.name} (from {archive.url}) or the folder {name} into {root}"
    packed = root / archive.name
    if not packed.is_file() and not download:
        raise InputError(f"{title} was not found in {root}, and the option download is false. To mend it, {put}.")
    utils = import_torchvision().datasets.utils
    if packed.is_file() and not utils.check_md5(packed, archive.md5):
        raise damaged(packed, archive.md5)
    try:
        root.mkdir(parents=True, exist_ok=True)
        utils.download_and_extract_archive(archive.url, str(root), md5=archive.md5)
    except (OSError, RuntimeError, EOFError) as error:  # URLError is an OSError
        raise InputError(
            f"{title} was not found in {root}, and its download failed ({error}). To mend it, {put}, or set the "
            "option root (or the environment variable CERTPRUNE_DATA) to a folder that has it."
        ) from error
    found = find_folder(root, name, needed)
    if found is None:
        raise InputError(f"{archive.name} has no {name}/{needed} in it. Delete it and get it again: {archive.url}")
    return found


def find_folder(root: Path, name: str, needed: str) -> Path | None:
    return next((folder for folder in (root / name, root) if (folder / needed).exists()), None)


def checked_file(title: str, archive: Archive, folder: Path, download: bool) -> Path:
    """The file itself (not unpacked) in `folder`, its checksum right; downloaded where it is not there."""
    path = folder / archive.name
    utils = import_torchvision().datasets.utils
    if not path.is_file():
        put = f"put {archive.name} (from {archive.url}) into {folder}"
        if not download:
            raise InputError(f"{title}: there is no {path}, and the option download is false. To mend it, {put}.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            utils.download_url(archive.url, str(folder), archive.name, archive.md5)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{title}: there is no {path}, and its download failed ({error}). To mend it, {put}."
            ) from error
    if not utils.check_md5(path, archive.md5):
        raise damaged(path, archive.md5)
    return path


def damaged(path: Path, md5: str) -> InputError:
    return InputError(
        f"{path} is damaged or another file: its MD5 is not {md5}, as published. Delete it and get it again."
    )
