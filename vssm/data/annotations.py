"""Boxes and classes of images on disk: COCO's JSON and VOC's folders, checked before anything is trained."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

SHOWN = 10          # faults that a message names
SLACK = 1.0         # pixels by which a box may stick out of its image; it is then cut


@dataclass(frozen=True)
class Objects:
    """What an image shows.

    ``size`` is (W, H) of the image in pixels. ``boxes`` (n, 4) are x1, y1, x2, y2 in pixels, ``labels`` (n) count from
    0. ``ignored`` (n) objects, crowds of COCO and difficult ones of VOC, are neither trained nor counted. ``areas`` (n)
    are those of the objects in square pixels. ``masks`` makes (n, H, W), if there are any.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    areas: np.ndarray
    masks: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class Annotated:
    """Files of images, what each shows, and the names of the classes."""

    files: Sequence[Path]
    objects: Sequence[Objects]
    class_names: list[str]


def coco(
    annotations: Path, images: Path, *, masks: bool = False, faults: Literal["refuse", "drop"] = "refuse"
) -> Annotated:
    """Read a COCO annotation file; classes are in the order of their ids.

    Args:
        annotations: The JSON file.
        images: Folder of the images.
        masks: Also keep the outlines.
        faults: "refuse" raises an error that names what is broken, "drop" leaves such objects out with a warning.

    Raises:
        ValueError: If the file is no COCO file, images are missing, or annotations are broken.
    """
    content = _json(annotations)
    names = {entry["id"]: entry["name"] for entry in sorted(content["categories"], key=lambda entry: entry["id"])}
    number = {id_: i for i, id_ in enumerate(names)}
    pictures = {entry["id"]: entry for entry in sorted(content["images"], key=lambda entry: entry["id"])}
    files = [images / entry["file_name"] for entry in pictures.values()]
    _check_files(annotations, files)
    check = Checker(str(annotations), faults)
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for entry in content["annotations"]:
        who = f"annotation {entry.get('id', '?')}"
        if entry.get("image_id") not in pictures:
            check.fault(f"{who}: no image has the id {entry.get('image_id')!r}")
            continue
        picture = pictures[entry["image_id"]]
        who += f" of {picture['file_name']}"
        if entry.get("category_id") not in number:
            check.fault(f"{who}: no category has the id {entry.get('category_id')!r}")
            continue
        x, y, width, height = _four(entry.get("bbox"))
        box = check.box(who, (x, y, x + width, y + height), (picture["width"], picture["height"]))
        if box is None:
            continue
        if masks and not entry.get("segmentation"):
            check.fault(f"{who}: it has no outline (segmentation)")
            continue
        found[entry["image_id"]].append({**entry, "box": box, "label": number[entry["category_id"]]})
    check.done()
    return Annotated(
        files, [_coco_objects(found[id_], picture, masks) for id_, picture in pictures.items()], list(names.values())
    )


def voc(
    root: Path, split: str, classes: Sequence[str] | None = None, *, faults: Literal["refuse", "drop"] = "refuse"
) -> Annotated:
    """Read a folder of Pascal VOC: ``ImageSets/Main/SPLIT.txt``, ``Annotations/NAME.xml``, ``JPEGImages/NAME.jpg``.

    Args:
        root: The folder that holds those three.
        split: Name of the list.
        classes: Names of the classes; None takes those in the annotations of the split, sorted.
        faults: See ``coco``.

    Raises:
        ValueError: If files are missing or annotations are broken.
    """
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    _check_files(root, [listed])
    names = [line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    files = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    documents = [root / "Annotations" / f"{name}.xml" for name in names]
    _check_files(listed, [*files, *documents])
    trees = [_xml(document) for document in documents]
    if classes is None:
        classes = sorted({_text(entry, "name") for tree in trees for entry in tree.iter("object")})
    check = Checker(str(listed), faults)
    objects = [_voc_objects(tree, document.name, list(classes), check) for tree, document in zip(trees, documents)]
    check.done()
    return Annotated(files, objects, list(classes))


class Checker:
    """Collects what is wrong with annotations."""

    def __init__(self, source: str, faults: str):
        if faults not in ("refuse", "drop"):
            raise ValueError(f"annotations: faults must be 'refuse' or 'drop', got {faults!r}")
        self.source, self.drop, self.found = source, faults == "drop", list[str]()

    def fault(self, message: str) -> None:
        self.found.append(message)

    def box(
        self, who: str, box: Sequence[float], size: tuple[float, float]
    ) -> tuple[float, float, float, float] | None:
        """The box cut to an image of this width and height; None, and a fault, if it is none."""
        x1, y1, x2, y2 = box
        width, height = size
        cut = max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)
        must = ""
        if not np.isfinite(box).all():
            must = "be four numbers"
        elif x2 <= x1 or y2 <= y1:
            must = "have a positive width and height"
        elif min(x1, y1, width - x2, height - y2) < -SLACK or cut[2] <= cut[0] or cut[3] <= cut[1]:
            must = f"lie inside the image, {width:g} x {height:g} pixels"
        if must:
            self.fault(f"{who}: box x {x1:g} to {x2:g}, y {y1:g} to {y2:g} must {must}")
            return None
        return cut

    def done(self) -> None:
        """Raise if there were faults, or warn."""
        if not self.found:
            return
        shown = "".join(f"\n  {message}" for message in self.found[:SHOWN])
        more = f"\n  and {len(self.found) - SHOWN} more" if len(self.found) > SHOWN else ""
        if not self.drop:
            raise ValueError(
                f"{self.source}: {len(self.found)} annotations are broken:{shown}{more}\nmend them, or leave them out "
                "with data.init_args.faults=drop"
            )
        warnings.warn(f"{self.source}: {len(self.found)} broken annotations are left out:{shown}{more}", stacklevel=3)


