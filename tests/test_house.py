"""The house: which file stands where, and which way imports may point.

Every import counts, also one inside a function. tests/ and benchmarks/ may import anything.
"""

import ast
import functools
import graphlib
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The files of each folder. A file that is not listed here fails, and so does a name without a file.
ROOMS = {
    "volumes": "files formats volume tiff nifti nrrd metaimage hdf5 layouts classes ingest "
    "phantoms skeletons statistics casefile inputs origins submission colors data_sheet atomic "
    "processes ome_zarr pieces zarr_store zarr_shards zarr_files",
    "topology": "distance soft_skeleton persistence neighbors",
    "monitoring": "machine records recorder health panels picture formatting",
    "scoring": "metrics masks classes surface dilation partitions homology gaps calibration "
    "postprocess inputs parallel report blocks block_postprocess "
    "block_scores block_inputs",
    "patches": "cache resample intensity augment contact_sheet feed transfer",
    "runtime": "config build composite_loss run evaluations checkpoint folder log signals "
    "microbatch device_memory cuda nonfinite timer memory_guard sliding_window splits evaluator "
    "validation jobs comparison page distributed ending ensemble arrays parts tuning outputs "
    "step_batches optimizer window_axis window_transfer onednn precision threads own_threshold "
    "columns chunk_cache masked_source scrolls seams scroll_figures console members",
}
TOP = "settings data model norm_mish losses"
SCRIPTS = "prepare train infer evaluate monitor tune sweep".split()

# What each room, or file at the top, may import of ours: always from a lower floor.
LOWER = {"settings", "volumes", "topology", "monitoring", "scoring", "patches"}
LOWER |= {"data", "model", "norm_mish", "losses"}
MAY_IMPORT = {
    "settings": set(),
    "volumes": set(),
    "topology": set(),
    "monitoring": {"volumes"},
    "scoring": {"volumes"},
    "patches": {"volumes", "settings", "monitoring"},
    "data": {"patches", "volumes", "monitoring"},
    "model": {"norm_mish"},
    "norm_mish": set(),
    "losses": {"topology"},
    "runtime": LOWER,
    **dict.fromkeys(SCRIPTS, LOWER | {"runtime"}),
}
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION, MOST_LINES = 420, 60, 25_500
TRAINING_FUNCTIONS = {("train", "main"), ("train", "train")}  # the story is one function


# ---------------------------------------------------------------------------- the checker


def source_files(root):
    """{"room.module" or "module": path} of everything but tests/ and benchmarks/."""
    paths = [p.relative_to(root) for p in [*root.glob("*.py"), *root.glob("*/*.py")]]
    paths = [p for p in paths if p.parts[0] not in ("tests", "benchmarks")]
    return {".".join(p.with_suffix("").parts).removesuffix(".__init__"): root / p for p in paths}


