"""A trained network in Python gives what infer.py writes."""

import nibabel
import numpy as np
import pytest
import tifffile

from runtime.arrays import load_network
from tests.test_infer import faults_of, image_of, infer_ok, make_cases, run, write_nifti
from tests.test_infer_classes import CLASSES, TREES, made
from volumes import files

__all__ = ["made", "run"]  # fixtures

SPACING = (2.0, 0.5, 0.5)  # of the test images
POST = [
    "inference.threshold=0.52",
    "postprocess.hysteresis=0.515",
    "postprocess.closing_radius=0.6",
]


def read(path):
    return np.asarray(nibabel.load(path).dataobj).T


@pytest.mark.parametrize("wanted", [[0.0, 0.0, 0.0], [2.0, 0.7, 0.0]])
def test_the_mask_is_that_of_infer_py_byte_for_byte(run, tmp_path, wanted):
    path, image = run(spacing=wanted), image_of((9, 20, 18), dtype=np.int16)
    write_nifti(tmp_path / "a.nii.gz", image)
    both, out = "inference.save_probabilities=true", tmp_path / "out"
    infer_ok("--ckpt", path, "--input", tmp_path / "a.nii.gz", "--output", out, both, *POST)
    probs, mask = load_network(path, settings=POST).predict(image, SPACING)
    assert mask.dtype == np.uint8 and mask.tobytes() == read(out / "a.nii.gz").tobytes()
    assert probs.dtype == np.float32 and 0 < mask.mean() < 0.9
    np.testing.assert_array_equal(probs, read(out / "probabilities" / "a.nii.gz"))


def test_the_mask_is_that_of_infer_py_for_a_case_file_and_for_a_stack_without_spacing(
    run, tmp_path
):
    path, image = run(), image_of((9, 20, 18), 3)
    make_cases(tmp_path / "cases", b=image)
    tifffile.imwrite(tmp_path / "stack.tif", image)
    inputs = tmp_path / "cases", tmp_path / "stack.tif"
    infer_ok("--ckpt", path, "--input", *inputs, "--output", tmp_path / "out")
    mask = load_network(path).predict(image, SPACING)[1]
    assert (files.read_label(tmp_path / "out" / "b.tif").array == mask).all()
    assert (files.read_label(tmp_path / "out" / "stack.tif").array == mask).all()


def test_a_network_that_resamples_asks_for_the_spacing_as_infer_py_does(run, tmp_path, capsys):
    path, image = run(spacing=[2.0, 0.7, 0.0]), image_of((9, 20, 18))
    tifffile.imwrite(tmp_path / "a.tif", image)
    with pytest.raises(ValueError, match="image: expected a spacing, because the run") as error:
        load_network(path).predict(image)
    (fault,) = faults_of(capsys, "--ckpt", path, "--input", tmp_path / "a.tif")
    assert fault == str(error.value).replace("image", str(tmp_path / "a.tif"), 1)


def test_what_infer_py_warns_of_is_a_warning(run):
    network = load_network(run(stored_spacing=[3.0, 1.0, 1.0]))
    with pytest.warns(UserWarning, match=r"image: voxels of 1 1 3 micron.* another order than z"):
        network.predict(image_of((9, 20, 18)), (1, 1, 3))
    with pytest.warns(UserWarning, match="image: channel 0 is 0 in all voxels"):
        network.predict(np.zeros((8, 16, 16)))
    with pytest.raises(ValueError, match="image: expected voxels of about 3 1 1 micron"):
        network.predict(image_of((9, 20, 18)), (0.003, 0.001, 0.001))


def test_several_classes_have_probabilities_by_name_and_a_mask_of_their_ids(made, tmp_path):
    path, image = made(TREES, True), image_of((9, 20, 18))
    write_nifti(tmp_path / "a.nii.gz", image)
    infer_ok("--ckpt", path, "--input", tmp_path / "a.nii.gz", "--output", tmp_path / "out")
    probs, mask = load_network(path).predict(image)
    assert mask.tobytes() == read(tmp_path / "out" / "a.nii.gz").tobytes()
    assert set(np.unique(mask)) == set(CLASSES.values()) and list(probs) == list(TREES)
    assert (probs["vein"][mask == 7] > probs["artery"][mask == 7]).all()


def test_several_checkpoints_are_averaged(made):
    paths = [made(TREES, False, name=str(seed), seed=seed) for seed in (1, 3)]
    image = image_of((8, 16, 16))
    each = [load_network(path).predict(image)[0]["vein"] for path in paths]
    both = load_network(*paths).predict(image)[0]["vein"]
    np.testing.assert_allclose(both, np.mean(each, axis=0), atol=1e-6)
    assert not np.allclose(each[0], each[1], atol=0.01)


@pytest.mark.parametrize(
    ("image", "spacing", "sentence"),
    [
        (np.ones((4, 4)), None, r"an array \(D, H, W\) or .*, got the shape \(4, 4\)"),
        (np.ones((2, 8, 8, 8)), None, "1 channels as in training, got the shape"),
        (np.full((8, 8, 8), np.nan), None, "image: expected finite real numbers, got NaN"),
        (np.ones((8, 8, 8), complex), None, "got dtype complex128"),
        (np.ones((8, 8, 8)), (1, 1), r"spacing: expected 3 numbers above 0 .*, got \(1, 1\)"),
        (np.ones((8, 8, 8)), (1, 0, 1), "spacing: expected 3 numbers above 0"),
        (np.ones((8, 8, 8)), 1.0, "spacing: expected 3 numbers above 0 .*, got 1.0"),
    ],
)  # fmt: skip
def test_an_array_that_cannot_be_predicted_is_one_sentence(run, image, spacing, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_network(run()).predict(image, spacing)


def test_a_setting_that_training_has_decided_is_refused(run):
    with pytest.raises(ValueError, match=r"model\.base: expected a setting of inference"):
        load_network(run(), settings=["model.base=8"])
