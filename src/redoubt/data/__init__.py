"""Images in memory: each split is one uint8 tensor, decoded once, cached, and batched on the device."""

from redoubt.data.datasets import CIFAR10, CIFAR100, SVHN, Digits, TinyImageNet
from redoubt.data.loader import Batch, EvalLoader, TrainLoader
from redoubt.data.module import ImageData
from redoubt.data.photos import Photos

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "SVHN",
    "Batch",
    "Digits",
    "EvalLoader",
    "ImageData",
    "Photos",
    "TinyImageNet",
    "TrainLoader",
]
