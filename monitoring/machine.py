"""What the machine does now, as plain values: processes, limits of memory, load, GPUs.

    machine = System("runs/exp001")
    machine.read({os.getpid(): "training"})      # a dict that json can write

Shows what there is. Outside of a container, without sensors or a GPU, or on another system than
Linux, a value is None, or a list empty; nothing here raises because something cannot be read. The
GPUs are NVIDIA's, read with nvidia-ml-py.
"""

import os
import time

import psutil

from monitoring import memory

SELDOM = 0.005  # of one core: the most that an expensive reading may cost


class System:
    """Readings of this machine, one after another; CPU percentages are since the one before.

    folder: the file system of which `disk` tells, None for none.
    """

    def __init__(self, folder=None):
        self.folder = folder
        self.processes, self.gpus = Processes(), Gpus()
        self.temperature = Seldom(cpu_temperature)

    def read(self, roles, memory_limit=None):
        """What the machine does now. roles: {pid: name}; memory_limit: bytes that the run may take.

        processes    of each pid of roles that there is, see `Processes.read`
        tree         bytes that these processes take together; of none, this one and its children
        rooms        [bytes free, bytes in all, whose limit] of `memory.rooms`, then of
                     memory_limit as that of "run.memory_gb"; the first is the machine's
        oom_kills    processes that the kernel has killed for memory, see `memory.oom_kills`
        swap         [bytes used, in all]
        shm, disk    [bytes free, in all] of /dev/shm and of the folder's file system
        load         processes that ran or wanted to, means over 1, 5 and 15 minutes
        cores        of the CPU
        temperature  degrees Celsius of the hottest part of the CPU
        gpus         see `Gpus.read`
        """
        tree = _attempt(memory.resident_memory, list(roles) or None)
        rooms = [list(room) for room in _attempt(memory.rooms) or ()]
        if memory_limit is not None and tree is not None:
            rooms.append([max(0, memory_limit - tree), memory_limit, "run.memory_gb"])
        return {
            "processes": self.processes.read(roles),
            "tree": tree,
            "rooms": rooms,
            "oom_kills": _attempt(memory.oom_kills),
            "swap": _attempt(swap),
            "shm": _attempt(file_system, "/dev/shm"),
            "disk": None if self.folder is None else _attempt(file_system, self.folder),
            "load": _attempt(load),
            "cores": os.cpu_count(),
            "temperature": _attempt(self.temperature),
            "gpus": self.gpus.read(),
        }


def _attempt(function, *arguments):
    """What a reading gives, None where the system does not give it."""
    # Of files and drivers that differ from machine to machine, anything may come.
    try:
        return function(*arguments)
    except Exception:
        return None


class Seldom:
    """A reading that is taken so rarely that it costs no more than a share of one core.

    seconds: at least from one to the next. Called too early it returns None, so that no old value
    passes for a new one.
    """

    def __init__(self, function, seconds=0.0, share=SELDOM):
        self.function, self.seconds, self.share, self.next_at = function, seconds, share, 0.0

    def __call__(self, *arguments):
        begin = time.perf_counter()
        if begin < self.next_at:
            return None
        try:
            return self.function(*arguments)
        finally:
            end = time.perf_counter()
            self.next_at = max(begin + self.seconds, end + (end - begin) / self.share)


# ---------------------------------------------------------------------------- processes


class Processes:
    """What named processes take; remembers them for their CPU percentages."""

    def __init__(self):
        self.known = {}  # {pid: psutil.Process} of the last reading
        self.proportional = Seldom(proportional_sizes, seconds=60.0)

    def read(self, roles):
        """A dict for each process of roles, {pid: name}, that there is.

        pid, role, rss: bytes that it maps, shared ones in full; pss: shared pages by proportion,
        None in most readings, for it takes some 10 ms per GB; cpu: percent of one core since the
        reading before, None in the first; status: a word of psutil, such as sleeping or zombie.
        """
        before, self.known, found = self.known, {}, []
        for pid, role in roles.items():
            process = before.get(pid) or _process(pid)
            figures = None if process is None else _figures(process)
            if figures is None:
                continue
            if pid not in before:
                figures["cpu"] = None
            self.known[pid] = process
            found.append({"pid": pid, "role": role, **figures})
        sizes = self.proportional(self.known) or {}
        return [{**one, "pss": sizes.get(one["pid"])} for one in found]


