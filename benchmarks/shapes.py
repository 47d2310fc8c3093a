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
