"""Memory figures, read from a made-up machine: /proc and control groups of both versions."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from samestep.core.memory import available_bytes, check_fits, pss_bytes
from samestep.errors import SettingsError

MIB = 1 << 20
MEMINFO = "MemTotal:  900 kB\nMemFree:  100 kB\nMemAvailable:  102400 kB\n"  # 100 MiB
UNLIMITED_V1 = "9223372036854771712\n"


@pytest.fixture
def machine(tmp_path):
    """A function that writes files of a made-up machine and returns its root."""

    def write(files: dict[str, str]):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def group(folder: str, version: int, limit: str, usage: int, droppable: int = 0) -> dict[str, str]:
    limit_file, usage_file, field = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    stat = f"anon 5\n{field} {droppable}\nactive_file 7\n"
    return {f"{folder}/{limit_file}": limit, f"{folder}/{usage_file}": f"{usage}\n", f"{folder}/memory.stat": stat}


def test_without_groups_the_kernel_decides(machine):
    assert available_bytes(machine({"proc/meminfo": MEMINFO})) == 100 * MIB


def test_a_system_that_does_not_tell(machine):
    root = machine({})
    assert available_bytes(root) is None and pss_bytes(root=root) is None
    check_fits(1 << 60, "Everything", root)


CGROUP = "sys/fs/cgroup"
V1 = "5:cpu:/elsewhere\n4:cpuset,memory:/jobs/a\n0::/\n"
GROUPS = {
    "v2, own group": ("0::/jobs/a\n", group(f"{CGROUP}/jobs/a", 2, f"{50 * MIB}", 20 * MIB), 30),
    "v2, file cache does not count": ("0::/a\n", group(f"{CGROUP}/a", 2, f"{50 * MIB}", 20 * MIB, 15 * MIB), 45),
    "v2, a parent": ("0::/jobs/a\n", group(f"{CGROUP}/jobs", 2, f"{40 * MIB}", 15 * MIB), 25),
    "v2, unlimited": ("0::/a\n", group(f"{CGROUP}/a", 2, "max\n", 20 * MIB), 100),
    "v2, seen from inside": ("0::/out/of/sight\n", group(CGROUP, 2, f"{30 * MIB}", 10 * MIB), 20),
    "v2, above us": ("0::/../../a\n", group(f"{CGROUP}/a", 2, f"{30 * MIB}", 10 * MIB), 20),
    "v2 beside v1": (V1, group(f"{CGROUP}/unified", 2, f"{30 * MIB}", 10 * MIB), 20),
    "v1": (V1, group(f"{CGROUP}/memory/jobs/a", 1, f"{60 * MIB}", 20 * MIB, 5 * MIB), 45),
    "v1, seen from inside": (V1, group(f"{CGROUP}/memory", 1, f"{60 * MIB}", 20 * MIB), 40),
    "v1, unlimited": (V1, group(f"{CGROUP}/memory/jobs/a", 1, UNLIMITED_V1, 20 * MIB), 100),
    "v1, the memory of another group": (V1, group(f"{CGROUP}/memory/jobs/b", 1, f"{60 * MIB}", 20 * MIB), 100),
    "v1, the path of another controller": (V1, group(f"{CGROUP}/memory/elsewhere", 1, f"{60 * MIB}", 20 * MIB), 100),
    "over its limit": ("0::/a\n", group(f"{CGROUP}/a", 2, f"{10 * MIB}", 12 * MIB), 0),
    "larger than the machine": ("0::/a\n", group(f"{CGROUP}/a", 2, f"{900 * MIB}", 2 * MIB), 100),
    "nonsense": ("0::/a\nx\n\n", group(f"{CGROUP}/a", 2, "many", 12 * MIB), 100),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups(machine, name):
    cgroup, files, expected_mib = GROUPS[name]
    root = machine({"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup, **files})
    assert available_bytes(root) == expected_mib * MIB


def test_check_fits_names_both_numbers_and_a_way_out(machine):
    root = machine({"proc/meminfo": MEMINFO})
    check_fits(100 * MIB, "The arena of 4 workers", root)
    with pytest.raises(SettingsError) as caught:
        check_fits(100 * MIB + 1, "The arena of 4 workers", root)
    for words in ("The arena of 4 workers needs", "104,857,601", "104,857,600", "fewer workers"):
        assert words in str(caught.value)


def test_pss_reads_the_process_asked_for(machine):
    root = machine(
        {f"proc/{pid}/smaps_rollup": f"Rss: 9 kB\nPss:  {n} kB\nPss_Anon: 1 kB\n" for pid, n in ((7, 3), (8, 5))}
    )
    assert (pss_bytes(7, root), pss_bytes("8", root), pss_bytes(9, root)) == (3 * 1024, 5 * 1024, None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells these figures")
def test_this_machine():
    before = pss_bytes()
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    after = pss_bytes(os.getpid())
    assert held.numel() == 64 * MIB
    assert before is not None and after is not None and after - before > 48 * MIB
    assert available_bytes() > 0
    check_fits(1, "A byte")
    with pytest.raises(SettingsError):
        check_fits(1 << 60, "Everything")
