"""Images with labels: folders, arrays and data sets, decoded and prepared for a model.

Letters in shapes: S images, C channels, H height, W width.
"""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hawqkit.errors import DataError, InputError, Unsupported
from hawqkit.models.classes import Labels, make_labels
from hawqkit.models.model import LoadedModel
from hawqkit.models.sources import first_line
from hawqkit.models.tables import CLASS, IMAGE, TEXT, WHOLE, check_role, find_column, open_table
from hawqkit.models.texts import choose_split

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_SPLITS = ("train", "test", "validation", "val", "calibration", "held-out")
# Pillow's modes that hold colour, or 8-bit grey, in another way than the model reads it.
_TO_COLOUR = ("RGB", "RGBA", "P", "CMYK", "YCbCr", "L", "LA", "1")
_TO_GREY = ("L", "LA", "1")


@dataclass(frozen=True, slots=True)
class Pictures:
    """Images that are not decoded yet, with the labels of all of them.

    Attributes:
        labels: of every image.
        fetch: image at a row, as a Pillow image or an array; raises what a damaged file causes.
        title: what messages call the image at a row.
        ready: whether they are arrays (C, H, W) of what the model reads, past any processor.
    """

    labels: Labels
    fetch: Callable[[int], Any]
    title: Callable[[int], str]
    ready: bool = False


def open_pictures(
    source: str, *, split: str, config: str | None, column: str | None, labels: str | None
) -> Pictures:
    """Find the images of a source and read their labels, and no image yet.

    Args:
        source: a folder with one sub-folder for each class (in `train`, `test`, `validation` or
            without splits), a `.npz` file with the arrays `images` and `labels`, a `.parquet` file,
            a folder that `datasets` reads or has written, or a data set's id.
        split: `calibration` (train), `held-out` (test, else validation), or one that there is.
        config: configuration of a data set of the hub.
        column: column of images; None for the only one.
        labels: column of labels; None for the only column of classes, or one called so.

    Raises:
        DataError: there is no such source, split or column, or a class is empty.
        Unsupported: Pillow is not installed.
        HawqkitError: the hub cannot be reached.
    """
    if importlib.util.find_spec("PIL") is None:
        raise Unsupported(
            f"{source}: images need Pillow; install it with `pip install 'hawqkit[images]'`."
        )
    path = Path(source).expanduser()
    if path.suffix.lower() == ".npz":
        _refuse_columns(source, config, column, labels)
        return _from_arrays(path, source, split)
    if path.is_dir() and (found := _class_folders(path, source, split)) is not None:
        _refuse_columns(source, config, column, labels)
        return _from_folders(*found)
    return _from_table(source, split, config, column, labels)


def _refuse_columns(
    source: str, config: str | None, column: str | None, labels: str | None
) -> None:
    given = {"config": config, "column": column, "labels": labels}
    said = [f"{name} {value!r}" for name, value in given.items() if value is not None]
    if said:
        raise DataError(f"{source}: it has no columns, so leave {' and '.join(said)} out.")


def _from_arrays(path: Path, source: str, split: str) -> Pictures:
    check_role(source, split)
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in ("images", "labels") if name in file.files}
            there = list(file.files)
    except FileNotFoundError:
        raise DataError(f"{source}: there is no such file.") from None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{source}: not a readable .npz file ({first_line(error)}).") from None
    if len(held) < 2:
        raise DataError(
            f"{source}: it must hold the arrays 'images' and 'labels'; it holds "
            f"{', '.join(map(repr, there)) or 'nothing'}."
        )
    images, labels = held["images"], held["labels"]
    if labels.ndim != 1 or len(images) != len(labels) or labels.dtype.kind not in "iuU":
        raise DataError(
            f"{source}: labels of shape {labels.shape} and dtype {labels.dtype} beside images of "
            f"shape {images.shape}; there must be one whole number or name for each image."
        )
    ready = images.dtype.kind == "f"
    if images.dtype != np.uint8 and not ready:
        raise DataError(
            f"{source}: images are {images.dtype}; give uint8 for pixels of 0 to 255, or floats "
            "for what the model reads as it is, (S, C, H, W)."
        )
    if images.ndim != 4 and (ready or images.ndim != 3):
        shape = "(S, C, H, W)" if ready else "(S, H, W) or (S, H, W, C)"
        raise DataError(
            f"{source}: images of shape {images.shape}; {images.dtype} must be {shape}."
        )
    known = make_labels(source, labels.tolist())
    return Pictures(known, lambda row: images[row], lambda row: f"image {row}", ready)