def _coco_objects(entries: list[dict[str, Any]], picture: dict[str, Any], masks: bool) -> Objects:
    boxes = np.array([entry["box"] for entry in entries], dtype=np.float32).reshape(-1, 4)
    box_areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Objects(
        (picture["width"], picture["height"]),
        boxes,
        np.array([entry["label"] for entry in entries], dtype=np.int64),
        np.array([entry.get("iscrowd", 0) for entry in entries], dtype=bool),
        np.array([entry.get("area", area) for entry, area in zip(entries, box_areas)], dtype=np.float32),
        _Outlines([entry["segmentation"] for entry in entries], picture["height"], picture["width"]) if masks else None,
    )


@dataclass(frozen=True)
class _Outlines:
    """COCO's polygons and run lengths, as masks (n, H, W) when they are asked for."""

    outlines: list[Any]
    height: int
    width: int

    def __call__(self) -> np.ndarray:
        from pycocotools import mask

        size = self.height, self.width
        masks = [np.zeros(size, np.uint8) for _ in self.outlines]
        for i, outline in enumerate(self.outlines):
            if isinstance(outline, list) or isinstance(outline["counts"], list):
                outline = mask.frPyObjects(outline, *size)
            masks[i] = mask.decode(mask.merge(outline) if isinstance(outline, list) else outline)
        return np.stack(masks) if masks else np.zeros((0, *size), np.uint8)


def _voc_objects(tree: ElementTree.Element, name: str, classes: list[str], check: Checker) -> Objects:
    size = int(_text(tree, "size/width")), int(_text(tree, "size/height"))
    boxes, labels, ignored = [], [], []
    for i, entry in enumerate(tree.iter("object")):
        who, kind = f"object {i + 1} of {name}", _text(entry, "name")
        if kind not in classes:
            check.fault(f"{who}: {kind!r} is no class; there are {', '.join(classes[:SHOWN])}")
            continue
        x1, y1, x2, y2 = (float(_text(entry, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        box = check.box(who, (x1 - 1, y1 - 1, x2, y2), size)     # pixels from 1 on, the last one included
        if box is not None:
            boxes.append(box)
            labels.append(classes.index(kind))
            ignored.append(entry.findtext("difficult", "0").strip() == "1")
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    areas = (array[:, 2:] - array[:, :2]).prod(1)
    return Objects(size, array, np.array(labels, dtype=np.int64), np.array(ignored, dtype=bool), areas)


def _four(box: Any) -> tuple[float, float, float, float]:
    """A box of a file; not-a-numbers if it is none."""
    try:
        x, y, width, height = (float(value) for value in box)
    except (TypeError, ValueError):
        return (np.nan,) * 4
    return x, y, width, height


def _json(file: Path) -> dict[str, Any]:
    _check_files(file.parent, [file])
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no COCO file: not JSON ({error})") from error
    parts = {"images": ("id", "file_name", "width", "height"), "annotations": (), "categories": ("id", "name")}
    for part, needed in parts.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{file} is no COCO file: it needs a list of {part}")
        for entry in entries:
            missing = [name for name in needed if name not in entry]
            if missing:
                raise ValueError(f"{file}: every entry of {part} needs {', '.join(missing)}, one has {sorted(entry)}")
    return content


def _xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{file} is no VOC annotation: not XML ({error})") from error


def _text(entry: ElementTree.Element, path: str) -> str:
    text = entry.findtext(path)
    if text is None:
        raise ValueError(f"annotations: every VOC {entry.tag} needs {path}, one has none")
    return text.strip()


def _check_files(source: Path, files: Iterable[Path]) -> None:
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        shown = "".join(f"\n  {name}" for name in missing[:SHOWN])
        more = f"\n  and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ValueError(f"{source}: {len(missing)} files are missing:{shown}{more}")
