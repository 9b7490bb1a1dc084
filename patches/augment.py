"""Augmentation: what is drawn for a patch, and the batch drawn from it on the device.

    python augment.py configs/vessels.yaml            # runs/augment_vessels.png
    python augment.py configs/vessels.yaml --case ID --out sheet.png augment.gamma=0.5

As a script it draws a contact sheet: one case under each transformation alone, with label and valid
laid over it (contact_sheet.py). It leaves one PNG; exit status 2: the input is wrong (one sentence,
nothing written). As a module, `sample_spatial_params` draws the parameters of the map from patch to source
(grid.py) with a numpy generator, in a worker, on the CPU, a few numbers; intensity.py those of what
happens to grey values; `augment_batch` does the work on the device.
"""

import argparse
import functools
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch

from patches import intensity
from patches import resample as grid

ISOTROPY = 2.0  # axes whose voxels are more than this many times the shortest are not rotated into
ELASTIC_SPACING = 24.0  # voxels of the finest axis, where the settings give no distance
ELASTIC_AMPLITUDE = (0.5, 1.5)  # the same
CANDIDATES = 16  # places that the contact sheet chooses from


def sample_spatial_params(rng, source_spacing, spacing, *, patch, settings):
    """Draw the `grid.Map` of one patch.

    rng: numpy Generator; source_spacing: of the stored voxels, spacing: of the patch's, z, y, x in
    one unit; patch: voxels; settings: plain dict of the `augment` settings, or None for none.
    """
    source_spacing, spacing = np.asarray(source_spacing, float), np.asarray(spacing, float)
    to_source = np.diag(1 / source_spacing)
    if settings is None:
        matrix = to_source @ np.diag(spacing)
        return grid.Map(matrix, matrix)
    turn = _turn(rng, spacing, settings)
    rotation = _rotation(rng, spacing, settings)
    upright = turn @ np.diag(spacing / _zoom(rng, settings))  # patch voxels to physical distances
    matrix = to_source @ rotation @ upright
    rolled, roll = rng.random() < settings["roll"], 1 + int(rng.integers(max(patch[0] - 1, 1)))
    control, step = _elastic(rng, spacing, patch, settings)
    if control is not None:  # from the patch's own axes to the source's
        control = np.einsum("ab,bzyx->azyx", matrix, control).astype(np.float32)
    return grid.Map(matrix, to_source @ upright, control, step, roll if rolled else 0)


def _turn(rng, spacing, settings):
    """A signed permutation: flips, and quarter turns in the planes whose two spacings are equal."""
    turn = np.eye(3)
    for plane in itertools.combinations(range(3), 2):
        quarters = rng.integers(0, 4)
        wanted = rng.random() < settings["turn90"]
        if wanted and math.isclose(spacing[plane[0]], spacing[plane[1]], rel_tol=1e-3):
            turn = turn @ np.round(rotate_in(plane, quarters * math.pi / 2))
    signs = np.where(rng.random(3) < settings["flip"], -1.0, 1.0)
    return turn @ np.diag(signs)


def rotate_in(plane, angle):
    """The (3, 3) rotation by `angle` (radians) from the first axis of a plane to the second."""
    a, b = plane
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def _rotation(rng, spacing, settings):
    """About z alone, or about every axis; never between axes of too different spacing if auto."""
    axes = settings["rotation_axes"]
    matrix = np.eye(3)
    for axis, plane in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        wanted, angle = rng.random(), math.radians(rng.uniform(*settings["rotation_degrees"]))
        ratio = max(spacing[list(plane)]) / min(spacing[list(plane)])
        allowed = axes == "all" or (axes == "z" and axis == 0)
        allowed = allowed or (axes == "auto" and ratio <= ISOTROPY)
        if allowed and wanted < settings["rotation"]:
            matrix = matrix @ rotate_in(plane, angle)
    return matrix


def _zoom(rng, settings):
    """How many times larger things are shown, per axis; log-uniform: 1/2 is as likely as 2."""
    low, high = np.log(settings["scaling_range"])
    wanted, per_axis = rng.random(2)
    factors = np.exp(rng.uniform(low, high, size=3))
    if wanted >= settings["scaling"]:
        return np.ones(3)
    return factors if per_axis < settings["scaling_per_axis"] else np.full(3, factors[0])


def elastic_range(spacing, settings):
    """(distance of control points, (least, largest) amplitude) in the unit of the spacing.

    ValueError if the points are closer than the finest voxels.
    """
    finest = float(min(spacing))
    if settings["elastic_spacing"] is None or settings["elastic_amplitude_range"] is None:
        return ELASTIC_SPACING * finest, tuple(finest * a for a in ELASTIC_AMPLITUDE)
    if settings["elastic_spacing"] < finest:
        raise ValueError(
            f"augment.elastic_spacing: expected at least a voxel, {finest:g} in the unit of the "
            f"spacing, got {settings['elastic_spacing']:g}; is it in another unit?"
        )
    return settings["elastic_spacing"], settings["elastic_amplitude_range"]


