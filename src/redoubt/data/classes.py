"""The names of classes: their order, and how the labels of one list are those of another."""

from __future__ import annotations

from collections.abc import Sequence

from redoubt.errors import UserError

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""
CIFAR10, CIFAR100 = _CIFAR10.split(), _CIFAR100.split()
DIGITS = [str(digit) for digit in range(10)]


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all names are whole numbers."""
    return bool(names) and all(name.isascii() and name.isdigit() for name in names)


def in_order(names: Sequence[str]) -> list[str]:
    """Names in the order of their labels: numbers as such (1, 2, 10), else as text."""
    return sorted(names, key=lambda name: (int(name), name)) if are_numbers(names) else sorted(names)


def shortened(names: Sequence[str]) -> str:
    """Names for one line."""
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:10])}, ... {names[-1]}"


def places(found: Sequence[str], wanted: Sequence[str], owners: tuple[str, str]) -> list[int] | None:
    """Where each of the names that were found stands among those that are wanted; None: all in the same place.

    Names that are all numbers are compared as such: 01 is 1.

    Args:
        found, wanted: Both lists of names.
        owners: Whose they are, for the message.

    Raises:
        UserError: One list has names that the other has not.
    """
    if are_numbers(found) and are_numbers(wanted) and set(found) != set(wanted):
        found, wanted = [str(int(name)) for name in found], [str(int(name)) for name in wanted]
    if set(found) != set(wanted) or not len(found) == len(wanted) == len(set(found)):
        only = [sorted(set(a) - set(b)) or list(a) for a, b in ((found, wanted), (wanted, found))]
        raise UserError(
            f"{owners[0]} and {owners[1]} have other classes: {shortened(in_order(only[0]))} against"
            f" {shortened(in_order(only[1]))}; name the classes alike"
        )
    order = [list(wanted).index(name) for name in found]
    return None if order == [*range(len(order))] else order
