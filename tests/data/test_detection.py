"""Boxes from disk and from digits: what is read, what is refused, what augmentation does to them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from vssm.data import BoxAugment, CocoDetection, DigitScenes, Loader, VocDetection
from vssm.data.annotations import coco, voc
from vssm.data.box_augment import chosen, combined, fitted, placed
from vssm.data.detection import BoxScenes, covered
from vssm.data.images import read_mnist5k, split_mnist5k


def coco_folder(root, *, annotations=None, categories=None, images=None):
    """Two images, of 40 x 30 and 20 x 50 pixels; a cat and a crowd of dogs in the first, nothing in the second."""
    (root / "train2017").mkdir(parents=True)
    for name, size in (("a.png", (40, 30)), ("b.png", (20, 50))):
        Image.new("RGB", size, (200, 100, 0)).save(root / "train2017" / name)
    content = {
        "images": images or [
            {"id": 7, "file_name": "b.png", "width": 20, "height": 50},
            {"id": 3, "file_name": "a.png", "width": 40, "height": 30},
        ],
        "categories": categories or [{"id": 18, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": annotations if annotations is not None else [
            {"id": 1, "image_id": 3, "category_id": 2, "bbox": [5, 4, 10, 20], "area": 150.0, "iscrowd": 0,
             "segmentation": [[5, 4, 15, 4, 15, 24, 5, 24]]},
            {"id": 2, "image_id": 3, "category_id": 18, "bbox": [0, 0, 40.5, 30], "area": 900.0, "iscrowd": 1,
             "segmentation": {"counts": [0, 1200], "size": [30, 40]}},
        ],
    }  # fmt: skip
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root


def read_coco(root, **options):
    return coco(root / "annotations" / "instances_train2017.json", root / "train2017", **options)


def test_reads_coco(tmp_path):
    """Classes by id, images by id; a box that sticks out by less than a pixel is cut."""
    found = read_coco(coco_folder(tmp_path), masks=True)
    assert found.class_names == ["cat", "dog"]
    assert [file.name for file in found.files] == ["a.png", "b.png"]
    first, second = found.objects
    assert first.boxes.tolist() == [[5, 4, 15, 24], [0, 0, 40, 30]]
    assert first.labels.tolist() == [0, 1]
    assert first.ignored.tolist() == [False, True]
    assert first.areas.tolist() == [150, 900]
    masks = first.masks()
    assert masks.shape == (2, 30, 40)
    assert (masks[0].sum(), masks[1].sum()) == (200, 1200)
    assert second.boxes.shape == (0, 4)
    assert second.masks().shape == (0, 50, 20)


def box(x, y, w, h, **more):
    return {"id": 5, "image_id": 3, "category_id": 2, "bbox": [x, y, w, h], **more}


FAULTS = {
    "empty": (box(5, 5, 0, 10), r"annotation 5 of a.png: box x 5 to 5, y 5 to 15 must have a positive width"),
    "inverted": (box(5, 5, 3, -2), r"box x 5 to 8, y 5 to 3 must have a positive width and height"),
    "outside": (box(30, 5, 20, 10), r"box x 30 to 50, y 5 to 15 must lie inside the image, 40 x 30 pixels"),
    "far": (box(-9, 5, 8.5, 10), r"must lie inside the image"),
    "no numbers": (box(0, 0, "wide", 3), r"must be four numbers"),
    "category": (box(1, 1, 5, 5, category_id=99), r"annotation 5 of a.png: no category has the id 99"),
    "image": (box(1, 1, 5, 5, image_id=99), r"annotation 5: no image has the id 99"),
    "outline": (box(1, 1, 5, 5), r"annotation 5 of a.png: it has no outline"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_annotations_are_refused_by_name_or_left_out(tmp_path, fault):
    entry, message = FAULTS[fault]
    good = box(1, 1, 5, 5, id=6, segmentation=[[1, 1, 6, 1, 6, 6]])
    root, masks = coco_folder(tmp_path, annotations=[entry, good]), fault == "outline"
    with pytest.raises(ValueError, match=message) as refusal:
        read_coco(root, masks=masks)
    assert "1 annotations are broken" in str(refusal.value)
    with pytest.warns(UserWarning, match="1 broken annotations are left out"):
        found = read_coco(root, masks=masks, faults="drop")
    assert found.objects[0].boxes.tolist() == [[1, 1, 6, 6]]


def test_missing_images_and_files_that_are_no_coco_are_refused(tmp_path):
    root = coco_folder(tmp_path / "one")
    (root / "train2017" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"1 files are missing:\n.*b\.png"):
        read_coco(root)
    file = root / "annotations" / "instances_train2017.json"
    file.write_text('{"images": []}')
    with pytest.raises(ValueError, match="is no COCO file: it needs a list of annotations"):
        read_coco(root)
    file.write_text("[1")
    with pytest.raises(ValueError, match="is no COCO file: not JSON"):
        read_coco(root)
    file.unlink()
    with pytest.raises(ValueError, match="1 files are missing"):
        read_coco(root)
    root = coco_folder(tmp_path / "two", images=[{"id": 3, "file_name": "a.png"}])
    with pytest.raises(ValueError, match="every entry of images needs width, height"):
        read_coco(root)


XML = """<annotation><size><width>40</width><height>30</height></size>
<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{xmin}</xmin><ymin>1</ymin><xmax>10</xmax><ymax>30</ymax>
</bndbox></object>
<object><name>cat</name><difficult>1</difficult><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>4</xmax><ymax>4</ymax></bndbox>
</object></annotation>"""


def voc_folder(root, name="dog", xmin=1):
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(root / "JPEGImages" / "x.jpg")
    (root / "Annotations" / "x.xml").write_text(XML.format(name=name, xmin=xmin))
    (root / "ImageSets" / "Main" / "train.txt").write_text("x\n")
    return root


def test_reads_voc(tmp_path):
    """Pixels are counted from 1, and the last one belongs to the box."""
    found = voc(voc_folder(tmp_path), "train")
    assert found.class_names == ["cat", "dog"]
    assert found.objects[0].boxes.tolist() == [[0, 0, 10, 30], [2, 2, 4, 4]]
    assert found.objects[0].labels.tolist() == [1, 0]
    assert found.objects[0].ignored.tolist() == [False, True]


def test_broken_voc_folders_are_refused(tmp_path):
    root = voc_folder(tmp_path / "one", xmin=12)
    with pytest.raises(ValueError, match=r"object 1 of x\.xml: box x 11 to 10, y 0 to 30 must have a positive width"):
        voc(root, "train")
    with pytest.raises(ValueError, match=r"object 1 of x\.xml: 'dog' is no class; there are cat"):
        voc(voc_folder(tmp_path / "two"), "train", ["cat"])
    with pytest.raises(ValueError, match=r"1 files are missing:\n.*val\.txt"):
        voc(root, "val")
    (root / "Annotations" / "x.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"x\.xml is no VOC annotation: not XML"):
        voc(root, "train")
    (root / "Annotations" / "x.xml").write_text("<annotation/>")
    with pytest.raises(ValueError, match="every VOC annotation needs size/width"):
        voc(root, "train")
    (root / "JPEGImages" / "x.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 files are missing:\n.*x\.jpg"):
        voc(root, "train")


def set_up(data, stage="fit", **trainer):
    data.trainer = SimpleNamespace(max_epochs=20, world_size=1, global_rank=0, **trainer)
    data.setup(stage)
    return data


def test_samples_have_torchvisions_targets(tmp_path):
    """In training crowds are left out; evaluation says what they are."""
    root = coco_folder(tmp_path)
    places = {"val_annotations": "annotations/instances_train2017.json", "val_images": "train2017"}
    data = set_up(CocoDetection(str(root), masks=True, augment=None, **places))
    sample = data.data["train"][(0, 0, 0)]
    assert sample["image"].shape == (3, 30, 40)
    assert sample["image"].max() == pytest.approx(200 / 255)
    target = sample["target"]
    assert target.keys() == {"boxes", "labels", "masks"}
    assert all(type(value) is torch.Tensor for value in target.values())
    assert (target["boxes"].tolist(), target["labels"].tolist()) == ([[5, 4, 15, 24]], [1])
    evaluated = data.data["val"][0]["target"]
    assert evaluated["iscrowd"].tolist() == [0, 1]
    assert evaluated["area"].tolist() == [150, 900]
    batch = data.collate([data.data["train"][(0, i, 0)] for i in range(2)])
    assert [tuple(x.shape) for x in batch["image"]] == [(3, 30, 40), (3, 50, 20)]
    assert [len(x["labels"]) for x in batch["target"]] == [1, 0]
    assert batch["index"].tolist() == [0, 1]
    assert data.collate([None]) is None


def test_an_image_of_another_size_than_annotated_counts_as_unreadable(tmp_path):
    root = coco_folder(tmp_path)
    Image.new("RGB", (41, 30)).save(root / "train2017" / "a.png")
    places = {"val_annotations": "annotations/instances_train2017.json", "val_images": "train2017"}
    data = set_up(CocoDetection(str(root), augment=None, **places), "validate")
    with pytest.warns(UserWarning, match=r"a\.png cannot .*it has \(41, 30\) pixels, its annotation says \(40, 30\)"):
        assert data.data["val"][0] is None
    assert data.data["val"][1]["index"] == 1


def test_splits_must_have_the_same_classes(tmp_path):
    root = coco_folder(tmp_path / "train")
    other = coco_folder(tmp_path / "val", categories=[{"id": 2, "name": "cow"}], annotations=[])
    data = CocoDetection(
        str(root),
        val_annotations=str(other / "annotations" / "instances_train2017.json"),
        val_images=str(other / "train2017"),
    )
    with pytest.raises(ValueError, match="must be those of the training annotations, cat, dog, …, got cow"):
        set_up(data)


def test_voc_takes_its_classes_from_the_training_list(tmp_path):
    root = voc_folder(tmp_path)
    for split in ("val", "test"):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("x\n")
    assert set_up(VocDetection(str(root)), "test").class_names == ["cat", "dog"]
    data = set_up(VocDetection(str(root), classes=["dog", "cat", "cow"]))
    assert data.class_names == ["dog", "cat", "cow"]
    assert data.data["train"][(0, 0, 0)]["target"]["labels"].tolist() == [1]     # the difficult cat is not trained


# ---- scenes of digits ----


@pytest.fixture(scope="module")
def digits():
    return set_up(DigitScenes(masks=True, train_scenes=40, val_scenes=40, loader=Loader(batch_size=4, workers=0)))


def same(a, b):
    return torch.equal(a["image"], b["image"]) and all(torch.equal(a["target"][k], b["target"][k]) for k in a["target"])


def test_scenes_are_what_they_are_said_to_be(digits):
    scenes = [digits.data["train"][(0, i, 0)] for i in range(40)]
    counts = [len(scene["target"]["labels"]) for scene in scenes]
    assert min(counts) >= 1
    assert 6 < max(counts) <= 8
    for scene in scenes:
        assert scene["image"].shape == (1, 128, 128)
        boxes, masks = scene["target"]["boxes"], scene["target"]["masks"]
        assert ((scene["target"]["labels"] >= 1) & (scene["target"]["labels"] <= 10)).all()
        for box, mask in zip(boxes.tolist(), masks):
            rows, columns = mask.nonzero().unbind(1)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        pairs = [(a, b) for i, a in enumerate(boxes.tolist()) for b in boxes.tolist()[:i]]
        assert all(covered(a, b) <= 0.25 for a, b in pairs)


def test_training_scenes_follow_from_their_key_and_the_others_never_change(digits):
    train, val = digits.data["train"], digits.data["val"]
    assert same(train[(2, 5, 0)], train[(2, 5, 0)])
    assert not same(train[(2, 5, 0)], train[(3, 5, 0)])
    assert not same(train[(2, 5, 0)], train[(2, 6, 0)])
    assert same(val[(2, 5, 0)], val[(3, 5, 0)])
    again = set_up(DigitScenes(masks=True, val_scenes=40, loader=Loader(seed=9, workers=0))).data["val"]
    assert same(val[5], again[5])
    state = torch.get_rng_state()
    train[(0, 0, 0)]
    assert torch.equal(state, torch.get_rng_state())


def test_splits_share_no_digit(digits):
    """Nor with what the classifier trains on: the rows are those of MNIST5k."""
    images, labels = read_mnist5k()
    rows = split_mnist5k(labels, 40)
    assert sorted(np.concatenate(list(rows.values()))) == list(range(5000))
    assert all(np.array_equal(split_mnist5k(labels, 20)["test"], part) for part in [rows["test"]])
    for split in ("train", "val"):
        assert np.array_equal(digits.data[split].source.read.digits, images[rows[split]])
    test = set_up(DigitScenes(), "test").data["test"]
    assert np.array_equal(test.source.read.digits, images[rows["test"]])
    assert len(test) == 500


def test_scenes_refuse_empty_splits():
    with pytest.raises(ValueError, match="DigitScenes: scenes must be 1 or more of each split"):
        DigitScenes(test_scenes=0)


# ---- augmentation ----


def scene(height, width, *boxes, value=200):
    """A grey image whose boxes are bright, and masks of the boxes."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        image[:, y1:y2, x1:x2] = value
        mask[y1:y2, x1:x2] = 1
    array = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(array, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(len(boxes)) + 1,
        "masks": tv_tensors.Mask(masks),
    }


