"""A suite: the attacks of one evaluation, as the config names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from redoubt.attacks import Attack
from redoubt.build import make
from redoubt.errors import UserError, shown


@dataclass(frozen=True)
class Suite:
    """Attacks by name, and how they are counted.

    Args:
        attacks: By name, in the order in which they are shown.
        norm, eps: The threat model that the suite states; eps None: none.
        ensemble: Whether the row-wise AND is a result too.
        bounded: What an attack without a bound of its own finds outside the ball counts as not found.
        stochastic: Whether a net with a random forward may be judged (an EOT suite).
        on_source: Names of the attacks that see another net's logits (transfer).
        groups: Of corruptions: {group: names}, whose mean accuracy is a result too.
        sections: What decides each attack's examples, for the record.
    """

    attacks: Mapping[str, Attack] = field(default_factory=dict)
    norm: str = "linf"
    eps: float | None = None
    ensemble: bool = False
    bounded: bool = True
    stochastic: bool = False
    on_source: frozenset[str] = frozenset()
    groups: Mapping[str, list[str]] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)

    def members(self, classes: int) -> dict[str, list[str]]:
        """The attacks that run several, and which these are on a net of so many classes."""
        found = {name: attack.members(classes) for name, attack in self.attacks.items()}
        return {name: list(members) for name, members in found.items() if members}

    def on_classes(self, classes: int) -> Suite:
        """The suite whose record names the members that version 0.1.0 did not run on so few classes.

        On 2 and 3 classes nothing but apgd-ce and square ran: those verdicts stand for less.
        """
        more = {n: m for n, m in self.members(classes).items() if classes < 4 and not {*m} <= {"apgd-ce", "square"}}
        return replace(self, sections={n: {**s, "members": more.get(n)} for n, s in self.sections.items()})

    @property
    def more_members(self) -> dict[str, Any]:
        """What `on_classes` has named."""
        return {name: section["members"] for name, section in self.sections.items() if section.get("members")}

    def crafted_on(self, source: str) -> Suite:
        """The suite whose record names the net that its transfer attacks are crafted on."""
        named = {n: {**s, "source": source} if n in self.on_source else s for n, s in self.sections.items()}
        return replace(self, sections=named)


def suite(section: Mapping[str, Any]) -> Suite:
    """The suite of a resolved config's ``attack``.

    Raises:
        UserError: An attack that does not exist, or an option that it refuses.
    """
    listed = section.get("attacks")
    if not isinstance(listed, Mapping):
        raise UserError("attack.attacks must map names to attacks")
    attacks: dict[str, Attack] = {}
    sections: dict[str, Any] = {}
    on_source = set()
    groups: dict[str, list[str]] = {}
    for key, entry in listed.items():
        if not isinstance(entry, Mapping):
            raise UserError(f"attack.attacks.{key}={shown(entry)} must be a mapping, as {{_target_: ...}}")
        options = dict(entry)
        net = options.pop("net", "own")
        if net not in ("own", "source"):
            raise UserError(f"attack.attacks.{key}.net={net!r} is not known: take own or source")
        made = make(options, f"attack.attacks.{key}")
        # A library's attack alone is called after itself.
        own = f"{key}_{made.name}" if key in ("torchattacks", "foolbox") else str(key)
        several = made if isinstance(made, Mapping) else {own: made}
        for name, attack in several.items():
            if name in attacks or name in ("natural", "ensemble", "index", "label"):
                raise UserError(f"attack.attacks.{key}: the name {name} is taken: give the attack another")
            attacks[name] = attack
            if attack.group is not None:
                groups.setdefault(attack.group, []).append(name)
            decisive = options if attack is made else [options["_target_"], attack.settings]
            sections[name] = {"attack": decisive, "net": net}
            if net == "source":
                on_source.add(name)
    return Suite(
        attacks=attacks,
        norm=str(section["norm"]),
        eps=section["eps"],
        ensemble=bool(section.get("ensemble")),
        bounded=bool(section.get("bounded", True)),
        stochastic=bool(section.get("stochastic", False)),
        on_source=frozenset(on_source),
        groups=groups,
        sections=sections,
    )
