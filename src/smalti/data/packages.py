"""Public npm packages as folders of a user's cache: downloaded once, unpacked safely, whole or absent.

The cache is `$SMALTI_CACHE`, else `~/.cache/smalti`. Packages are fetched by the ordinary client
(`npm pack NAME@VERSION`), so that proxies, mirrors and logins are those of the user's own npm.
"""

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from smalti.core.errors import UserError
from smalti.core.files import atomic_folder, check_writable

TIMEOUT = 1800  # seconds that one download may take


def cache_folder() -> Path:
    """Where downloads and prepared sets are kept; the folder may not exist yet."""
    given = os.environ.get("SMALTI_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "smalti"


def npm_package(name: str, version: str) -> Path:
    """The unpacked folder of an npm package; downloads it at the first call.

    Args:
        name: package name, such as `openmoji` or `@iconify-json/noto`.
        version: the exact version.

    Raises:
        UserError: npm is missing, the download fails or the archive is damaged.
    """
    folder = cache_folder() / "npm" / f"{name.removeprefix('@').replace('/', '-')}-{version}"
    if folder.is_dir():
        return folder
    check_writable(folder.parent)
    with tempfile.TemporaryDirectory(prefix=".pack.", dir=folder.parent) as temporary:
        archive = _pack(name, version, Path(temporary))
        with atomic_folder(folder) as unpacked:
            _unpack(archive, unpacked, f"{name}@{version}")
    return folder


def _pack(name: str, version: str, folder: Path) -> Path:
    wanted = f"{name}@{version}"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"cannot download {wanted}: the program npm is not on the PATH; install Node.js with npm and repeat"
        )
    command = [npm, "pack", wanted, "--pack-destination", str(folder), "--ignore-scripts", "--fetch-retries=1"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"cannot download {wanted}: npm took over {TIMEOUT} s; check the network and repeat") from error
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise UserError(f"cannot download {wanted}: {_reason(done.stderr)}; check the network and repeat")
    return archives[0]


def _reason(text: str) -> str:
    """The line of npm's messages that says what went wrong."""
    lines = [line.removeprefix("npm error").removeprefix("npm ERR!").strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("code ", "errno ", "syscall ", "A complete log"))]
    return lines[0] if lines else "npm gave no archive"


def _unpack(archive: Path, folder: Path, name: str) -> None:
    """Unpacks without the archive's single top folder; refuses members that would leave `folder`."""

    def inside(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        _, _, rest = member.name.partition("/")
        return tarfile.data_filter(member.replace(name=rest, deep=False), path) if rest else None

    try:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter=inside)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"the archive of {name} is damaged or unsafe: {error}; repeat the download") from error