def bright(made):
    """Boxes around what is bright, one for each label."""
    return [[m.nonzero()[:, 1].min(), m.nonzero()[:, 0].min(), m.nonzero()[:, 1].max() + 1, m.nonzero()[:, 0].max() + 1]
            for m in made["masks"]]  # fmt: skip


def test_a_mosaic_puts_four_scenes_around_a_point():
    torch.manual_seed(0)
    parts = [scene(16, 32, (4, 4, 12, 12), value=150 + 20 * i) for i in range(4)]
    made = combined(parts, 32)
    assert made["image"].shape == (3, 64, 64)
    assert made["masks"].shape[1:] == (64, 64)
    assert len(made["labels"]) == len(made["boxes"]) == len(made["masks"]) > 1
    for box, mask in zip(made["boxes"].int().tolist(), made["masks"]):
        assert mask.sum() == (box[2] - box[0]) * (box[3] - box[1])
        assert mask[box[1] : box[3], box[0] : box[2]].all()
        assert len(made["image"][0, box[1] : box[3], box[0] : box[2]].unique()) == 1
    assert (made["image"] == 114).any()


def test_what_lies_outside_the_canvas_is_cut_off():
    made = placed([scene(20, 20, (0, 0, 4, 4), (8, 8, 18, 18))], [(-10, -5)], 16)
    assert made["boxes"].tolist() == [[0, 3, 8, 13]]
    assert made["labels"].tolist() == [2]
    assert bright(made) == [[0, 3, 8, 13]]