def _elastic(rng, spacing, patch, settings):
    """Control points in patch voxels, (3, nz, ny, nx), and their distance in voxels, per axis.

    Control points are uniform in a cube and independent, which bounds them: with an amplitude of
    at most 0.075 of their distance, a B-spline of them maps one to one (Choi & Lee 2000). They are
    scaled so that the mean square of the field over the patch, along each axis, is the amplitude's.
    Of points further apart than the patch is long most of it moves the patch as a whole, and
    grid.place_patch takes that back: they bend it less than the amplitude says.
    """
    distance, amplitudes = elastic_range(spacing, settings)
    wanted, amplitude, seed = rng.random(), rng.uniform(*amplitudes), rng.integers(2**62)
    if wanted >= settings["elastic"]:
        return None, None
    step = tuple(float(distance / s) for s in spacing)
    size = grid.lattice_size(patch, step)
    share = math.prod(  # of the variance of the control points that the field has
        np.square(grid.spline_weights(np.arange(n), s, count)).sum(axis=1).mean()
        for n, s, count in zip(patch, step, size, strict=True)
    )
    # A generator of its own: how many numbers a lattice takes must not shift what is drawn next.
    control = np.random.default_rng(int(seed)).uniform(-1, 1, (3, *size))
    control *= amplitude * math.sqrt(3 / share)
    return control / spacing[:, None, None, None], step


def check(settings, spacings):
    """ValueError if the settings cannot be drawn for patches of one of these spacings."""
    for spacing in spacings:
        elastic_range(spacing, settings)


def functions(settings):
    """What data.PatchDataset takes of augmentation; settings: as in `sample_spatial_params`."""
    return {
        "sample_spatial_params": functools.partial(sample_spatial_params, settings=settings),
        "sample_intensity_params": functools.partial(
            intensity.sample_intensity_params, settings=settings
        ),
        "place_patch": grid.place_patch,
    }


def augment_batch(samples, patch, *, foreground, ignore_label, device):
    """Samples of data.PatchDataset to (image, target, valid, skeleton).

    Each (B, C or 1, D, H, W); the skeleton is None if the samples carry none.
    """
    drawn = []
    for sample in samples:
        boxes = {
            name: sample[name].to(device, non_blocking=True)
            for name in ("image", "label", "skeleton")
            if name in sample
        }
        patch_image, *masks = grid.resample_patch(
            **boxes, about=sample, patch=patch, foreground=foreground, ignore_label=ignore_label
        )
        scale = {key: sample[key] for key in ("mean", "std", "low", "high")}
        drawn.append((intensity.normalise(patch_image, **scale), *masks))
    images, targets, valids, skeletons = zip(*drawn, strict=True)
    image = intensity.change_intensity(
        torch.stack(images),
        [sample["intensity"] for sample in samples],
        [sample["spacing"] for sample in samples],
    )
    carried = None if skeletons[0] is None else torch.stack(skeletons)
    return image, torch.stack(targets), torch.stack(valids), carried


# ---------------------------------------------------------------------------- the contact sheet


def main(settings, *, case_id=None, out=None, seed=None):
    """Draw the contact sheet of a config. Returns the exit status.

    The patch lies at the same place of the volume in all pictures and is drawn on the CPU, so that
    the sheet is a function of config, case and seed.
    """
    # Here and below: as a module this file needs no config, no cases, no pictures.
    from patches import cache, contact_sheet
    from runtime import splits
    from volumes import casefile as cases

    seed = settings.run.seed if seed is None else seed
    out = out or Path(settings.run.folder) / f"augment_{settings.run.name}.png"
    try:
        dataset = cases.read_dataset(settings.data.root, settings.data.source)
        foreground = splits.foreground_ids(dataset.classes, settings.data.foreground)
        case = _chosen_case(dataset, settings.data, case_id)
        draw = functools.partial(
            _draw_alone,
            case,
            cache.VolumeCache([case], 0),
            settings,
            seed=seed,
            about={"foreground": foreground, "ignore_label": dataset.ignore_label},
        )
        heading, blocks = _blocks(case, draw, settings, seed)
        contact_sheet.write_sheet(out, blocks, heading=heading)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


