"""Print docs/samplers.md: what each sampler is, and how far it lies from the reference library on every process.

Run from the repository: python benchmarks/oracle_table.py > docs/samplers.md
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
warnings.filterwarnings("ignore")

from sampling_oracle import SCHEDULES, STEPS, Row, rows, worst  # noqa: E402

from mezzotint.sampling import SAMPLERS  # noqa: E402

INTRO = """# Samplers

`mezzotint generate --sampler NAME`, `mezzotint.Request(sampler=NAME)`, or `mezzotint.sampling.SAMPLERS[NAME]`. A
sampler is a frozen set of options with a `path` and a `step`; `dataclasses.replace(SAMPLERS["ddim"], eta=0.5)` makes
a variant. All of them work on variance-preserving schedules and on rectified flows alike, `flow_euler` on flows
alone; a pair that cannot work is refused by name.

| name | paper | calls a step | order | noise |
|---|---|---|---|---|
| `ddpm` | Ho 2020 | 1 | | fresh each step |
| `ddim` | Song 2021 | 1 | 1 | `eta` |
| `euler` | Karras 2022 | 1 | 1 | |
| `euler_ancestral` | k-diffusion | 1 | | fresh each step |
| `heun` | Karras 2022, algorithm 1 | 2, the last 1 | 2 | |
| `dpmpp_2m`, `dpmpp_2m_karras` | Lu 2022, DPM-Solver++ | 1 | 2 | |
| `dpmpp_2m_sde`, `dpmpp_2m_sde_karras` | Lu 2022, DPM-Solver++ | 1 | | fresh each step |
| `unipc`, `unipc_karras` | Zhao 2023 | 1 | 3 | |
| `lcm` | Luo 2023 | 1 | | fresh each step; for distilled weights |
| `flow_euler` | Liu 2022 | 1 | 1 | |

The orders are measured in `tests/test_sampling_analytic.py` on a Gaussian mixture whose denoiser and exact flow are
known.

## Against the reference

Largest difference from diffusers 0.42.1 over the largest value, in float32, with the same fake network and the same
noise, over all objectives that the reference supports, steps {steps}, and paths entered at the start and in the
middle. `tests/test_sampling_oracle.py` holds these numbers to 5e-6; {rows} combinations of sampler, schedule and
objective are compared.
"""

NOTES = """
A dash: not compared, mostly because the reference has no such combination. Where ours serves it, it is tested on data
with a known denoiser alone (`test_every_sampler_serves_every_process_that_it_does_not_refuse`).

(1) The reference is run in double precision on its own float32 tables, because its float32 arithmetic loses more than
5e-6 by itself: Euler and Heun carry x / alpha, up to 20,000 times x on the cosine schedule, DDPM subtracts numbers
near 1, flow Heun divides a difference by a small sigma. Against the reference as it is, the same rows read:

"""

FAULTS = """
(2) Heun in Karras' coordinates multiplies float32 rounding by alpha'/alpha, 157 over a path of two steps on `linear`
and 20,000 on `cosine`; the test allows Heun 2^-24 times that factor where it exceeds 5e-6.

Where the reference is at fault we differ and the test says so: at zero terminal SNR its sigma samplers clamp
alpha_bar to 2^-24, ours step from pure noise exactly (UniPC alone needs a finite log-SNR and keeps the clamp); and
where it cuts 998.99999, a rounding error, to timestep 998, ours tells the network 999. For these cells the comparison
puts the reference's first level in place of ours. Everything else that looks odd is the reference's and is kept, one
named function each in `mezzotint/sampling/spacing.py`, one `test_trap_...` each in the tests.
"""


def table(found: list[Row], exact: bool | None, mark: bool) -> list[str]:
    """A line per sampler, a column per schedule, the worst objective in each cell."""
    lines = ["| sampler | " + " | ".join(SCHEDULES) + " |", "|---" * (len(SCHEDULES) + 1) + "|"]
    for name in dict.fromkeys(row.sampler for row in found):
        cells: list[str] = []
        for schedule in SCHEDULES:
            mine = [row for row in found if (row.sampler, row.schedule) == (name, schedule)]
            errors = [worst(row, SAMPLERS[name], exact=exact) for row in mine]
            cells.append(f"{max(errors):.1e}" if errors else "-")
        note = (
            " (1, 2)" if name == "heun" else " (1)" if any(row.doubled for row in found if row.sampler == name) else ""
        )
        lines.append(f"| `{name}`{note if mark else ''} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    found = rows()
    print(INTRO.replace("{steps}", ", ".join(map(str, STEPS))).replace("{rows}", str(len(found))))
    print("\n".join(table(found, None, mark=True)))
    print(NOTES)
    print("\n".join(table([row for row in found if row.doubled], False, mark=False)))
    print(FAULTS, end="")


if __name__ == "__main__":
    main()
