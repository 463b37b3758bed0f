"""The published families by name."""

from __future__ import annotations

from mezzotint.families import ddpm, dit, flux2, ldm, sd1, sd2, sd35, sdxl
from mezzotint.families.family import Family

# The first that fits: what is told apart by an addition stands before what lacks it.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        sdxl.FAMILY, sdxl.REFINER, sd1.FAMILY, sd2.FAMILY, sd35.FAMILY, flux2.FAMILY, dit.FAMILY,
        ldm.TEXT, ldm.CLASSES, ldm.FAMILY, ddpm.FAMILY,
    )
}  # fmt: skip
