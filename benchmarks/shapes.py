"""Parameter shapes of well-known models."""

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """The 159 tensors, 23.5M elements, of ResNet-50 without its classifier (He et al. 2016, Table 1)."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, channels, 1, 1))
            for shape in convolutions:
                shapes += [shape, (shape[0],), (shape[0],)]
            channels = 4 * width
    return shapes


def resnet18() -> list[Shape]:
    """The 60 tensors, 11.2M elements, of ResNet-18 without its classifier (He et al. 2016, Table 1)."""
    shapes = _convolution(64, 3, 7)
    channels = 64
    for width in (64, 128, 256, 512):
        shapes += _convolution(width, channels, 3) + _convolution(width, width, 3)
        shapes += _convolution(width, channels, 1) if width != channels else []
        shapes += _convolution(width, width, 3) * 2
        channels = width
    return shapes


def hrnet18() -> list[Shape]:
    """HRNet-W18's backbone (Wang et al. 2020): stages of 1, 4 and 3 modules with 2, 3 and 4 branches of four basic blocks."""
    shapes = _convolution(64, 3, 3) + _convolution(64, 64, 3)
    for inputs in (64, 256, 256, 256):
        shapes += _convolution(64, inputs, 1) + _convolution(64, 64, 3) + _convolution(256, 64, 1)
    shapes += _convolution(256, 64, 1)
    widths = [18, 36, 72, 144]
    before = [256]
    for modules, branches in ((1, 2), (4, 3), (3, 4)):
        now = widths[:branches]
        shapes += [
            s
            for n, w in enumerate(now)
            if before[n : n + 1] != [w]
            for s in _convolution(w, before[min(n, len(before) - 1)], 3)
        ]
        for _ in range(modules):
            shapes += [s for w in now for s in _convolution(w, w, 3) * 8]
            for i, to in enumerate(now):  # every branch into every other: 1x1 from coarser, strided 3x3 from finer
                for j, inputs in enumerate(now):
                    shapes += _convolution(to, inputs, 1) if j > i else _convolution(inputs, inputs, 3) * max(i - j - 1, 0)
                    shapes += _convolution(to, inputs, 3) if j < i else []
        before = now
    return shapes


def segnet() -> list[Shape]:
    """SegNet (Badrinarayanan et al. 2017): VGG-16's convolutions, and the same in reverse."""
    widths = [3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    pairs = list(zip(widths[1:], widths[:-1], strict=True))
    return [s for out, inputs in [*pairs, *((b, a) for a, b in pairs[:0:-1])] for s in _convolution(out, inputs, 3)]


def vit(width: int = 192, depth: int = 12) -> list[Shape]:
    """ViT-Ti/16 without its head (Dosovitskiy et al. 2021; Touvron et al. 2021)."""
    block: list[Shape] = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,), *block * depth, (width,), (width,)]


def _convolution(outputs: int, inputs: int, size: int) -> list[Shape]:
    """A convolution's weight, and scale and shift of the batch norm behind it."""
    return [(outputs, inputs, size, size), (outputs,), (outputs,)]
