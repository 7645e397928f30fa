"""Memory limits of Linux control groups, which containers and batch systems set below the machine's memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

# Of this process, one line per hierarchy: "0::/PATH" in version 2, "NUMBER:CONTROLLERS:/PATH" in version 1.
_GROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
# Files with the limit and the use, and the line of memory.stat with the page cache that is taken away first.
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def memory_within_limits() -> float:
    """Return the bytes of RAM that the control groups of this process still allow; infinity without a limit.

    Source: "Memory" in the kernel's ``admin-guide/cgroup-v2`` and ``admin-guide/cgroup-v1/memory``.
    """
    return min((_allowed(*group) for group in _memory_groups()), default=math.inf)


def _memory_groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield every group that limits the process, with the names of its files: a group's parents limit it too."""
    if not _GROUPS.is_file():
        return
    for line in _GROUPS.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, names = _MOUNT, _VERSION_2
        elif "memory" in controllers.split(","):
            mount, names = _MOUNT / "memory", _VERSION_1
        else:
            continue
        # A container may see its own group as the mount while the path still counts from the host's.
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / names[0]).is_file():
                yield folder, names
            if folder == mount:
                break


def _allowed(group: Path, names: tuple[str, str, str]) -> float:
    limit, use, cache = names
    try:
        most, used = (group / limit).read_text().strip(), int((group / use).read_text())
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # a group of which only a part can be read
        return math.inf
    return math.inf if most == "max" else max(0, int(most) - used + int(kept.get(cache, 0)))