def _process(pid):
    try:
        return psutil.Process(pid)
    except (psutil.Error, ValueError):
        return None


def _figures(process):
    """rss, pss, cpu and status of a psutil process; None if it has ended."""
    try:
        with process.oneshot():
            rss, cpu = process.memory_info().rss, round(process.cpu_percent(None), 1)
            return {"rss": rss, "pss": None, "cpu": cpu, "status": process.status()}
    except psutil.ZombieProcess:
        return {"rss": 0, "pss": None, "cpu": None, "status": psutil.STATUS_ZOMBIE}
    except (psutil.Error, OSError):
        return None


def proportional_sizes(processes):
    """{pid: bytes} of {pid: psutil.Process}, a page that n of them map counted 1/n; Linux alone."""
    sizes = {pid: _attempt(_proportional_size, one) for pid, one in processes.items()}
    return {pid: size for pid, size in sizes.items() if size is not None}


def _proportional_size(process):
    return process.memory_full_info().pss


# ---------------------------------------------------------------------------- the machine


def swap():
    """[bytes used, bytes in all]."""
    found = psutil.swap_memory()
    return [found.used, found.total]


def file_system(path):
    """[bytes free for this user, bytes in all] of the file system of a path."""
    found = psutil.disk_usage(str(path))
    return [found.free, found.total]


def load():
    """Processes that ran or wanted to: means over 1, 5 and 15 minutes."""
    return [round(number, 2) for number in psutil.getloadavg()]


def cpu_temperature():
    """Degrees Celsius of the hottest sensor of the CPU; None where none is told."""
    # Names that drivers of Linux give the sensors of a processor: Intel, AMD, Arm.
    names = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
    sensors = psutil.sensors_temperatures()
    return max((one.current for name in names for one in sensors.get(name, ())), default=None)


# ---------------------------------------------------------------------------- GPUs


class Gpus:
    """The GPUs that this process may see; none where there is no driver or no nvidia-ml-py.

    CUDA_VISIBLE_DEVICES chooses among them as CUDA does, by their order on the bus (CUDA's own
    order differs where cards of several kinds stand in one machine).
    """

    def __init__(self):
        self.nvml, self.devices = None, []
        _attempt(self._find)

    def _find(self):
        import pynvml as nvml

        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        names = [_text(nvml.nvmlDeviceGetName(handle)) for handle in handles]
        chosen = visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self.nvml, self.devices = nvml, [(i, names[i], handles[i]) for i in chosen]

    def read(self):
        """A dict for each GPU: index, name, used and total (bytes), load (%), temperature, power.

        Degrees Celsius and watts. What a GPU does not tell is None, as is everything but its name
        once its driver has gone.
        """
        return [self._figures(*device) for device in self.devices]

    def _figures(self, index, name, handle):
        nvml = self.nvml
        held = _attempt(nvml.nvmlDeviceGetMemoryInfo, handle)
        busy = _attempt(nvml.nvmlDeviceGetUtilizationRates, handle)
        sensor = nvml.NVML_TEMPERATURE_GPU
        power = _attempt(nvml.nvmlDeviceGetPowerUsage, handle)  # milliwatts
        return {
            "index": index,
            "name": name,
            "used": getattr(held, "used", None),
            "total": getattr(held, "total", None),
            "load": getattr(busy, "gpu", None),
            "temperature": _attempt(nvml.nvmlDeviceGetTemperature, handle, sensor),
            "power": None if power is None else round(power / 1000),
        }


def visible(uuids, text):
    """Which GPUs, as indices into uuids, a value of CUDA_VISIBLE_DEVICES leaves to a process.

    None: all. Numbers, or beginnings of "GPU-..." identifiers, up to the first that is of no GPU;
    with "MIG-..." all, for a part of a GPU has no reading of its own.
    """
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if text is None or any(word.startswith("MIG-") for word in words):
        return list(range(len(uuids)))
    chosen = []
    for word in words:
        named = [i for i, uuid in enumerate(uuids) if word.startswith("GPU-")]
        named = [i for i in named if uuids[i].startswith(word)]
        if word.isdecimal() and int(word) < len(uuids):
            named = [int(word)]
        if len(named) != 1:
            break
        chosen += named
    return chosen


def _text(name):
    """Text of what NVML gives: early versions of the package return bytes."""
    return name.decode() if isinstance(name, bytes) else name