def _class_folders(path: Path, source: str, split: str) -> tuple[Path, str] | None:
    """Return the folder of class folders, and its name; None if this is no folder of images."""
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return None
    inside = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    splits = [p.name for p in inside if p.name in _SPLITS]
    if splits and len(splits) == len(inside) and any(map(_holds_classes, inside)):
        chosen = choose_split(source, split, splits)
        return path / chosen, f"{source}:{chosen}"
    if not _holds_classes(path):
        return None
    check_role(source, split)
    return path, source


def _holds_classes(path: Path) -> bool:
    return any(_images_in(p) for p in path.iterdir() if p.is_dir())


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())


def _from_folders(path: Path, source: str) -> Pictures:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {folder.name: _images_in(folder) for folder in folders}
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise DataError(
            f"{source}: no images in {', '.join(empty[:8])}{' ...' if len(empty) > 8 else ''}; "
            f"each sub-folder is a class and must hold files ({', '.join(ENDINGS)}). Fill them, or "
            "take them away."
        )
    files = [file for name in found for file in found[name]]
    labels = Labels(source, tuple(name for name, held in found.items() for _ in held))
    return Pictures(
        labels,
        lambda row: _decoded(files[row].read_bytes()),
        lambda row: files[row].relative_to(path).as_posix(),
    )


def _from_table(
    source: str, split: str, config: str | None, column: str | None, labels: str | None
) -> Pictures:
    table = open_table(source, split=split, config=config)
    images = find_column(table, column, (IMAGE,), ("image", "img"), IMAGE)
    classed = find_column(table, labels, (CLASS, WHOLE, TEXT), ("label", "labels"), CLASS)
    known = make_labels(table.name, table.read(classed, None), table.columns[classed].names)

    def fetch(row: int) -> Any:
        value = table.read(images, [row])[0]
        if isinstance(value, dict):
            value = value["bytes"] or Path(value["path"]).read_bytes()
        if value is None:
            raise OSError("there is no image")
        return _decoded(value)

    return Pictures(known, fetch, lambda row: f"row {row + 1}")


def _decoded(data: bytes) -> Any:
    """Return a Pillow image, turned as its camera says."""
    from PIL import Image, ImageOps

    image = Image.open(io.BytesIO(data))
    image.load()
    return ImageOps.exif_transpose(image)


def prepare(model: LoadedModel, pictures: Pictures, rows: Sequence[int]) -> Tensor:
    """Decode some images, and return what the model reads, (S, C, H, W).

    Files of grey, palette or CMYK images become RGB for a model of three channels, and transparency
    is dropped, as image loaders do; colour never becomes grey, and arrays stay as they are.

    Raises:
        DataError: images cannot be read (all are named), have another number of channels than the
            model, or come out in different sizes.
        InputError: there is no image processor, and the images are not ready without one.
    """
    if not pictures.ready and model.processor is None:
        raise InputError(
            f"{model.facts.source} has no image processor (preprocessor_config.json), so images "
            "cannot become what it reads: save one in its folder, give one to wrap_model, or give "
            "a .npz file of floats (S, C, H, W) that are ready."
        )
    channels = _channels(model)
    found: dict[int, Tensor] = {}
    wrong: list[str] = []
    for row in rows:
        try:
            image = pictures.fetch(row)
            found[row] = _ready(model, image, channels, pictures.ready)
        # Pillow raises errors of many kinds on damaged files.
        except Exception as error:
            wrong.append(f"{pictures.title(row)}: {_reason(error)}")
    if wrong:
        listed = "\n".join(f"  - {line}" for line in wrong)
        raise DataError(f"{pictures.labels.source}: {len(wrong)} images cannot be used:\n{listed}")
    _refuse_sizes(pictures, rows, found)
    return torch.stack([found[row] for row in rows])


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image, or a damaged one"
    return first_line(error)


