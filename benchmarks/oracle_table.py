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

MODELS = """
## Fitting a model

A model's contract may say where steps fall, where DDIM ends, how much noise DDPM draws and how far clean estimates
may reach (`SamplingFacts`); `sampling.fitted` and `sampling.bounded` apply it. Published scheduler files say the same
things under their own names. `tests/test_scheduler_files.py` makes every sampler above from the same eight files as
the reference does, at 7 and 20 steps, from noise and from the middle; the largest difference is 4.5e-6.

- A file's keys speak to every sampler whose counterpart in the reference has them. Spacing that a file leaves out is
  the sampler's own: `leading` for DDPM and DDIM, `linspace` for the others; LCM always keeps the timesteps it was
  distilled on. Everything else that a file leaves out is the default of the scheduler it names: so a DDPM or DDIM
  file that says nothing of clipping clips to 1, where the reference's own defaults are read anew for each sampler.
- `steps_offset` moves `leading` timesteps alone. `set_alpha_to_one` is DDIM's alone. Karras' levels, the SDE form and
  solver orders belong to a sampler's name and not to the file.
- Clipping: DDPM and Heun let the noise follow from the clipped clean, DDIM and LCM keep the noise as predicted,
  Euler, DPM-Solver++ and UniPC do not clip. Dynamic thresholding is refused.
- A network with twice the channels gives DDPM its variance (Nichol 2021, eq. 15), equal to the reference's
  `learned_range` to 8.4e-7; other samplers leave it alone. Guidance mixes the predictions only, and the variance is
  the conditional branch's.
- DDPM ends without noise. The reference adds some after its last step when that step's timestep is not 0: next to
  none with the small variance, a visible amount with the large and the learned one under `trailing` spacing or an
  offset.

Improved DDPM and ADM name their own respacings. "250" adds up strides of (T - 1) / (n - 1) and rounds, and each step
goes to the next one listed: that is `ddpm` on `linspace`, exact for 25, 50, 100 and 250 steps of 1000 and of 4000,
and elsewhere to the one timestep by which a sum may miss a half (21 steps is the first). "ddim250" takes multiples of
a whole stride s from 0, the smallest s that lists exactly n: `ddim` on `leading`, except where T / n is not whole.
There ours and the reference's stride is T // n (142 at 7 steps of 1000, theirs 143), and where no stride lists n they
refuse. DDIM on any other rule steps to t - T // n, which neither of them does. Where such a network was told t * 1000
/ T (`rescale_timesteps`), `Discrete(tick=1000 / T)` says so.

Skip-layer guidance (SD 3.5) adds skip_scale (conditional - conditional without some layers) to the guided raw output,
at step indices i with n start < i < n stop: 1 to 5 of 28 steps at the usual 0.01 and 0.2.
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
    print(FAULTS + MODELS, end="")


if __name__ == "__main__":
    main()
