"""Downloads of published data sets by name: verified, and continued after a break."""

import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import DOWNLOAD_TIMEOUT, InputError


class Download(NamedTuple):
    """The published files of a data set: {file name: MD5}, and where they are."""

    urls: tuple  # mirrors, tried in this order
    files: dict


DOWNLOADS = {
    "mnist": Download(
        ("https://ossci-datasets.s3.amazonaws.com/mnist/",),
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": Download(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar-100": Download(
        ("https://www.cs.toronto.edu/~kriz/",),
        {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
    ),
}


def download(name: str) -> Path:
    """The folder with the verified files of DOWNLOADS[name], in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "parallel-cnn" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, md5 in DOWNLOADS[name].files.items():
        path = folder / file
        if path.exists() and file_md5(path) == md5:
            continue
        problems = []
        for url in DOWNLOADS[name].urls:
            problem = fetch(url + file, path, md5)
            if problem is None:
                break
            problems.append(f"{url}: {problem}")
        else:
            raise InputError(
                f"{file} cannot be downloaded ({'; '.join(problems)}): put "
                f"{', '.join(DOWNLOADS[name].files)} into a folder, and give that in place of "
                f"{name}"
            )
    return folder


def fetch(url: str, path: Path, md5: str) -> str | None:
    """Download a file; return the problem in words, or None. What arrived before a break stays in
    a .part file, and the next try asks for the rest."""
    from tqdm import tqdm

    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as answer:
            if answer.status != 206:  # the server sends all of it
                done = 0
            length = answer.length
            total = None if length is None else done + length
            bar = tqdm(total=total, initial=done, desc=path.name, unit="B", unit_scale=True)
            bar.disable = not sys.stderr.isatty()
            with bar, open(part, "ab" if done else "wb") as file:
                while block := answer.read(2**16):
                    file.write(block)
                    bar.update(len(block))
            if total is not None and part.stat().st_size < total:
                return f"it broke off after {part.stat().st_size:,} of {total:,} bytes"
    except urllib.error.HTTPError as error:
        if error.code == 416:  # more is here than there is: it was another file
            part.unlink()
        return f"{error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)).strip() or type(error).__name__
    if file_md5(part) != md5:
        part.unlink()
        return "the file that arrived has a wrong checksum"
    part.rename(path)
    return None


def file_md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