def _ready(model: LoadedModel, image: Any, channels: int | None, ready: bool) -> Tensor:
    if ready:
        tensor = torch.from_numpy(np.array(image))
    else:
        tensor = _processed(model, _in_mode(image, channels))
    if channels is not None and tensor.shape[0] != channels:
        raise ValueError(_other_channels(tuple(tensor.shape), channels))
    return tensor


def _in_mode(image: Any, channels: int | None) -> Any:
    """Return an image with the model's number of channels."""
    if isinstance(image, np.ndarray):
        there = 1 if image.ndim == 2 else image.shape[2]
        if channels is not None and there != channels:
            raise ValueError(_other_channels((there, *image.shape[:2]), channels))
        return image if image.ndim == 2 or there != 1 else image[..., 0]
    if channels == 3 and image.mode in _TO_COLOUR:
        return image.convert("RGB")
    if channels == 1 and image.mode in _TO_GREY:
        return image.convert("L")
    if channels in (1, 3):
        shape = (len(image.getbands()), image.height, image.width)
        if channels == 1 and len(image.getbands()) > 1:
            raise ValueError(_other_channels(shape, channels))
        raise ValueError(f"pixels of mode {image.mode}, not of 8 bits in grey or colour")
    return image


def _other_channels(shape: tuple[int, ...], channels: int) -> str:
    size = ", ".join(map(str, shape[1:]))
    return f"shape {shape}, and the model reads ({channels}, {size}): {channels} channels"


def _processed(model: LoadedModel, image: Any) -> Tensor:
    if isinstance(image, np.ndarray):
        from PIL import Image

        if image.ndim == 2 or image.shape[2] == 3:
            image = Image.fromarray(image)  # the same pixels, with no doubt about the axes
    out = model.processor(images=image, return_tensors="pt")
    tensor: Tensor = out["pixel_values"][0]
    return tensor


def _channels(model: LoadedModel) -> int | None:
    """Return how many channels a model reads: as configured, else those of its first layer."""
    config = model.facts.config
    if isinstance(config.get("num_channels"), int):
        return int(config["num_channels"])
    for module in model.module.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
        if isinstance(module, nn.Linear):
            return None  # it may read flattened pixels
    return None


def _refuse_sizes(pictures: Pictures, rows: Sequence[int], found: dict[int, Tensor]) -> None:
    shapes: dict[tuple[int, ...], int] = {}
    for row in rows:
        shapes.setdefault(tuple(found[row].shape), row)
    if len(shapes) > 1:
        some = ", ".join(f"{s} ({pictures.title(r)})" for s, r in list(shapes.items())[:4])
        raise DataError(
            f"{pictures.labels.source}: the model's image processor makes {len(shapes)} different "
            f"shapes of these images: {some}. Resize them to one, or use a processor that does."
        )


def refused_shape(
    model: LoadedModel, source: str, shape: tuple[int, ...], error: Exception
) -> DataError:
    """Return the error that says which shape images have and which the model reads."""
    size = model.facts.config.get("image_size")
    wanted = f"({_channels(model)}, {size}, {size})" if isinstance(size, int) else "another"
    return DataError(
        f"{source}: images come out as {shape}, and the model reads {wanted}: {first_line(error)}. "
        "Make the image processor resize to what the model reads."
    )
