"""Scripts in processes of their own that begin with torch imported, which takes 2 s of each.

They are forked from a process that has imported PACKAGES, and nothing of ours. conftest.py starts
that as soon as it is known that there are tests for it.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import resource_tracker

PACKAGES = "torch torch._dynamo torch.distributed.run h5py nibabel psutil yaml pydantic.main "
PACKAGES += "rich.progress scipy.ndimage scipy.spatial scipy.sparse.csgraph"
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(PACKAGES.split())


class Script:
    """python with some words after it, `script.py ...` or `-c code ...`, as subprocess.Popen."""

    def __init__(self, words, cwd=".", env=os.environ):
        self.files = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]
        names = [file.name for file in self.files]
        about = [str(word) for word in words], os.path.abspath(cwd), dict(env)
        self.process = FORKED.Process(target=_begin, args=(names, *about))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def communicate(self, timeout=None):
        """(standard output, standard error), once it has ended."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.pid, timeout)
        return tuple(file.read() for file in self.files)


def _begin(files, words, folder, environment):
    gc.freeze()  # as in conftest.py
    resource_tracker._resource_tracker._fd = None  # one of its own, or what it leaks would be ours
    for number, name in enumerate(files, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-c":
        _, code, *arguments = words
        sys.argv = ["-c", *arguments]
        exec(code, {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def run(words, *, timeout=300, **where):
    """As subprocess.run, whose result it returns."""
    script = Script(words, **where)
    try:
        out, err = script.communicate(timeout)
    finally:
        script.kill()
    return subprocess.CompletedProcess(words, script.returncode, out, err)
