"""A slice as a picture: the image in gray, and masks over it in colors.

The colors are told apart by color-blind readers too (Okabe and Ito 2008, with an indigo).
"""

import numpy as np

FOUND, MISSED, FALSE = "#009e73", "#e0520e", "#56b4e9"
CLASSES = (
    *("#d55e00", "#56b4e9", "#f0e442", "#cc79a7"),
    *("#0072b2", "#009e73", "#e69f00", "#332288"),
)
SHADES = (0.0, 0.55, -0.45)  # of the first, second and third turn through CLASSES: share of white
RIGHT, WRONG = 0.45, 0.95  # opacity of a class where it is right, and where it is not
LABEL, INVALID = "darkorange", (0.2, 0.35, 0.8, 0.5)  # the border of one mask; a tint
DIM = 0.75  # of the image under classes: on white, pale colors are all alike


def class_color(number):
    """The color (r, g, b) in [0, 1] of the class of that number, from 0: of 24 no two are alike."""
    from matplotlib.colors import to_rgb

    turn, index = divmod(number, len(CLASSES))
    shade = SHADES[turn % len(SHADES)]
    mixed = (1 - abs(shade)) * np.array(to_rgb(CLASSES[index])) + max(0.0, shade)
    return tuple(mixed.tolist())


def overlay(image, truth, mask, labeled):
    """(H, W, 3) picture: FOUND, MISSED and FALSE in their colors, darkened where unlabeled.

    image (H, W); truth, mask and labeled (H, W) bool.
    """
    kinds = (truth & mask, FOUND), (truth & ~mask, MISSED), (~truth & mask, FALSE)
    return _paint(_gray(image), [(where, color, 0.65) for where, color in kinds], labeled)


def overlay_classes(image, shown, other, labeled):
    """(H, W, 3) picture of the masks `shown`, each in its `class_color`, later over earlier.

    shown, other (K, H, W) bool: truth and prediction, or the other way round. Where any class of
    them differs, colors are solid, else pale: what is solid is missed in a picture of the truth and
    false in one of the prediction. Darkened where unlabeled.
    """
    wrong = (shown != other).any(axis=0)
    layers = []
    for number, where in enumerate(shown):
        color = class_color(number)
        layers += [(where & ~wrong, color, RIGHT), (where & wrong, color, WRONG)]
    return _paint(DIM * _gray(image), layers, labeled)


def show_slice(ax, image, masks, valid, aspect, limits):
    """Draw a slice on axes: gray within limits, tinted where not valid, the masks as outlines.

    image, valid (H, W); masks (K, H, W); aspect: the size of a voxel in H over that in W.
    """
    ax.imshow(image, cmap="gray", vmin=limits[0], vmax=limits[1], aspect=aspect)
    ax.imshow(np.where(valid[..., None], 0.0, INVALID), aspect=aspect)
    for index, mask in enumerate(masks):
        if min(mask.shape) > 1 and mask.any() and not mask.all():
            color = LABEL if len(masks) == 1 else class_color(index)
            ax.contour(mask, [0.5], colors=[color], linewidths=1)
    ax.set(xticks=[], yticks=[])


def _gray(image):
    """(H, W) in [0, 1]: the image between its 1st and 99th percentile."""
    image = np.asarray(image, np.float64)
    low, high = np.percentile(image, (1, 99))
    return np.clip((image - low) / ((high - low) or 1.0), 0, 1)


def _paint(gray, layers, labeled):
    """(H, W, 3): gray under layers of (where, color, opacity), of which the last one is seen."""
    from matplotlib.colors import to_rgb

    picture = np.repeat(gray[..., None], 3, axis=2)
    for where, color, opacity in layers:
        where = where & labeled
        picture[where] = (1 - opacity) * gray[where][:, None] + opacity * np.array(to_rgb(color))
    picture[~labeled] *= 0.5
    return picture


def no_formula(text):
    """A text for matplotlib, in which a $ of a name begins no formula."""
    return text.replace("$", r"\$")