def imports(module, files):
    """Names of our modules that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(files[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*package, node.module] if node.module else package)
            inner = {f"{source}.{alias.name}" for alias in node.names}
            names |= inner & files.keys() or {source}
    return {name for name in names if name in files or name.split(".")[0] in files}


def room_of(module):
    return module.split(".")[0]


def wrong_arrows(root):
    files = source_files(root)
    faults = []
    for module in files:
        allowed = {room_of(module), *MAY_IMPORT.get(room_of(module), ())}
        for name in sorted(imports(module, files)):
            if room_of(name) in SCRIPTS and name != module:
                faults.append(f"{module} imports the script {name}")
            elif room_of(name) not in allowed:
                faults.append(f"{module} imports {name}, which is not below it")
    return faults


def circles(root):
    files = source_files(root)
    try:
        list(graphlib.TopologicalSorter({m: imports(m, files) for m in files}).static_order())
    except graphlib.CycleError as error:
        return ["circle: " + " -> ".join(error.args[1])]
    return []


def wrong_places(root):
    """Files that no room lists, and listed names without a file."""
    listed = {f"{room}.{name}" for room, names in ROOMS.items() for name in names.split()}
    listed |= {*TOP.split(), *ROOMS}
    files = set(source_files(root))
    faults = [f"{module} is in no room" for module in sorted(files - listed - set(SCRIPTS))]
    return faults + [f"{module} is listed, but there is no such file" for module in listed - files]


def too_long(root):
    faults = []
    for module, path in source_files(root).items():
        text = path.read_text()
        if (lines := len(text.splitlines())) > MOST_LINES_OF_A_FILE:
            faults.append(f"{module} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or (module, node.name) in TRAINING_FUNCTIONS:
                continue
            if (lines := node.end_lineno - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION:
                faults.append(f"{module}.{node.name} has {lines} lines")
    return faults


def without_encoding(root):
    """Calls that read or write a text file in whatever encoding the locale has."""
    faults = []
    for module, path in source_files(root).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(
                k.arg in ("encoding", None) for k in node.keywords
            ):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            constants = [a.value for arg in node.args for a in ast.walk(arg) if hasattr(a, "value")]
            text = not any(isinstance(c, str) and "b" in c for c in constants)
            is_open = isinstance(node.func, ast.Name) and name == "open" and text
            if is_open or name in ("read_text", "write_text"):
                faults.append(f"{module}, line {node.lineno}")
    return faults


def of_room(room, faults):
    return [fault for fault in faults if room_of(fault.split()[0]) == room]


# ---------------------------------------------------------------------------- this house

EVERY_ROOM = pytest.mark.parametrize("room", [*ROOMS, *TOP.split(), *SCRIPTS])
faults_here = functools.cache(lambda check: check(ROOT))


@EVERY_ROOM
def test_imports_point_down_and_no_script_is_imported(room):
    assert of_room(room, faults_here(wrong_arrows)) == []


def test_no_imports_go_in_a_circle():
    assert circles(ROOT) == []


@EVERY_ROOM
def test_a_room_holds_the_files_that_are_listed(room):
    assert of_room(room, faults_here(wrong_places)) == []


def test_nothing_else_stands_at_the_top():
    known = {*ROOMS, *TOP.split(), *SCRIPTS}
    assert [f for f in wrong_places(ROOT) if room_of(f.split()[0]) not in known] == []


@EVERY_ROOM
def test_no_file_and_no_function_is_too_long(room):
    assert of_room(room, faults_here(too_long)) == []


def test_every_text_file_has_an_encoding():
    assert without_encoding(ROOT) == []


def test_the_whole_source_is_no_longer_than_promised():
    assert sum(len(p.read_text().splitlines()) for p in source_files(ROOT).values()) <= MOST_LINES


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_benchmarks_use_names_that_are_there(path):
    """No other test runs them: a name that was changed would be missed."""
    tree, ours = ast.parse(path.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in MAY_IMPORT:
            for alias in node.names:
                module = importlib.import_module(node.module)
                if f"{node.module}.{alias.name}" in source_files(ROOT):
                    module = importlib.import_module(f"{node.module}.{alias.name}")
                    ours[alias.asname or alias.name] = module
                else:
                    assert hasattr(module, alias.name), alias.name
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name in source_files(ROOT)]
            ours |= {name: importlib.import_module(name) for name in names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if module := ours.get(node.value.id):
                assert hasattr(module, node.attr), f"{node.value.id}.{node.attr}"


# ---------------------------------------------------------------------------- a house that is not


@pytest.fixture
def house(tmp_path):
    """A copy of the names of this house, with empty files, that a test may break."""
    names = {f"{room}/{name}" for room, names in ROOMS.items() for name in names.split()}
    names |= {*TOP.split(), *SCRIPTS, "tests/test_train", "benchmarks/gpu"}
    for name in [*names, *(f"{room}/__init__" for room in ROOMS)]:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    (tmp_path / "tests/test_train.py").write_text("import train\n")
    return tmp_path


def test_a_house_in_order_has_no_fault(house):
    (house / "losses.py").write_text("import torch\nfrom topology.distance import edt\n")
    (house / "runtime/run.py").write_text("import losses\nfrom runtime import log, checkpoint\n")
    assert wrong_arrows(house) + circles(house) + wrong_places(house) + too_long(house) == []


@pytest.mark.parametrize(
    "module, line, fault",
    [
        ("topology/distance", "import losses", "topology.distance imports losses, which is not"),
        ("patches/cache", "from runtime.log import RunLog", "patches.cache imports runtime.log"),
        ("scoring/metrics", "from topology import distance", "scoring.metrics imports topology.di"),
        ("model", "def f():\n    import settings", "model imports settings, which is not below"),
        ("volumes/files", "from settings import Settings", "volumes.files imports settings"),
        ("runtime/run", "from train import main", "runtime.run imports the script train"),
        ("infer", "def f():\n    import train", "infer imports the script train"),
    ],
)
def test_an_import_that_does_not_point_down_is_named(house, module, line, fault):
    (house / f"{module}.py").write_text(line)
    (named,) = wrong_arrows(house)
    assert named.startswith(fault)


def test_a_circle_is_named_with_its_modules(house):
    (house / "runtime/run.py").write_text("from runtime import log\n")
    (house / "runtime/log.py").write_text("def f():\n    from .run import Run\n")
    (named,) = circles(house)
    assert named.startswith("circle: ") and {"runtime.run", "runtime.log"} <= set(named.split())


@pytest.mark.parametrize("name", ["patches/more", "helpers", "rooms/more"])
def test_a_file_that_is_not_listed_is_named(house, name):
    (house / "rooms").mkdir()
    (house / f"{name}.py").write_text("")
    assert f"{name.replace('/', '.')} is in no room" in wrong_places(house)


def test_a_listed_name_without_a_file_is_named(house):
    (house / "topology/distance.py").unlink()
    assert wrong_places(house) == ["topology.distance is listed, but there is no such file"]


def test_what_is_too_long_is_named(house):
    (house / "data.py").write_text("def f():\n" + 60 * "    1\n" + 400 * "1\n")
    assert too_long(house) == ["data has 461 lines", "data.f has 61 lines"]
