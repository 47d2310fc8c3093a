"""Loaders of the dense-prediction sets of the task priority paper, in the formats that they are commonly distributed in.

None of them installs from a package index; each class says which download it reads. Every item is a pair: the image, float32
[3, H, W] in [0, 1], and {task: target}. Classes that are to be ignored are -1 everywhere, as
``cross_entropy(..., ignore_index=-1)`` takes them.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtlkernels._optional import require

Sample = tuple[Tensor, dict[str, Tensor]]


class _Arrays(Dataset[Sample]):
    """Folders of NumPy files ``<root>/<train or val>/<kind>/<number>.npy``."""

    def __init__(self, root: Path | str, split: str, folders: dict[str, str], source: str) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split is {split!r}; pass 'train' or 'val'.")
        self.folders = {kind: Path(root) / split / folder for kind, folder in folders.items()}
        for folder in self.folders.values():
            if not folder.is_dir():
                raise ValueError(
                    f"root has no folder {folder}; download {source}, and pass the folder that holds train and val."
                )
        self.numbers = sorted(int(path.stem) for path in self.folders["image"].glob("*.npy"))
        for kind, folder in self.folders.items():
            missing = [n for n in self.numbers if not (folder / f"{n}.npy").is_file()]
            if missing or not self.numbers:
                lacks = f"lacks {missing[0]}.npy" if missing else "is empty"
                raise ValueError(f"{folder} {lacks} ({kind}); download {source} again.")

    def __len__(self) -> int:
        return len(self.numbers)

    def _load(self, kind: str, index: int) -> Tensor:
        return torch.from_numpy(np.load(self.folders[kind] / f"{self.numbers[index]}.npy"))

    def _channels_first(self, kind: str, index: int) -> Tensor:
        return self._load(kind, index).movedim(-1, 0).float().contiguous()


class NYUv2(_Arrays):
    """NYUv2 (Silberman et al. 2012) as MTAN (Liu et al. 2019) distributes it: 795 and 654 images of 288 x 384 pixels.

    ``root/{train,val}/{image,label,depth,normal}/<number>.npy``: image [H, W, 3] in [0, 1], label [H, W] with 13 classes and
    -1, depth [H, W, 1] in metres with 0 for unknown, normal [H, W, 3] with 0 for unknown.

    Targets: ``"segmentation"`` int64 [H, W], ``"depth"`` float32 [1, H, W], ``"normal"`` float32 [3, H, W].

    Args:
        root: the folder that holds ``train`` and ``val``.
        split: ``"train"`` or ``"val"``.

    Raises:
        ValueError: files or folders that are missing.
    """

    tasks = ("segmentation", "depth", "normal")

    def __init__(self, root: Path | str, split: str = "train") -> None:
        folders = {kind: kind for kind in ("image", "label", "depth", "normal")}
        super().__init__(root, split, folders, "the preprocessed NYUv2 of MTAN (github.com/lorenmt/mtan)")

    def __getitem__(self, index: int) -> Sample:
        targets = {"segmentation": self._load("label", index).long()}
        targets |= {kind: self._channels_first(kind, index) for kind in ("depth", "normal")}
        return self._channels_first("image", index), targets


class Cityscapes(_Arrays):
    """Cityscapes (Cordts et al. 2016) as MTAN (Liu et al. 2019) distributes it: 2,975 and 500 images of 128 x 256 pixels.

    ``root/{train,val}/{image,label_7,label_19,depth}/<number>.npy``: image [H, W, 3] in [0, 1], label [H, W] with 7 or 19
    classes and -1, depth [H, W, 1], the inverse depth with 0 for unknown. Copies that name the folder ``label`` are read, too.

    Targets: ``"segmentation"`` int64 [H, W], ``"depth"`` float32 [1, H, W].

    Args:
        root: the folder that holds ``train`` and ``val``.
        split: ``"train"`` or ``"val"``.
        classes: 7 or 19.

    Raises:
        ValueError: files or folders that are missing, or another number of classes.
    """

    tasks = ("segmentation", "depth")

    def __init__(self, root: Path | str, split: str = "train", classes: int = 7) -> None:
        if classes not in (7, 19):
            raise ValueError(f"classes is {classes}; pass 7 or 19.")
        own = f"label_{classes}"
        label = own if (Path(root) / split / own).is_dir() or classes == 19 else "label"
        folders = {"image": "image", "label": label, "depth": "depth"}
        super().__init__(root, split, folders, "the preprocessed Cityscapes of MTAN (github.com/lorenmt/mtan)")

    def __getitem__(self, index: int) -> Sample:
        targets = {"segmentation": self._load("label", index).long(), "depth": self._channels_first("depth", index)}
        return self._channels_first("image", index), targets


_GROUPS = {
    1: "hair head mouth nose lear rear lebrow rebrow leye reye",
    2: "neck torso",
    3: "luarm ruarm",
    4: "llarm rlarm lhand rhand",
    5: "luleg ruleg",
    6: "llleg rlleg lfoot rfoot",
}
_PARTS = {name: group for group, names in _GROUPS.items() for name in names.split()}
_PERSON = 15


class PascalContext(Dataset[Sample]):
    """PASCAL-Context (Mottaghi et al. 2014; Chen et al. 2014) as ASTMT (Maninis et al. 2019) distributes it: PASCAL_MT.

    ``root/JPEGImages/<id>.jpg``; the ids of a split, a line each, in ``root/ImageSets/Context/{train,val}.txt``;
    ``semseg/VOC12/<id>.png`` or else ``semseg/pascal-context/<id>.png`` with 21 classes and 255; ``human_parts/<id>.mat`` with
    the ``anno`` of PASCAL-Part; ``normals_distill/<id>.png``, (n + 1) / 2 in 8 bits; ``sal_distill/<id>.png``;
    ``pascal-context/trainval/<id>.mat`` with ``LabelMap`` [H, W].

    Targets, in the image's size: ``"semseg"`` int64 [H, W]; ``"parts"`` int64 [H, W] with the background, head, torso, upper
    and lower arms, upper and lower legs (0 .. 6); ``"normals"`` float32 [3, H, W]; ``"saliency"`` and ``"edges"`` float32
    [1, H, W] of 0 and 1. An edge is a pixel whose label differs from a neighbour's to the right or below; the released code
    thins such a map, which this loader does not.

    Args:
        root: the folder PASCAL_MT.
        split: ``"train"`` or ``"val"``.
        tasks: which targets to load.
        normal_classes: values of ``LabelMap`` whose normals count, the others become 0: the distilled normals are meaningful
            for classes of NYUv2 only. None: all.

    Raises:
        ValueError: files that are missing, or an unknown task.
        MissingPackageError: Pillow is not installed, or SciPy for parts, normals and edges.
    """

    tasks = ("semseg", "parts", "normals", "saliency", "edges")

    def __init__(
        self,
        root: Path | str,
        split: str = "train",
        tasks: Sequence[str] = tasks,
        normal_classes: Collection[int] | None = None,
    ) -> None:
        unknown = [task for task in tasks if task not in self.tasks]
        if unknown:
            raise ValueError(f"tasks has the unknown task {unknown[0]!r}; the tasks are {', '.join(map(repr, self.tasks))}.")
        self.root, self.wanted = Path(root), tuple(tasks)
        self.normal_classes = None if normal_classes is None else sorted(normal_classes)
        listed = self.root / "ImageSets" / "Context" / f"{split}.txt"
        if not listed.is_file():
            raise ValueError(f"root has no {listed}; pass the folder PASCAL_MT of ASTMT (github.com/facebookresearch/astmt).")
        self.ids = listed.read_text().split()
        for name in self.ids:
            for path in self._files(name).values():
                if not path.is_file():
                    raise ValueError(f"{path} is not there, but {listed.name} lists {name}; extract PASCAL_MT.tgz again.")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        files = self._files(self.ids[index])
        image = torch.from_numpy(_picture(files["image"], "RGB")).movedim(-1, 0).float().contiguous() / 255
        size = image.shape[1:]
        targets: dict[str, Tensor] = {}
        for task in self.wanted:
            target = getattr(self, f"_{task}")(files)
            if target.shape[-2:] != size:
                classes = not target.dtype.is_floating_point
                raw = target.reshape(1, -1, *target.shape[-2:]).float()
                resized = torch.nn.functional.interpolate(raw, size, mode="nearest")[0]
                target = resized[0].long() if classes else resized
            targets[task] = target
        return image, targets

    def _files(self, name: str) -> dict[str, Path]:
        """The files that the wanted tasks of one image need."""
        voc, context = (self.root / "semseg" / folder / f"{name}.png" for folder in ("VOC12", "pascal-context"))
        labels = self.root / "pascal-context" / "trainval" / f"{name}.mat"
        needed = {
            "semseg": {"semseg": voc if voc.is_file() else context},
            "parts": {"parts": self.root / "human_parts" / f"{name}.mat"},
            "normals": {"normals": self.root / "normals_distill" / f"{name}.png"},
            "saliency": {"saliency": self.root / "sal_distill" / f"{name}.png"},
            "edges": {"labels": labels},
        }
        if self.normal_classes is not None:
            needed["normals"]["labels"] = labels
        files = {"image": self.root / "JPEGImages" / f"{name}.jpg"}
        for task in self.wanted:
            files |= needed[task]
        return files

    def _semseg(self, files: dict[str, Path]) -> Tensor:
        classes = torch.from_numpy(_picture(files["semseg"])).long()
        return torch.where(classes == 255, -1, classes)

    def _parts(self, files: dict[str, Path]) -> Tensor:
        """Of every person, the parts in the order that the annotation lists them."""
        objects = _matlab(files["parts"], "anno")[0, 0]["objects"][0]
        result: Tensor | None = None
        for thing in objects:
            mask = torch.from_numpy(np.ascontiguousarray(thing["mask"]))
            result = torch.zeros(mask.shape, dtype=torch.int64) if result is None else result
            if int(thing["class_ind"].squeeze()) != _PERSON or not thing["parts"].size:
                continue
            for part in thing["parts"][0]:
                where = torch.from_numpy(np.ascontiguousarray(part["mask"])).bool()
                result[where] = _PARTS[str(part["part_name"][0])]
        if result is None:
            raise ValueError(f"{files['parts']} annotates no object; extract PASCAL_MT.tgz again.")
        return result

    def _normals(self, files: dict[str, Path]) -> Tensor:
        normals = torch.from_numpy(_picture(files["normals"], "RGB")).movedim(-1, 0).float() * (2 / 255) - 1
        if self.normal_classes is None:
            return normals.contiguous()
        labels = _matlab(files["labels"], "LabelMap")
        return torch.where(torch.from_numpy(np.isin(labels, self.normal_classes)), normals, 0.0)

    def _saliency(self, files: dict[str, Path]) -> Tensor:
        return torch.from_numpy(_picture(files["saliency"], "L") > 127).float().unsqueeze(0)

    def _edges(self, files: dict[str, Path]) -> Tensor:
        labels = torch.from_numpy(_matlab(files["labels"], "LabelMap").astype(np.int64))
        edges = torch.zeros(labels.shape, dtype=torch.bool)
        edges[:, :-1] |= labels[:, 1:] != labels[:, :-1]
        edges[:-1] |= labels[1:] != labels[:-1]
        return edges.float().unsqueeze(0)


def _picture(path: Path, mode: str | None = None) -> np.ndarray:
    """Pixels of a picture; None keeps the indices of a palette."""
    image = require("PIL.Image", "pillow", "examples.dense_data.PascalContext").open(path)
    return np.array(image if mode is None else image.convert(mode))


def _matlab(path: Path, name: str) -> np.ndarray:
    return require("scipy.io", "scipy", "examples.dense_data.PascalContext").loadmat(path)[name]
