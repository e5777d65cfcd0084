"""The data path of the papers' scripts: PIL images, torchvision's transforms, a DataLoader."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Pictures(Dataset):
    """Images as torchvision's CIFAR10 holds them, each made a PIL image and transformed when it is asked for.

    Args:
        images: uint8 [N, H, W, 3].
        labels: int [N].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        size = images.shape[1]
        self.transform = transforms.Compose(
            [transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def pil_loader(images: np.ndarray, labels: np.ndarray, batch: int, workers: int) -> DataLoader:
    """The loader of the papers' scripts."""
    return DataLoader(Pictures(images, labels), batch_size=batch, shuffle=True, num_workers=workers, drop_last=True)
