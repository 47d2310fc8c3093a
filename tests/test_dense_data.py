"""NYUv2, Cityscapes and PASCAL-Context loaders on small generated data in the format of the downloads."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from dense_data import Cityscapes, NYUv2, PascalContext

HEIGHT, WIDTH = 6, 9


def arrays(
    root: Path, split: str, kinds: dict[str, tuple[int, ...]], numbers: tuple[int, ...]
) -> dict[tuple[str, int], np.ndarray]:
    """Files of float64, as the downloads have them, in an order that is not that of their names as text."""
    rng = np.random.default_rng(0)
    files = {}
    for kind, tail in kinds.items():
        folder = root / split / kind
        folder.mkdir(parents=True)
        for number in numbers:
            is_label = kind.startswith("label")
            values = rng.integers(-1, 7, (HEIGHT, WIDTH)).astype(float) if is_label else rng.random((HEIGHT, WIDTH, *tail))
            np.save(folder / f"{number}.npy", values)
            files[kind, number] = values
    return files


def test_nyuv2(tmp_path: Path) -> None:
    files = arrays(tmp_path, "train", {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}, (0, 2, 10))
    data = NYUv2(tmp_path)
    assert len(data) == 3
    for index, number in enumerate((0, 2, 10)):
        image, targets = data[index]
        assert list(targets) == list(NYUv2.tasks)
        np.testing.assert_allclose(image.numpy(), files["image", number].transpose(2, 0, 1), rtol=1e-6)
        np.testing.assert_array_equal(targets["segmentation"].numpy(), files["label", number])
        np.testing.assert_allclose(targets["depth"].numpy()[0], files["depth", number][..., 0], rtol=1e-6)
        np.testing.assert_allclose(targets["normal"].numpy(), files["normal", number].transpose(2, 0, 1), rtol=1e-6)
        assert (image.dtype, targets["segmentation"].dtype, targets["depth"].dtype) == (
            torch.float32,
            torch.int64,
            torch.float32,
        )
    images, batch = next(iter(torch.utils.data.DataLoader(data, batch_size=3)))
    assert images.shape == (3, 3, HEIGHT, WIDTH)
    assert batch["depth"].shape == (3, 1, HEIGHT, WIDTH)
    scores = torch.randn(3, 13, HEIGHT, WIDTH)
    assert torch.nn.functional.cross_entropy(scores, batch["segmentation"], ignore_index=-1).isfinite()


@pytest.mark.parametrize(("label", "classes"), [("label_7", 7), ("label_19", 19), ("label", 7)])
def test_cityscapes(tmp_path: Path, label: str, classes: int) -> None:
    files = arrays(tmp_path, "val", {"image": (3,), label: (), "depth": (1,)}, (0, 1))
    image, targets = Cityscapes(tmp_path, "val", classes)[1]
    np.testing.assert_allclose(image.numpy(), files["image", 1].transpose(2, 0, 1), rtol=1e-6)
    np.testing.assert_array_equal(targets["segmentation"].numpy(), files[label, 1])
    np.testing.assert_allclose(targets["depth"].numpy()[0], files["depth", 1][..., 0], rtol=1e-6)


def test_missing_arrays_say_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root has no folder .*image; download the preprocessed NYUv2 of MTAN"):
        NYUv2(tmp_path)
    arrays(tmp_path, "train", {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}, (0, 1))
    (tmp_path / "train" / "depth" / "1.npy").unlink()
    with pytest.raises(ValueError, match=r"depth lacks 1.npy"):
        NYUv2(tmp_path)
    with pytest.raises(ValueError, match="split is 'test'"):
        NYUv2(tmp_path, "test")
    with pytest.raises(ValueError, match="classes is 8"):
        Cityscapes(tmp_path, "train", 8)
    with pytest.raises(ValueError, match="label_19; download the preprocessed Cityscapes"):
        Cityscapes(tmp_path, "train", 19)


def part(name: str, mask: np.ndarray) -> np.ndarray:
    result = np.empty((1, 1), dtype=[("part_name", object), ("mask", object)])
    result[0, 0] = (name, mask.astype(np.uint8))
    return result


def annotation(objects: list[tuple[str, int, np.ndarray, list[tuple[str, np.ndarray]]]]) -> np.ndarray:
    """The nested struct of PASCAL-Part: anno.objects(i) with class, class_ind, mask and parts(j) with part_name and mask."""
    things = np.empty((1, len(objects)), dtype=[("class", object), ("class_ind", object), ("mask", object), ("parts", object)])
    for n, (name, index, mask, parts) in enumerate(objects):
        listed = np.concatenate([part(*p) for p in parts], axis=1) if parts else np.empty((0, 0))
        things[0, n] = (name, np.array([[index]]), mask.astype(np.uint8), listed)
    anno = np.empty((1, 1), dtype=[("imname", object), ("objects", object)])
    anno[0, 0] = ("x", things)
    return anno


@pytest.fixture
def pascal(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    names = ("2008_000003", "2008_000001")
    for folder in ("JPEGImages", "ImageSets/Context", "semseg/VOC12", "semseg/pascal-context", "human_parts"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("normals_distill", "sal_distill", "pascal-context/trainval"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Context/train.txt").write_text("\n".join(names) + "\n")
    made = {}
    for n, name in enumerate(names):
        picture = rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / f"JPEGImages/{name}.jpg", quality=100, subsampling=0)
        classes = rng.integers(0, 21, (HEIGHT, WIDTH)).astype(np.uint8)
        classes[0, 0] = 255
        indexed = Image.fromarray(classes, mode="P")
        indexed.putpalette([3 * i % 256 for i in range(768)])
        indexed.save(tmp_path / "semseg" / ("VOC12", "pascal-context")[n] / f"{name}.png")
        normals = rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        Image.fromarray(normals).save(tmp_path / f"normals_distill/{name}.png")
        saliency = rng.integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
        Image.fromarray(saliency).save(tmp_path / f"sal_distill/{name}.png")
        labels = rng.integers(1, 4, (HEIGHT, WIDTH)).astype(np.uint16)
        savemat(tmp_path / f"pascal-context/trainval/{name}.mat", {"LabelMap": labels})
        masks = rng.random((5, HEIGHT, WIDTH)) < 0.4
        things = [
            ("person", 15, masks[0], [("hair", masks[1]), ("llarm", masks[2])]),
            ("dog", 12, masks[3], [("head", masks[4])]),
        ]
        if n == 1:
            things = [("dog", 12, masks[3], [("head", masks[4])]), ("person", 15, masks[0], [])]
        savemat(tmp_path / f"human_parts/{name}.mat", {"anno": annotation(things)})
        made |= {f"picture {n}": picture, f"classes {n}": classes, f"normals {n}": normals, f"saliency {n}": saliency}
        made |= {f"labels {n}": labels, f"masks {n}": masks}
    return tmp_path, made


def test_pascal_context(pascal: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, made = pascal
    data = PascalContext(root)
    assert len(data) == 2
    for n in range(2):
        image, targets = data[n]
        assert list(targets) == list(PascalContext.tasks)
        assert np.abs(image.numpy().transpose(1, 2, 0) * 255 - made[f"picture {n}"]).mean() < 4  # JPEG
        classes = made[f"classes {n}"].astype(int)
        np.testing.assert_array_equal(targets["semseg"].numpy(), np.where(classes == 255, -1, classes))
        np.testing.assert_allclose(targets["normals"].numpy().transpose(1, 2, 0), made[f"normals {n}"] / 127.5 - 1, atol=1e-6)
        np.testing.assert_array_equal(targets["saliency"].numpy()[0], made[f"saliency {n}"] > 127.5)
        labels = made[f"labels {n}"].astype(int)
        edges = np.zeros((HEIGHT, WIDTH), bool)
        for i in range(HEIGHT):
            for j in range(WIDTH):
                beside = [labels[a, b] for a, b in ((i, j + 1), (i + 1, j)) if a < HEIGHT and b < WIDTH]
                edges[i, j] = any(value != labels[i, j] for value in beside)
        np.testing.assert_array_equal(targets["edges"].numpy()[0], edges)
    masks = made["masks 0"]
    np.testing.assert_array_equal(data[0][1]["parts"].numpy(), np.where(masks[2], 4, np.where(masks[1], 1, 0)))
    assert not data[1][1]["parts"].any()


def test_pascal_context_of_some_tasks_and_classes(pascal: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, made = pascal
    data = PascalContext(root, tasks=("normals",), normal_classes={1, 3})
    _, targets = data[0]
    assert list(targets) == ["normals"]
    counted = np.isin(made["labels 0"], [1, 3])
    expected = np.where(counted[..., None], made["normals 0"] / 127.5 - 1, 0)
    np.testing.assert_allclose(targets["normals"].numpy().transpose(1, 2, 0), expected, atol=1e-6)
    for path in (root / "human_parts").glob("*.mat"):
        path.unlink()
    assert len(PascalContext(root, tasks=("semseg", "edges"))) == 2
    with pytest.raises(ValueError, match=r"2008_000003.mat is not there, but train.txt lists 2008_000003"):
        PascalContext(root)


def test_targets_of_another_size_are_resized_to_the_image(pascal: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, made = pascal
    big = made["saliency 0"].repeat(2, 0).repeat(2, 1)
    Image.fromarray(big).save(root / "sal_distill/2008_000003.png")
    classes = Image.fromarray(made["classes 0"].repeat(2, 0).repeat(2, 1), mode="L")
    classes.save(root / "semseg/VOC12/2008_000003.png")
    _, targets = PascalContext(root, tasks=("saliency", "semseg"))[0]
    np.testing.assert_array_equal(targets["saliency"].numpy()[0], made["saliency 0"] > 127)
    assert targets["semseg"].dtype == torch.int64
    np.testing.assert_array_equal(targets["semseg"].numpy()[1:], made["classes 0"][1:])


def test_pascal_context_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root has no .*val.txt; pass the folder PASCAL_MT of ASTMT"):
        PascalContext(tmp_path, "val")
    with pytest.raises(ValueError, match="unknown task 'depth'; the tasks are 'semseg'"):
        PascalContext(tmp_path, tasks=("depth",))