def _chosen_case(dataset, data_settings, case_id):
    """The case of that id, or the first that trains; ValueError if it cannot be drawn from."""
    from runtime import splits

    if case_id is None:
        names = {"train", "validation", "test", "folds", "fold"}
        split, _ = splits.choose_cases(dataset, **data_settings.model_dump(include=names))
        return split.train[0]
    if case_id not in dataset.cases:
        known = ", ".join(list(dataset.cases)[:8])
        raise ValueError(f"--case: expected a case of {dataset.root}, {known}; got {case_id}")
    if not dataset.cases[case_id].labeled:
        raise ValueError(f"--case: case {case_id} has no label; prepare it with --labels")
    return dataset.cases[case_id]


def _draw_alone(case, kept, settings, index, chosen, *, seed, about, centre=None):
    """(sample, (image, target, valid)): a sample of data.PatchDataset, and the patch as arrays.

    chosen: the `augment` settings that hold for this patch; centre: source voxel that it is placed
    around, or None for where the run would draw. image is the first channel, (D, H, W).
    """
    import data

    def place(drawn, around, patch, shape, voxel):
        if centre is None:
            return grid.place_patch(drawn, around, patch, shape, voxel)
        return grid.place_patch(drawn, centre, patch, shape)

    patches = data.PatchDataset(
        [case],
        cache=kept,
        foreground=dict.fromkeys(about["foreground"], 1.0),
        **{**settings.patch_arguments(), "seed": seed},
        **{**functions(chosen), "place_patch": place},
    )
    sample = patches[0, index]
    image, target, valid, _ = augment_batch(
        [sample], settings.sampling.patch, device=torch.device("cpu"), **about
    )
    return sample, (image[0, 0].numpy(), target[0, 0].numpy() > 0, valid[0, 0].numpy())


def _blocks(case, draw, settings, seed):
    """What contact_sheet.write_sheet takes: the heading and all blocks."""
    from patches import contact_sheet

    trials = [draw(index, None) for index in range(CANDIDATES)]
    first, original = max(trials, key=lambda t: contact_sheet.middle_border(t[1][1]))
    patch, spacing = settings.sampling.patch, first["spacing"]
    centre = first["origin"] + first["matrix"] @ ((np.asarray(patch) - 1) / 2)
    grey = contact_sheet.grey_range(original[0])
    paint = functools.partial(contact_sheet.picture, spacing=spacing, grey=grey)
    plain = [(paint(*original, outline=False), ""), (paint(*original), "label outlined")]
    configured = settings.augment.model_dump()
    distance, amplitudes = elastic_range(spacing, configured)
    configured |= {"elastic_spacing": distance, "elastic_amplitude_range": amplitudes}
    shown = contact_sheet.variants(configured)
    shown += [("all as configured", [configured] * contact_sheet.DRAWS)]
    blocks = [("original", plain)]
    index = itertools.count()
    for title, variants in shown:
        drawn = [draw(next(index), chosen, centre=centre) for chosen in variants]
        blocks.append((title, [(paint(*b), _caption(s, first["matrix"])) for s, b in drawn]))
    size = f"{_times(spacing)} {case.unit}".rstrip()
    heading = [
        f"{settings.run.name}, case {case.id}, seed {seed}: patch of {_times(patch)} voxels, "
        f"{size} each, middle at voxel {_times(np.round(centre))} (z, y, x)",
        "Each picture: the patch's middle z slice (y down, x right), below it its middle y slice "
        "(z down, x right). Orange: border of the label. Hatched: not valid, that is unlabeled or "
        "outside the volume.",
        f"Black to white is {grey[0]:.1f} to {grey[1]:.1f} standard deviations of the volume in "
        "all. Each transformation alone, its range from the lowest part to the highest.",
    ]
    return heading, blocks


def _times(numbers):
    return " x ".join(f"{n:g}" for n in numbers)


def _caption(sample, unchanged):
    """What was drawn that is a number; unchanged: the matrix of the patch that nothing moved."""
    chosen = sample["intensity"]
    values = [
        f"{name}\N{NO-BREAK SPACE}{chosen[name]:.2f}" for name in intensity.NAMES if name in chosen
    ]
    values += [f"roll {sample['roll']}"] * bool(sample["roll"])
    if not values and sample["control"] is None and np.array_equal(sample["matrix"], unchanged):
        return "nothing changed"
    return ", ".join(values)


def cli(argv=None):
    from runtime import config

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file with differences from the defaults")
    parser.add_argument("--case", metavar="ID", help="default: the first that trains")
    parser.add_argument("--out", metavar="FILE", help="default: augment_<name>.png in run.folder")
    parser.add_argument("--seed", type=int, metavar="N", help="default: run.seed")
    parser.add_argument("overrides", nargs="*", metavar="group.key=value")
    arguments = parser.parse_intermixed_args(argv)
    try:
        settings = config.load(arguments.config, arguments.overrides)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.seed is not None and arguments.seed < 0:
        parser.error(f"--seed: expected 0 or more, got {arguments.seed}")
    return main(settings, case_id=arguments.case, out=arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(cli())