def test_a_single_scene_is_fitted_into_the_canvas():
    made = fitted(scene(10, 20, (0, 0, 10, 10)), 40)
    assert made["boxes"].tolist() == [[0, 10, 20, 30]]
    assert (made["image"][:, :10] == 114).all()
    assert (made["image"][:, 10:30, :19] == 200).all()  # the border between bright and dark is smoothed


@pytest.mark.parametrize("seed", range(6))
def test_moves_keep_boxes_around_their_objects(seed):
    torch.manual_seed(seed)
    augment = BoxAugment(mosaic=1.0, canvas=64, translate=0.2, scale=0.4, hflip=0.5, vflip=0.5)
    parts = iter([scene(40, 64, (10, 10, 40, 30)) for _ in range(3)])
    made = augment(scene(64, 64, (5, 5, 25, 30), (30, 30, 60, 60)), lambda: next(parts))
    assert made["image"].shape == (3, 64, 64)
    for box, mask in zip(made["boxes"].tolist(), bright(made)):
        assert all(abs(a - float(b)) <= 1.5 for a, b in zip(box, mask))
    assert len(made["labels"]) == len(made["boxes"])
    assert all(side > 2 for x1, y1, x2, y2 in made["boxes"].tolist() for side in (x2 - x1, y2 - y1))


