import psutil
import pytest

from monitoring import machine


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    """8 of 16 GB free, whatever the machine of the test has."""
    result = psutil.virtual_memory()._replace(available=8 * machine.GB, total=16 * machine.GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: result)


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(str(content))


def tree(root, lines, **folders):
    """(proc, cgroup) with the lines of /proc/self/cgroup."""
    write(root / "proc" / "self", cgroup="\n".join(lines) + "\n")
    (root / "cgroup").mkdir()
    return root / "proc", root / "cgroup"


def v2(limit, used, cache=0):
    # Half of the cache on either list; what stands beside them must not count.
    content = f"anon 7\nfile 9\ninactive_file {cache // 2}\nactive_file {cache // 2}\nshmem 5\n"
    return {"memory__max": limit, "memory__current": used, "memory__stat": content}


def v1(limit, used, cache=0):
    content = f"cache 9\ninactive_file 3\ntotal_inactive_file {cache}\ntotal_active_file 0\n"
    return {
        "memory__limit_in_bytes": limit,
        "memory__usage_in_bytes": used,
        "memory__stat": content,
    }


def test_without_a_cgroup_the_machine_counts(tmp_path):
    result = machine.available(tmp_path / "none", tmp_path / "none")
    assert (result.free, str(result)) == (
        8 * machine.GB,
        "8.0 GB free of 16.0 GB, memory of this machine",
    )


def test_file_cache_of_a_version_2_cgroup_counts_as_free(tmp_path):
    proc, cgroup = tree(tmp_path, ["0::/job"])
    write(cgroup / "job", **v2(4 * machine.GB, 3 * machine.GB, cache=machine.GB))
    result = machine.available(proc, cgroup)
    assert result.free == 2 * machine.GB
    assert str(result) == "2.0 GB free of 4.0 GB, cgroup limit"


def test_max_is_no_limit(tmp_path):
    proc, cgroup = tree(tmp_path, ["0::/job"])
    write(cgroup / "job", **v2("max", 3 * machine.GB))
    assert machine.available(proc, cgroup).free == 8 * machine.GB


def test_the_tightest_of_nested_cgroups_counts(tmp_path):
    proc, cgroup = tree(tmp_path, ["0::/a/b/c"])
    write(cgroup / "a", **v2(6 * machine.GB, 5 * machine.GB))
    write(cgroup / "a" / "b", **v2(4 * machine.GB, 1 * machine.GB))
    write(cgroup / "a" / "b" / "c", **v2("max", 1 * machine.GB))
    write(cgroup / "other", **v2(machine.GB, machine.GB))
    assert machine.available(proc, cgroup).free == 1 * machine.GB


def test_the_limit_that_slows_counts_as_the_one_that_kills(tmp_path):
    proc, cgroup = tree(tmp_path, ["0::/"])
    write(cgroup, **v2("max", machine.GB), memory__high=2 * machine.GB)
    assert machine.available(proc, cgroup).free == machine.GB


def test_version_1_is_read_at_its_own_mount(tmp_path):
    lines = ["5:cpu,cpuacct:/x", "4:memory:/job", "0::/"]
    proc, cgroup = tree(tmp_path, lines)
    write(cgroup / "memory", **v1(2**63 - 4096, 9 * machine.GB))
    write(cgroup / "memory" / "job", **v1(4 * machine.GB, 3 * machine.GB, cache=machine.GB))
    (cgroup / "unified").mkdir()
    assert machine.available(proc, cgroup).free == 2 * machine.GB


@pytest.mark.parametrize("line", ["4:memory:/docker/0123", "0::/../../job"])
def test_a_path_of_the_host_falls_back_to_the_root_of_the_container(tmp_path, line):
    proc, cgroup = tree(tmp_path, [line])
    write(cgroup / "memory", **v1(3 * machine.GB, machine.GB))
    write(cgroup, **v2(3 * machine.GB, machine.GB))
    assert machine.available(proc, cgroup).free == 2 * machine.GB


def test_more_file_cache_than_usage_leaves_at_most_the_limit(tmp_path):
    proc, cgroup = tree(tmp_path, ["0::/"])
    write(cgroup, **v2(4 * machine.GB, machine.GB, cache=2 * machine.GB))
    assert machine.available(proc, cgroup).free == 4 * machine.GB


def test_usage_above_the_limit_leaves_nothing(tmp_path):
    proc, cgroup = tree(tmp_path, ["0::/"])
    write(cgroup, **v2(machine.GB, 2 * machine.GB))
    assert machine.available(proc, cgroup).free == 0


def test_files_that_cannot_be_read_set_no_limit(tmp_path):
    proc, cgroup = tree(tmp_path, ["0::/job"])
    (cgroup / "job" / "memory.max").mkdir(parents=True)
    write(cgroup / "job", memory__current="?", memory__stat="inactive_file")
    assert machine.available(proc, cgroup).free == 8 * machine.GB


def test_lines_that_say_nothing_are_skipped(tmp_path):
    proc, cgroup = tree(tmp_path, ["", "memory", "0:memory", "0::/job"])
    statistics = "inactive_file\n\ninactive_file many\nactive_file 1000"
    write(cgroup / "job", memory__max=4000, memory__current=3000, memory__stat=statistics)
    assert machine.available(proc, cgroup).free == 2000


def test_a_limit_without_statistics_takes_the_cache_as_used(tmp_path):
    proc, cgroup = tree(tmp_path, ["0::/job"])
    write(cgroup / "job", memory__max=4 * machine.GB, memory__current=3 * machine.GB)
    assert machine.available(proc, cgroup).free == machine.GB


def test_free_shared_memory_is_what_the_file_system_says(tmp_path):
    free, total = machine.shared_memory_free(tmp_path), psutil.disk_usage(str(tmp_path)).total
    assert 0 < free <= total
    assert machine.shared_memory_free(tmp_path / "none") is None
