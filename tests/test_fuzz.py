"""A sample of benchmarks/fuzz.py, with voxels that are known without an independent reader."""

import random

import pytest

from benchmarks import fuzz, fuzz_inputs

KNOWN = {"none", "dtype", "nan", "no bytes", "odd name", "two of one id", "dimensions", "cut"}


@pytest.mark.parametrize("script", ["prepare", "evaluate"])
@pytest.mark.parametrize("kind", ["nii.gz", "deflate", "h5"])
def test_an_input_is_read_right_or_refused_by_its_name(tmp_path, script, kind):
    faults = sorted(KNOWN & {fault for k, fault in fuzz_inputs.combinations() if k == kind})
    outcomes = {}
    for fault in faults:
        chance = random.Random(f"{kind} {fault}")
        folder = tmp_path / fault
        item = fuzz_inputs.make(folder / "in", kind, fault, script == "evaluate", chance)
        outcomes[fault] = fuzz.run(script, item, folder, None) if item else ("exit 2", "")
    assert {f: o for f, o in outcomes.items() if o[0] == "failure"} == {}
    assert (outcomes["none"][0], outcomes["no bytes"][0]) == ("exit 0", "exit 2")