def test_objects_that_all_but_disappear_are_dropped():
    """Moved so that the first leaves the canvas but for a rim."""
    torch.manual_seed(0)
    augment = BoxAugment(canvas=64, translate=0.9, hflip=0.0)
    kept = [len(augment(scene(64, 64, (0, 0, 20, 20), (44, 44, 64, 64)), None)["labels"]) for _ in range(20)]
    assert set(kept) == {0, 1, 2} or set(kept) == {0, 1}


def test_mosaics_stop_before_the_end():
    calls = []
    another = lambda: calls.append(1) or scene(16, 16, (2, 2, 10, 10))
    augment = BoxAugment(mosaic=1.0, canvas=16)
    augment(scene(16, 16, (2, 2, 10, 10)), another, mosaic=False)
    assert calls == []
    augment(scene(16, 16, (2, 2, 10, 10)), another)
    assert len(calls) == 3
    data = set_up(DigitScenes(augment=BoxAugment(mosaic=1.0, canvas=128, close_mosaic=5)))
    assert data.data["train"].mosaic_epochs == 15


def test_colours_change_only_as_far_as_asked():
    torch.manual_seed(0)
    plain = scene(8, 8, (0, 0, 4, 4), value=120)
    plain["image"][0] += 60
    assert torch.equal(BoxAugment(hflip=0.0)(plain, None)["image"], plain["image"])
    values = [BoxAugment(hflip=0.0, hsv=(0.0, 0.0, 0.4))(plain, None)["image"].max().item() for _ in range(30)]
    assert 180 * 0.6 - 2 <= min(values) < 150
    assert 210 < max(values) <= 180 * 1.4 + 2
    grey = {**plain, "image": tv_tensors.Image(plain["image"][:1])}
    assert BoxAugment(hsv=(0.1, 0.5, 0.4))(grey, None)["image"].shape == (1, 8, 8)


