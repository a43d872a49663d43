"""A program's writes go to a scratch layer in memory, and nothing leaves the machine.

    python -m peftplan.rehearse.scratch FOLDER MIB NETWORK WRITES COMMAND …

New namespaces of Linux, which need no privileges where the kernel lets users make them: every file system is covered by a layer
(overlayfs over a tmpfs), so that the program sees what is there, and what it writes, renames or deletes lasts as long as it runs.
FOLDER alone stays real. Without a network there is the loopback device only.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path

from peftplan.rehearse import keeper
from peftplan.rehearse.folders import LOCK, hold

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
OF_THE_KERNEL = {"proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "mqueue", "securityfs", "debugfs", "tracefs", "bpf"}
"""File systems that hold no files of a user: they are shown as they are."""
FAILED = 125
"""Exit code where there is no scratch layer: nothing was started."""


def enter(folder: Path, *, mib: int, network: bool, writes: bool) -> Callable[[], int]:
    """Go into the layer. Returns what says the bytes that lie there. Raises OSError where the system allows none.

    With `writes` and `network` there is none, and no namespace is needed.
    """
    if writes and network:
        return lambda: 0
    user, group, here = os.getuid(), os.getgid(), Path.cwd()
    kinds = CLONE_NEWUSER | (0 if writes else CLONE_NEWNS) | (0 if network else CLONE_NEWNET)
    _call("unshare", kinds)
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
    if not network:
        _loopback_up()
    if writes:
        return lambda: 0
    layers = _cover(folder, mib)
    os.chdir(here)
    return lambda: sum(map(_used, layers))


def _used(layer: int) -> int:
    """Bytes of the file system in which a folder is that was opened."""
    stat = os.fstatvfs(layer)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


def _cover(folder: Path, mib: int) -> list[int]:
    """Cover every file system. Returns the opened folders of those that hold what is written."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    points = dict(_mounts())
    layer = folder / "layer"
    layer.mkdir()
    _mount("tmpfs", str(layer), "tmpfs", 0, f"size={mib}m,mode=755")
    (layer / "root").mkdir()
    _cover_directory(Path("/"), layer / "root", points, layer, folder)
    real = layer / "root" / folder.relative_to("/")
    _mount(str(folder), str(real), None, MS_BIND)
    if (layer / "root/dev/shm").is_dir():
        _mount("tmpfs", str(layer / "root/dev/shm"), "tmpfs", 0, f"size={mib}m,mode=1777")
    layers = [path for path in (layer, layer / "root/dev/shm") if path.is_dir()]
    opened = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in layers]
    os.chroot(layer / "root")
    return opened


def _cover_directory(source: Path, target: Path, points: Mapping[Path, str], layer: Path, folder: Path) -> None:
    """Show a directory at `target`. An overlay can cover it whole only if nothing is mounted below; else it is gone through."""
    if points.get(source) in OF_THE_KERNEL:
        _mount(str(source), str(target), None, MS_BIND | MS_REC)
    elif not any(source in point.parents for point in points):
        _cover_whole(source, target, layer)
    else:
        os.chmod(target, source.stat().st_mode & 0o7777)
        for entry in os.scandir(source):
            covered = target / entry.name
            if entry.is_symlink():
                covered.symlink_to(os.readlink(entry.path))
            elif entry.is_dir():
                covered.mkdir()
                _cover_directory(Path(entry.path), covered, points, layer, folder)
            else:
                covered.touch()
                _mount(entry.path, str(covered), None, MS_BIND)


def _cover_whole(source: Path, target: Path, layer: Path) -> None:
    number = len(os.listdir(layer))
    upper, work = layer / f"{number}.upper", layer / f"{number}.work"
    upper.mkdir()
    work.mkdir()
    os.chmod(upper, source.stat().st_mode & 0o7777)
    data = f"lowerdir={_escaped(source)},upperdir={upper},workdir={work}"
    for options in (f"{data},userxattr", data):
        with suppress(OSError):
            _mount("overlay", str(target), "overlay", 0, options)
            return
    _mount(str(source), str(target), None, MS_BIND)
    _mount(None, str(target), None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def _mounts() -> Iterator[tuple[Path, str]]:
    """Mount points with their kind of file system, outer ones first; of several on one point the last."""
    points: dict[Path, str] = {}
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].encode().decode("unicode_escape")  # a blank is \040
        points[Path(point)] = rest.split()[0]
    yield from points.items()


def _escaped(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", ioctl(control, SIOCGIFFLAGS, request), 16)
        ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    text = [None if part is None else part.encode() for part in (source, target, kind, data)]
    _call("mount", text[0], text[1], text[2], ctypes.c_ulong(flags), text[3])


def _call(name: str, *arguments: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name} {arguments}: {os.strerror(code)}")


def main(arguments: list[str]) -> None:
    """Enter the layer, then run the command there until all of it has ended."""
    name, mib, network, writes, *command = arguments
    folder = Path(name)
    hold(folder / LOCK)
    try:
        written = enter(folder, mib=int(mib), network=network == "1", writes=writes == "1")
    except OSError:
        sys.exit(FAILED)
    (folder / "started").touch()
    preload = os.environ.pop("PEFTPLAN_PRELOAD", None)
    if preload:
        os.environ["LD_PRELOAD"] = preload
    keeper.keep(command, folder, limit=int(mib) << 20, written=written)


if __name__ == "__main__":
    main(sys.argv[1:])