def test_torchvisions_crops_and_colours_run():
    torch.manual_seed(0)
    augment = BoxAugment(iou_crop=1.0, photometric=True)
    for _ in range(5):
        made = augment(scene(64, 48, (5, 5, 25, 30), (20, 30, 40, 60)), None)
        assert made["masks"].shape[1:] == made["image"].shape[1:]
        assert len(made["labels"]) == len(made["boxes"]) == len(made["masks"])


def test_choosing_keeps_the_kinds():
    made = chosen(scene(8, 8, (0, 0, 4, 4), (2, 2, 8, 8)), torch.tensor([False, True]))
    assert isinstance(made["boxes"], tv_tensors.BoundingBoxes)
    assert isinstance(made["masks"], tv_tensors.Mask)
    assert made["labels"].tolist() == [2]


def test_refuses_shares_that_are_none():
    with pytest.raises(ValueError, match=r"BoxAugment: scale must be in \[0, 1\) and mosaic in \[0, 1\], got 1.0"):
        BoxAugment(scale=1.0)


def test_mosaics_are_drawn_from_readable_images(digits):
    augment = BoxAugment(mosaic=1.0, canvas=128)
    made = BoxScenes(digits.data["train"].source, augment, seed=0, training=True, max_corrupt=1)
    assert same(made[(0, 3, 0)], made[(0, 3, 0)])
    assert made[(0, 3, 0)]["image"].shape == (1, 128, 128)
